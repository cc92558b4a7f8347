"""The documents tell the truth: commands compose, links and files are there, messages are those of the code."""

import ast
import json
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from hydra._internal.utils import get_args_parser
from omegaconf import OmegaConf
from PIL import Image

from clvr_train.data.readers import read_trajectories
from clvr_train.method.truncation import truncate
from clvr_train.rewards.combine import simple_prompt
from clvr_train.shapes.edits import find_edits, read_mentions
from clvr_train.shapes.language import parse_goal
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


def check(words: list[str], recipe: str) -> None:
    """Compose every job of a command, and see that it lacks no value."""
    args = get_args_parser().parse_intermixed_args(words)
    jobs = check_command(recipe, CONF, args.overrides, args.multirun)
    missing = {key for job in jobs for key in OmegaConf.missing_keys(job)}
    assert not missing or args.help or args.cfg, f"{recipe} {words} lacks {missing}"


@by_name
def test_every_command_composes(path: Path) -> None:
    targets = set(re.findall(r"^([\w.]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for line in code(path):
        recipe = re.search(r"\bpython recipes/(\w+)\.py(.*)", line)
        if recipe:
            check(shlex.split(recipe[2], comments=True), recipe[1])
        make = re.match(r"make ([\w.]+)", line)
        assert make is None or make[1] in targets, f"no such target: {line}"
        script = re.match(r"(?:\w+=\S+ )*bash (\S+\.sh)", line)
        assert script is None or (ROOT / script[1]).is_file(), f"no such script: {line}"


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


def test_readme_names_every_recipe_and_every_module() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    recipes = {path.stem for path in (ROOT / "recipes").glob("[!_]*.py")}
    assert set(re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)) == recipes
    tree = text.split("## The tree")[1]
    named, room = set(), ""
    for name in re.findall(r"^ *([\w./]+(?:/|\.\w+))", tree, re.MULTILINE):
        room = name if name.endswith("/") else room
        named.add(f"{room}{name}")
    modules = {f"{p.parent.name}/{p.name}" for p in (ROOT / "clvr_train").rglob("*.py") if p.stem != "__init__"}
    assert {name for name in modules if name not in named} == set()
    listed = {name for name in named if name.endswith(".py") and not name.startswith("recipes/")}
    assert listed - modules == set()


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
        check(list(words[1:]), Path(words[0]).stem)


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
