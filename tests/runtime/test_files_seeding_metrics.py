"""Atomic files, seeds by position, and the log of a run."""

import json
import math
import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from clvr_train.runtime.files import publish_folder, write_atomic
from clvr_train.runtime.metrics import Metrics, read_metrics
from clvr_train.runtime.seeding import generator, rng_state, seed, set_rng_state


def test_write_atomic_keeps_the_old_content_when_it_fails(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "a.txt"
    write_atomic(path, "old")

    def fail(*paths: Path) -> None:
        raise OSError("no")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no"):
        write_atomic(path, "new")
    monkeypatch.undo()
    assert path.read_text() == "old"
    write_atomic(path, b"new")
    assert path.read_bytes() == b"new" and [entry.name for entry in tmp_path.iterdir()] == ["a.txt"]


def test_publish_folder_replaces_and_clears(tmp_path: Path) -> None:
    final = tmp_path / "final"
    for content in ("one", "two"):
        staging = tmp_path / "staging"
        (staging / "deep").mkdir(parents=True)
        (staging / "deep" / "file").write_text(content)
        publish_folder(staging, final)
        assert (final / "deep" / "file").read_text() == content
        assert [entry.name for entry in tmp_path.iterdir()] == ["final"]
    with pytest.raises(FileNotFoundError):
        publish_folder(tmp_path / "absent", final)


def test_a_seed_is_a_function_of_the_position() -> None:
    assert seed(0, "trajectory", 1, 2) == seed(0, "trajectory", 1, 2) == 5815472789784902564
    positions = [(0,), ("0",), (0, 0), ("ab", "c"), ("a", "bc"), (0, "ab", "c"), ()]
    assert len({seed(*position) for position in positions}) == len(positions)
    draws = [torch.randn(4, generator=generator("run", 3)) for _ in range(2)]
    assert torch.equal(*draws)
    assert not torch.equal(draws[0], torch.randn(4, generator=generator("run", 4)))
    with pytest.raises(TypeError, match="0.1"):
        seed(0.1)


def test_generators_do_not_touch_the_global_one() -> None:
    torch.manual_seed(0)
    state = torch.get_rng_state()
    torch.randn(3, generator=generator(1))
    assert torch.equal(state, torch.get_rng_state())


def test_the_global_generators_go_on_from_where_they_were() -> None:
    def draw() -> tuple[float, ...]:
        return torch.rand(1).item(), np.random.normal(), random.gauss(0, 1), random.random()

    draw()  # the second of a pair of normals waits in numpy and python
    state = {name: tensor.clone() for name, tensor in rng_state().items()}
    expected = [draw() for _ in range(700)]
    assert set(state) == {"torch", "numpy", "python"}
    set_rng_state(state)
    assert [draw() for _ in range(700)] == expected
    set_rng_state({name: state[name] for name in ("torch", "python")})
    again = draw()
    assert again[0] == expected[0][0] and again[2:] == expected[0][2:] and again[1] != expected[0][1]


def test_metrics_resume_drops_what_will_be_written_again(tmp_path: Path) -> None:
    with Metrics(tmp_path / "run") as metrics:
        for step in range(5):
            metrics.log(step, loss=torch.tensor(step / 3), lr=1e-3)
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')  # a kill in the middle of a line
    assert [row["step"] for row in read_metrics(tmp_path / "run")] == [0, 1, 2, 3, 4]
    with Metrics(tmp_path / "run", resume_step=2) as metrics:
        metrics.log(3, loss=0.5)
    rows = read_metrics(tmp_path / "run")
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert rows[1] == {"step": 1, "loss": float(torch.tensor(1 / 3)), "lr": 1e-3} and rows[3]["loss"] == 0.5
    with Metrics(tmp_path / "run"):
        pass
    assert read_metrics(tmp_path / "run") == []


def test_values_that_are_not_finite_stay_valid_json(tmp_path: Path) -> None:
    with Metrics(tmp_path) as metrics:
        metrics.log(1, loss=float("nan"), norm=float("inf"))
    line = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(line, parse_constant=pytest.fail) == {"step": 1, "loss": None, "norm": None}
    assert math.isnan(read_metrics(tmp_path)[0]["loss"])


def test_a_damaged_log_is_named_by_line(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"loss": 1}\n{"step": 2}\n')
    with pytest.raises(ValueError, match="metrics.jsonl:2: step"):
        read_metrics(tmp_path)
    with pytest.raises(FileNotFoundError, match="absent"):
        read_metrics(tmp_path / "absent")
    with pytest.raises(RuntimeError, match="outside of"):
        Metrics(tmp_path).log(1, loss=0.0)
