"""Use from Python, on the models that ship; encodings of the history are made once."""

import re
from pathlib import Path

import pytest
from PIL import Image

from clvr_train.data.readers import load_trajectories
from clvr_train.inference.__main__ import main
from clvr_train.inference.loop import ClosedLoop
from clvr_train.method.truncation import truncate

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def loop() -> ClosedLoop:
    models = ROOT / "models/shapes"
    return ClosedLoop.load(models / "distilled", models / "controller", size_px=(96, 96), window=96, layers=(1, 2, 3))


def test_three_lines_as_documented(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    text = (ROOT / "docs/closed_loop.md").read_text(encoding="utf-8")
    lines = re.search(r"```python\n(from clvr_train.inference import ClosedLoop\n.*?)```", text, re.DOTALL)[1]
    statements = re.sub(r"\(\n.*?\n\)", "()", lines, flags=re.DOTALL).strip().splitlines()
    assert len(statements) == 3
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").symlink_to(ROOT / "models")
    values: dict = {}
    code = compile(lines, "docs/closed_loop.md", "exec")
    exec(code, values)
    result = values["result"]
    assert isinstance(result.image, Image.Image) and result.image.size == (96, 96)
    assert result.stop_reason and result.trajectory.steps[0].reasoning
    assert result.nfe == 4 * len(result.trajectory.images)


def test_rounds_come_one_by_one_and_end_where_the_whole_does(loop: ClosedLoop) -> None:
    goal = "a green triangle , a blue square and a yellow circle"
    seen = [(len(run.steps), len(run.images), run.stop_reason) for run in loop.rounds(goal, max_rounds=3)]
    assert [steps for steps, _, _ in seen] == list(range(1, len(seen) + 1))
    assert not any(reason for _, _, reason in seen[:-1]) and seen[-1][2]
    whole = loop(goal, max_rounds=3)
    assert whole.stop_reason == seen[-1][2] and len(whole.trajectory.images) == seen[-1][1]


def test_texts_and_references_of_the_history_are_encoded_once(loop: ClosedLoop) -> None:
    """Every image of a history is encoded once, when it is first a reference; every distinct text once."""
    conditioner = loop.sampler.conditioner
    goals = ["three purple squares", "two orange circles and a red triangle , the triangle in the centre"]
    before = conditioner.text_calls, conditioner.image_calls
    results = loop.many(goals, max_rounds=4, verify_every=2)
    samples = [sample for result in results for sample in truncate(result.trajectory)]
    texts = {(sample.goal, sample.reasonings) for sample in samples}
    references = {id(image) for sample in samples for image in sample.references}
    uses = sum(len(sample.references) for sample in samples)
    assert uses > len(references) > 0, "some image is a reference more than once"
    assert conditioner.text_calls - before[0] == len(texts)
    assert conditioner.image_calls - before[1] == len(references)


@pytest.mark.parametrize("goal, budget, message", [
    ("", {}, "the goal is empty"),
    ("x" * 20_001, {}, "a goal of 20,001 characters"),
    ("a <IMG_GEN_1>", {}, "the goal holds <IMG_GEN_n>"),
    ("a \ud800", {}, "half a surrogate pair"),
    ("a circle", {"max_nfe": 3}, "max_nfe=3: an image takes 4 network evaluations"),
    ("a circle", {"max_rounds": 0}, "max_rounds=0"),
])
def test_what_cannot_be_drawn_is_refused(loop: ClosedLoop, goal: str, budget: dict, message: str) -> None:
    for draw in (loop, lambda goal, **budget: next(loop.rounds(goal, **budget))):
        with pytest.raises(ValueError, match=message):
            draw(goal, **budget)


def test_loading_says_what_is_missing() -> None:
    models = ROOT / "models/shapes"
    for arguments, options, message in (
        ((models / "distilled", "none"), {}, "none/config.json: no such file"),
        ((models / "distilled", "http://127.0.0.1:9/v1"), {}, "the name under which the server knows the model"),
        ((models / "distilled", models / "controller"), {"precision": "fp8"}, "precision='fp8'"),
        ((models / "distilled", models / "controller"), {"key_env": "KEY"}, "a folder, and key_env is of a chat"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            ClosedLoop.load(*arguments, **options)


def test_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    models = ROOT / "models/shapes"
    command = ["--model", str(models / "distilled"), "--controller", str(models / "controller"), "--size", "96", "96",
               "--window", "96", "--layers", "1", "2", "3", "--out", str(tmp_path / "out"),
               "--max-rounds", "1"]  # fmt: skip
    assert main([*command, "a red circle", "two squares"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and re.match(r"a red circle: max_rounds, 1 images, 4 NFEs, [\d.]+ s", lines[0])
    assert [each.goal for each in load_trajectories(tmp_path / "out")] == ["a red circle", "two squares"]
    assert main([*command, "a <image>"]) == 1
    assert capsys.readouterr().err == "error: goal: the goal holds <image>; images follow the round that drew them\n"
