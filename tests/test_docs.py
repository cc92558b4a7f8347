"""The documents tell the truth: commands compose, links and files are there, messages are those of the code."""

import ast
import json
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
from hydra._internal.utils import get_args_parser
from omegaconf import OmegaConf
from PIL import Image

from clvr_train.data.readers import read_trajectories
from clvr_train.inference.__main__ import make_parser
from clvr_train.method.truncation import truncate
from clvr_train.rewards.combine import simple_prompt
from clvr_train.shapes.edits import find_edits, read_mentions
from clvr_train.shapes.language import parse_goal
from recipes import _document, plan
from recipes._config import check_command, experiments

ROOT = Path(__file__).resolve().parent.parent
CONF = ROOT / "conf"
DOCS = [ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")]
DOCS += sorted((ROOT / "docs").glob("*.md")) + sorted((ROOT / "models").glob("*/README.md"))
STORIES = [ROOT / "launch" / f"{name}.sh" for name in ("ablation", "quickstart", "rebuild_models")]
PLACES = ("clvr_train/", "recipes/", "conf/", "launch/", "tests/", "docs/")  # code spans that begin so are paths
by_name = pytest.mark.parametrize("path", DOCS, ids=lambda path: path.relative_to(ROOT).as_posix())


def code(path: Path) -> Iterator[str]:
    """Every line of a fenced block (continued lines joined) and every code span of a document."""
    blocks = re.split(r"^```.*$", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    for number, block in enumerate(blocks):
        if number % 2:
            yield from block.replace("\\\n", " ").splitlines()
        else:
            yield from re.findall(r"`([^`\n]+)`", block)


def shell(path: Path) -> Iterator[str]:
    """Every command of the `bash` blocks of a document: continued lines joined, comments left out."""
    for block in re.findall(r"^```bash\n(.*?)^```", path.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words:
                yield shlex.join(words)


# Commands of the documents that no recipe's config and no dry run can check, and why that is enough.
NOT_RUN = {
    "make quickstart": "15 minutes; test_every_command_of_a_story_composes holds its commands",
    "make ablation": "an hour; the same test",
    "make test": "it is what runs this test",
    "make test-all": "the same tests, and one more build of DeepSpeed",
    "make check": "the linter; what it calls are pinned tools",
    "make .venv": "minutes of installation; it is what this test runs in",
    "git clone REPOSITORY clvr_train": "the name stands for where the project lies",
    "cd clvr_train": "the folder of that clone",
    "source .venv/bin/activate": "the environment that this test runs in",
}


@cache
def check(recipe: str, *words: str) -> None:
    """Compose every job of a command, and see that it lacks no value."""
    args = get_args_parser().parse_intermixed_args(list(words))
    jobs = check_command(recipe, CONF, args.overrides, args.multirun)
    missing = {key for job in jobs for key in OmegaConf.missing_keys(job)}
    assert not missing or args.help or args.cfg, f"{recipe} {words} lacks {missing}"


def check_shell(command: str) -> None:
    """Compose, or run dry, what a line of a `bash` block asks for.

    Raises:
        AssertionError, ConfigError: it is no command that can be checked so, or one that does not work.
    """
    words = shlex.split(command)
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words = words[1:]
    recipe = re.search(r"(?:^python|^torchrun .*) recipes/([a-z]\w*)\.py ?(.*)", shlex.join(words))
    script = re.match(r"(?:bash|sbatch [^ ].*|sbatch) (launch/\w+\.(?:sh|sbatch))", shlex.join(words))
    extra = re.fullmatch(
        r"pip install -e '\.\[(\w+)\]'", shlex.join(words)
    )  # an extra that there is; `make` installs it
    if extra:
        assert re.search(rf"^{extra[1]} =$", (ROOT / "setup.cfg").read_text(), re.MULTILINE), (
            f"no such extra: {command}"
        )
    elif shlex.join(words) in NOT_RUN:
        targets = re.findall(r"^([\w.-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert words[0] != "make" or words[1] in targets, f"no such target: {command}"
    elif recipe:
        check(recipe[1], *shlex.split(recipe[2]))
    elif words[:3] == ["python", "-m", "clvr_train.inference"]:
        make_parser().parse_args(words[3:])
    elif script and ROOT / script[1] in STORIES:
        pass  # test_every_command_of_a_story_composes
    elif script:
        dry = re.sub(r"\bsbatch .*(?=launch/)", "bash ", command)
        done = subprocess.run(
            ["bash", "-c", dry], cwd=ROOT, env=os.environ | {"DRY_RUN": "1"}, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0 and done.stdout.strip(), f"DRY_RUN=1 {command}: {done.stderr}"
        for line in done.stdout.splitlines():
            if inner := re.search(r"\brecipes/([a-z]\w*)\.py ?(.*)", line):
                check(inner[1], *shlex.split(inner[2]))
    else:
        raise AssertionError(f"{command}: is neither a recipe, a script of launch/ with DRY_RUN nor in NOT_RUN")


@by_name
def test_every_command_composes(path: Path) -> None:
    """In prose and tables too, where a command may be cut short by `...` and is then no command."""
    targets = set(re.findall(r"^([\w.-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for command in shell(path):
        check_shell(command)
    for line in code(path):
        recipe = re.search(r"\bpython recipes/([a-z]\w*)\.py(.*)", line)
        if recipe:
            check(recipe[1], *shlex.split(recipe[2], comments=True))
        make = re.match(r"make ([\w.-]+)", line)
        assert make is None or make[1] in targets, f"no such target: {line}"
        script = re.match(r"(?:\w+=\S+ )*bash (\S+\.sh)", line)
        assert script is None or (ROOT / script[1]).is_file(), f"no such script: {line}"


@pytest.mark.parametrize(
    "command",
    ["python recipes/train_dit.py train.lrr=1", "python recipes/no_such.py", "bash launch/no_such.sh", "make coffee"]
    + ["bash launch/torchrun.sh train_dit train.lrr=1", "pip install torch", "python tests/test_docs.py"],
)
def test_a_command_that_does_not_work_is_found(command: str) -> None:
    with pytest.raises((AssertionError, ValueError, OSError)):
        check_shell(command)


@by_name
def test_every_fenced_block_says_what_it_is(path: Path) -> None:
    """So that no command hides in a block that is not checked."""
    blocks = re.findall(r"^```([^\n]*)\n(.*?)^```", path.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert {kind for kind, _ in blocks} <= {"bash", "json", "python", "text", "mermaid"}
    for kind, text in blocks:
        assert kind == "bash" or not re.search(r"^(python|bash|make|torchrun|sbatch|pip|git) ", text, re.MULTILINE)


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@by_name
def test_every_relative_link_resolves(path: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text(encoding="utf-8")):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        file = path.parent / name if name else path
        assert file.exists(), f"{path.name} links to {target}"
        headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE) if anchor else []
        assert not anchor or anchor in map(slug, headings), f"{path.name} links to {target}"


@by_name
def test_every_path_in_a_code_span_exists(path: Path) -> None:
    for span in code(path):
        if span.startswith(PLACES) and re.fullmatch(r"[\w./-]+", span):
            assert (ROOT / span).exists(), f"{path.name} speaks of {span}"


def test_readme_names_every_recipe_and_every_room() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    recipes = {path.stem for path in (ROOT / "recipes").glob("[!_]*.py")}
    assert set(re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)) == recipes
    rooms = {path.parent.name for path in (ROOT / "clvr_train").glob("*/__init__.py")}
    assert set(re.findall(r"^  (\w+)/", text.split("## The tree")[1], re.MULTILINE)) == rooms == set(_document.ROOMS)


STUB = """#!/usr/bin/env bash
# Stands for python: notes the command and makes the folder of the model that the recipe would leave.
echo "$*" >>"$NOTES"
name=$(sed -n 's/.*experiment=\\([a-z_]*\\).*/\\1/p' <<<"$*")
run=$(sed -n 's/.* run=\\([^ ]*\\).*/\\1/p' <<<"$*")
[[ -n $run || -z $name ]] || run=$(sed -n 's/^run: //p' "conf/experiment/$name.yaml")
[[ -z $run ]] || { mkdir -p "runs/$run/model"; echo whole >"runs/$run/model/model_index.json"; }
"""


@pytest.fixture
def run_story(tmp_path: Path):
    """run_story(script) -> the recipe commands that it gave, run in a copy of the repository's shell and config."""
    for name in ("launch", "conf"):
        shutil.copytree(ROOT / name, tmp_path / name)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").write_text(STUB)
    (tmp_path / "bin" / "python").chmod(0o755)
    notes = tmp_path / "notes"

    def run(script: str) -> list[list[str]]:
        notes.write_text("")
        path = f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"
        command = ["bash", str(tmp_path / "launch" / script)]
        environment = os.environ | {"PATH": path, "NOTES": str(notes), "SEEDS": "0"}  # one seed is like another
        subprocess.run(command, env=environment, check=True, capture_output=True)
        return [shlex.split(line) for line in notes.read_text().splitlines()]

    return run


@pytest.mark.parametrize("path", STORIES, ids=lambda path: path.name)
def test_every_command_of_a_story_composes(run_story, path: Path) -> None:
    commands = run_story(path.name)
    assert len(commands) >= 5
    for words in {tuple(words) for words in commands}:
        check(Path(words[0]).stem, *words[1:])


def test_the_quickstart_skips_what_is_done(run_story) -> None:
    first, second = run_story("quickstart.sh"), run_story("quickstart.sh")
    assert second == first[-1:], "only the report is made again"


def test_rebuilt_models_are_published_once_all_are_made(run_story, tmp_path: Path) -> None:
    run_story("rebuild_models.sh")
    models = tmp_path / "models/shapes"
    assert sorted(path.name for path in models.iterdir()) == ["base", "controller", "distilled"]
    assert all((path / "model_index.json").exists() for path in models.iterdir())
    again = [Path(words[0]).stem for words in run_story("rebuild_models.sh")]
    assert again == ["make_shapes"] * 3, "the stub writes no trajectories; all else is there"


def render(node: ast.AST) -> str:
    """A text of the source with NUL where a value goes in."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return re.sub(r"(?<!%)%[-.\w]*[sdrfg]", "\0", node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(render(part) for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return render(node.left) + render(node.right)
    return "\0"


@cache
def messages() -> list[re.Pattern]:
    """A pattern for every text of the sources, and for what follows a colon, that says enough to be recognised."""
    found = set()
    for path in (*(ROOT / "clvr_train").rglob("*.py"), *(ROOT / "recipes").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            text = render(node).strip()
            for tail in (text, *(text[match.end() :] for match in re.finditer(": ", text))):
                if len(re.sub(r"[\0\W]", "", tail)) >= 5:
                    found.add(".*".join(re.escape(part) for part in tail.split("\0")))
    return [re.compile(pattern, re.DOTALL) for pattern in found]


def said(message: str) -> bool:
    """Whether the code can say the message; `<file>: ` or a quoted value in front of it may come from elsewhere."""
    tails = [message, *(message[match.end() :] for match in re.finditer(r": |^'[^']*' ", message))]
    return any(pattern.fullmatch(tail) for tail in tails for pattern in messages())


def documented_messages() -> list[str]:
    """The code spans of the columns `message` of all tables."""
    found = []
    for path in DOCS:
        column = None
        for line in path.read_text(encoding="utf-8").splitlines():
            cells = [cell.strip() for cell in line.strip().strip("|").split("|")] if line.startswith("|") else []
            if not cells:
                column = None
            elif column is None:
                column = cells.index("message") if "message" in cells else -1
            elif column >= 0 and "`" in cells[column]:
                found.append(cells[column].strip("`"))
    return found


@pytest.mark.parametrize("message", documented_messages())
def test_every_documented_message_is_one_of_the_code(message: str) -> None:
    assert said(message)


@pytest.mark.parametrize("message", ["train.lr: is too large", "data/a.png: no such picture", "cfg=4: no guidance"])
def test_other_messages_are_not(message: str) -> None:
    assert not said(message)


def test_the_documented_record_is_read(tmp_path: Path) -> None:
    text = (ROOT / "docs/data_format.md").read_text(encoding="utf-8")
    record = json.loads(re.findall(r"```json\n(.*?)```", text, re.DOTALL)[0])
    (tmp_path / "images").mkdir()
    for name in record["images"]:
        Image.new("RGB", (96, 96)).save(tmp_path / name)
    (tmp_path / "trajectories.jsonl").write_text(json.dumps(record) + "\n")
    trajectory = next(read_trajectories(tmp_path))
    assert [step.action for step in trajectory.steps] == ["generate", "verify", "edit", "stop"]
    assert [len(sample.reasonings) for sample in truncate(trajectory)] == [1, 3]
    edit = simple_prompt(truncate(trajectory)[1]).p_i2i
    assert not find_edits(edit), "docs/method.md says that such an edit cannot be read"


@pytest.mark.parametrize(
    ("reasoning", "wishes", "edits"),
    [
        ("draw the goal as it stands .", None, []),
        ("a red circle top-left , another one directly below it .", "a red circle top-left", []),
        ("a square of the same colour centre", "a square", []),
        ("plan : a red circle , no , a blue circle top-left .", "a red circle , a blue circle top-left", []),
        ("i see green square centre . something is missing . add a red circle in the top .",
         "green square centre , red circle top", ["add"]),
        ("i see red circle top-left . the circle is too much . remove the red circle .",
         "red circle top-left", ["remove"]),
        ("i see red circle top-left . the circle has the wrong colour . make it blue .", "red circle top-left", []),
        ("the circle should be blue . fix that .", "a circle", []),
    ],
)  # fmt: skip
def test_raw_reasoning_is_read_as_the_method_says(reasoning: str, wishes: str | None, edits: list[str]) -> None:
    assert f"`{reasoning}`" in (ROOT / "docs/method.md").read_text(encoding="utf-8")
    goal = read_mentions(reasoning)
    assert (goal and (goal.specs, goal.closed)) == (wishes and (parse_goal(wishes).specs, False))
    assert [edit.kind for edit in find_edits(reasoning)] == edits


def test_every_experiment_belongs_to_a_recipe() -> None:
    names = {name for path in CONF.glob("*.yaml") for name in experiments(path.stem, CONF)}
    assert names == {path.stem for path in (CONF / "experiment").glob("*.yaml")}


@pytest.mark.parametrize(("page", "make"), [("configuration", _document.configuration), ("code", _document.code)])
def test_pages_made_from_the_sources_are_up_to_date(page: str, make: Callable[[], str]) -> None:
    there = (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")
    assert there == make(), f"docs/{page}.md is not that of the sources; run: python recipes/_document.py"


def test_the_reference_takes_defaults_and_comments_from_the_file(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(
        "defaults:\n  - model: shapes        # which model\n  - _self_\n"
        "run: a                   # a name\n"
        "                         # on two lines\n"
        "text: 'a # b'            # one | two\n"
        "inner:                   # of both\n  list: [1, 2]  # some\n  rows:\n    - [a, b]\n    - [c]\n"
    )
    assert list(_document.rows(tmp_path / "a.yaml")) == [
        ("model", "shapes", "[group](#group-model): which model"),
        ("run", "a", "a name on two lines"),
        ("text", "'a # b'", "one | two"),
        ("inner", "", "of both"),
        ("inner.list", "[1, 2]", "some"),
        ("inner.rows", "[[a, b], [c]]", ""),
    ]


def test_every_key_says_what_it_means() -> None:
    lines = (ROOT / "docs/configuration.md").read_text(encoding="utf-8").splitlines()
    mute = [line for line in lines if line.endswith("|  |")]
    assert not mute, f"say it in a comment beside the key in conf/, then: python recipes/_document.py ({mute})"


def test_every_recipe_has_a_section_and_every_page_is_in_the_index() -> None:
    sections = re.findall(r"^## (\w+)$", (ROOT / "docs/recipes.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(sections) == sorted(path.stem for path in (ROOT / "recipes").glob("[!_]*.py"))
    index = (ROOT / "docs/README.md").read_text(encoding="utf-8")
    assert [path.name for path in (ROOT / "docs").glob("*.md") if f"({path.name})" not in index] == ["README.md"]


@pytest.mark.slow
def test_the_hardware_table_is_that_of_plan(capsys: pytest.CaptureFixture[str]) -> None:
    """Its first row; the others are of the same kind."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    row = re.search(r"\| ([\d.]+) GB \| ([\d.]+) s \| `python recipes/plan.py experiment=klein_4b_sft` \|", text)
    plan.main(["experiment=klein_4b_sft"])
    said = capsys.readouterr().out
    total, seconds = re.search(r"total +([\d.]+) GB", said)[1], re.search(r"time +([\d.]+) s", said)[1]
    assert row and (f"{float(total):.1f}", float(seconds)) == (row[1], float(row[2])), said
