"""Damaged pixels: every training refuses the record at its start, counts it, and trains on the rest."""

import json
import logging
import shutil
from importlib import import_module
from pathlib import Path

import pytest

from clvr_train.runtime.metrics import read_metrics
from tests.recipes.conftest import TINY

COMMANDS = {
    "train_dit": ["model.folder=base", *TINY, "train.steps=1", "train.batch=2", "train.log_every=1"],
    "train_pprl": ["model.folder=base", *TINY, "reward=simple", "pprl.epochs=1", "rollout.groups=2",
                   "rollout.group_size=2", "rollout.steps=2", "rollout.cfg=1"],
    "train_vlm": ["controller.folder=untrained", "controller.width=64", "controller.layers=2", "train.steps=1",
                  "train.batch=1", "train.log_every=1"],
}  # fmt: skip


@pytest.fixture(scope="module")
def bad(world: Path) -> str:
    """Of the 24 trajectories the second has a last image that is cut off behind its header."""
    shutil.copytree(world / "runs" / "data", world / "bad")
    record = json.loads((world / "bad" / "trajectories.jsonl").read_text().splitlines()[1])
    damaged = world / "bad" / record["images"][-1]
    damaged.write_bytes(damaged.read_bytes()[:150])
    return f"bad/trajectories.jsonl:2: images[{len(record['images'])}]: bad/{record['images'][-1]}: unreadable image"


@pytest.mark.parametrize("recipe", COMMANDS)
def test_damaged_pixels_are_found_at_the_start(
    world: Path, bad: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, caplog, recipe: str
) -> None:
    monkeypatch.chdir(world)
    main, common = import_module(f"recipes.{recipe}").main, [*COMMANDS[recipe], "data.folder=bad", f"run=bad_{recipe}"]
    with pytest.raises(SystemExit) as end:
        main(common)
    assert end.value.code == 1 and capsys.readouterr().err.splitlines()[-1].startswith(f"error: {bad}")
    with caplog.at_level(logging.INFO):
        main([*common, "data.max_refused=0.05"])
    said = [record.getMessage() for record in caplog.records]
    assert any(line.startswith(f"refused: {bad}") for line in said) and "bad: 1 of 24 records refused" in said
    rows = read_metrics(world / "runs" / f"bad_{recipe}")
    assert len(rows) == 1 and (recipe != "train_dit" or rows[0]["refused"] == 1)
