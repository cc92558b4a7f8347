"""train_vlm and run_closed_loop run whole, on tiny models; bad input ends in one line."""

import json
from pathlib import Path

import pytest

from clvr_train.data.sharegpt import write_trajectories
from clvr_train.runtime.metrics import read_metrics
from clvr_train.shapes.controller import make_trajectories
from recipes.run_closed_loop import main as run_closed_loop
from recipes.train_vlm import main as train_vlm


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A working folder with data, and a controller made by the recipe itself."""
    place = tmp_path_factory.mktemp("place")
    write_trajectories(place / "data", make_trajectories(24, 0, "train"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        train_vlm([*TRAIN, "run=made"])
    return place


TRAIN = ["controller.folder=untrained", "controller.width=64", "controller.layers=2", "data.folder=data",
         "train.steps=4", "train.batch=4", "train.micro_batch=4", "train.lr=2e-3", "train.log_every=2"]  # fmt: skip


def test_train_vlm_makes_a_run_and_goes_on_after_it(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    run = place / "runs/made"
    assert {"config.yaml", "metrics.jsonl", "checkpoints", "model"} <= {path.name for path in run.iterdir()}
    assert [row["step"] for row in read_metrics(run)] == [2, 4]
    weights = (run / "model/model.safetensors").read_bytes()
    train_vlm([*TRAIN, "run=made"])
    assert (run / "model/model.safetensors").read_bytes() == weights


def test_run_closed_loop_writes_a_row_for_every_goal(
    place: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    (place / "goals.txt").write_text("two squares\n\nthree circles , none of them red\n")
    run_closed_loop(["run=loop", "goals=[a red circle]", "goals_file=goals.txt", "controller.folder=runs/made/model",
                     "controller.max_new_tokens=8", f"model.folder={tiny_folder}", "model.window=48",
                     "cfg=4", "steps=1"])  # fmt: skip
    rows = json.loads((place / "runs/loop/closed_loop.json").read_text())
    assert [row["goal"] for row in rows] == ["a red circle", "two squares", "three circles , none of them red"]
    assert all(row["stop_reason"] and row["images"] <= 8 for row in rows)
    assert (place / "runs/loop/trajectories.jsonl").exists()


@pytest.mark.parametrize("command, arguments, message", [
    (train_vlm, ["controller.folder=none"], "none/config.json: no such file"),
    (train_vlm, ["controller.folder=data"], "data/config.json: no such file"),
    (train_vlm, ["data.folder=none"], "none/trajectories.jsonl: no such file"),
    (train_vlm, ["data.folder=broken"], "broken/trajectories.jsonl:1: images[1]: "),
    (train_vlm, ["train.batch=6"], "batch=6: must be a multiple"),
    (train_vlm, ["controller.precision=fp8"], "controller.precision='fp8' is not one of fp32, bf16"),
    (train_vlm, ["train.step=3"], "did you mean 'train.steps'"),
    (run_closed_loop, ["controller.folder=x"], "there is no goal"),
    (run_closed_loop, ["controller.folder=x", "goals_file=none.txt"], "none.txt"),
    (run_closed_loop, ["controller.folder=x", "goals=[y]"], "x/config.json: no such file"),
])
def test_bad_input_is_one_line(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, command, arguments, message
) -> None:
    monkeypatch.chdir(place)
    broken = place / "broken"
    if not broken.exists():
        write_trajectories(broken, make_trajectories(1, 0, "train"))
        next((broken / "images").iterdir()).unlink()
    first = TRAIN if command is train_vlm else []
    with pytest.raises(SystemExit) as end:
        command([*first, "run=bad", *arguments])
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert end.value.code == 1 and len(lines) == 1 and message in lines[0]
    assert not (place / "runs/bad/model").exists()
    (place / "runs/bad/config.yaml").unlink(missing_ok=True)
