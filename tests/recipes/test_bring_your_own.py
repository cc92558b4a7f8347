"""docs/bring_your_own.md, done as a new user would: every block of the walk, in order, as it stands."""

import importlib
import json
import re
import shlex
from pathlib import Path

import pytest

from clvr_train.data.readers import read_trajectories
from clvr_train.runtime.metrics import read_metrics

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/bring_your_own.md").read_text(encoding="utf-8")
WALK = PAGE.split("## From a clone to a model trained on your data")[1].split("## The same at full size")[0]
SET_UP = ("git clone", "cd clvr_train", "make .venv", "source .venv/bin/activate")  # what this test runs in already


def blocks(text: str) -> list[tuple[str, str]]:
    return re.findall(r"^```(\w+)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def run_block(kind: str, text: str) -> None:
    if kind == "python":
        exec(compile(text, "docs/bring_your_own.md", "exec"), {"__name__": "__main__"})
    for line in text.replace("\\\n", " ").splitlines() if kind == "bash" else ():
        if not line.startswith(SET_UP):
            python, script, *words = shlex.split(line, comments=True)
            assert python == "python"
            importlib.import_module(f"recipes.{Path(script).stem}").main(words)


@pytest.mark.slow
def test_the_walk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("models").symlink_to(ROOT / "models")
    for kind, text in blocks(WALK):
        run_block(kind, text)
    example = json.loads(next(text for kind, text in blocks(WALK) if kind == "json"))
    written = json.loads(Path("my/data/trajectories.jsonl").read_text().splitlines()[0])
    assert written["conversations"] == example["conversations"], "the record that is shown is the one that is written"
    assert json.loads(Path("my/validation.json").read_text())["records"] == 4
    assert [row["step"] for row in read_metrics(Path("runs/my/sft"))] == [1, 2, 3, 4]
    assert len(Path("my/data/proxy_prompts.jsonl").read_text().splitlines()) == 8
    assert len(read_metrics(Path("runs/my/pprl"))) == 2
    for name in ("sft", "controller", "pprl", "merged"):
        assert Path("runs/my", name, "model").is_dir()
    assert Path("runs/my/loop/closed_loop.json").is_file() and Path("runs/my/pprl/report.html").is_file()
    assert list(Path("runs/my/loop/pages").glob("*.html"))
    assert len(list(read_trajectories(Path("my/data")))) == 4


def test_the_judge_of_the_page_is_one() -> None:
    from PIL import Image

    from clvr_train.rewards.combine import Mix

    names: dict = {}
    exec(next(text for _, text in blocks(PAGE.split("## Your own judge")[1])), names)
    judge = names["Bright"]()
    mix = Mix({"bright": (judge.global_score, 1.0)}, {"bright": (judge.edit_score, 1.0)})
    white, black = Image.new("RGB", (64, 64), "white"), Image.new("RGB", (64, 64))
    assert mix.global_score(white, "a").value == 1.0 and mix.global_score(black, "a").value == 0.0
    assert mix.edit_score(black, white, "brighter").missing
