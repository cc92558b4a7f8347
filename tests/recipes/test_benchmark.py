"""The benchmark runs whole on few files; its numbers are not judged here, only that they are what they say."""

import json
from pathlib import Path

import pytest
import torch

from recipes._bench import Row, table
from recipes._bench_vlm import random_inputs, random_model
from recipes.benchmark import main

SMALL = ["data.files=4", "data.side_px=96", "data.size_px=64", "data.pairs=1", "data.memory_mib=2"]
SMALL += ["data.samples=4", "data.batch=2"]


def test_a_goal_is_met_or_missed_or_not_there():
    rows = [Row("a", 0.95, "", at_least=0.9), Row("b", 2.0, "s", at_most=1.5), Row("c", 3.0, "us")]
    assert [row.met for row in rows] == [True, False, None]
    assert table(rows).splitlines()[2:] == [
        "| a | 0.95  | >= 0.9 | yes |",
        "| b | 2 s | <= 1.5 | no |",
        "| c | 3 us |  |  |",
    ]


def test_the_data_benchmark_writes_its_report(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    caplog.set_level("INFO")
    main(["experiment=bench_data", "run=bench", *SMALL])
    report = json.loads((tmp_path / "runs/bench/benchmark.json").read_text())
    rows = {row["name"]: row for row in report["rows"]}
    assert report["bench"] == "data" and report["machine"]["cores"] >= 1
    assert {name for name, row in rows.items() if row["met"] is not None} == {
        "loader over bare Pillow per core, 0 workers",
        "loader over bare Pillow per core, 1 workers",
        "resume at ten million samples over resume at ten",
    }
    assert all(row["value"] >= 0 for row in rows.values())
    assert sum("peak memory" in name for name in rows) == 3
    assert "| loader over bare Pillow per core, 0 workers |" in caplog.text


def test_the_benchmark_of_saves_leaves_its_report_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main(["bench=checkpoint", "run=bench", "checkpoint.mib=1", "checkpoint.tensors=4", "checkpoint.pairs=2"])
    rows = json.loads((tmp_path / "runs/bench/benchmark.json").read_text())["rows"]
    assert [row["at_most"] for row in rows] == [None, None, 0.2, 0.2] and all(row["value"] > 0 for row in rows)
    left = sorted(path.name for path in (tmp_path / "runs/bench").iterdir())
    assert left == [".lock", "benchmark.json", "config.yaml"]


BASE = f"model.folder={Path(__file__).resolve().parents[2] / 'models/shapes/base'}"


def rows_of(folder, *arguments):
    main([*arguments, "run=bench", BASE])
    report = json.loads((folder / "runs/bench/benchmark.json").read_text())
    assert report["machine"]["device"] == "cpu"
    return {row["name"]: row for row in report["rows"]}


def test_the_benchmark_of_steps_counts_what_the_plan_says(tmp_path, monkeypatch):
    """References and two micro-batches, one of them short."""
    monkeypatch.chdir(tmp_path)
    small = ["sft.batch=3", "sft.micro_batch=2", "sft.references=2", "sft.pairs=1", "sft.warmup=1"]
    rows = rows_of(tmp_path, "experiment=bench_sft", *small)
    counts = {name: row["met"] for name, row in rows.items() if "counted beyond the plan" in name}
    assert len(counts) == 6 and all(counts.values())
    assert rows["framework step over bare step"]["at_most"] == 1.05
    assert 0 < rows["cached step over uncached step"]["value"] < 1


def test_the_benchmark_of_klein_runs_on_a_cpu_with_the_tiny_model_swapped_in(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = ["sft.batch=2", "sft.micro_batch=2", "sft.warmup=1", "sft.steps=1", "engine.compile=false"]
    rows = rows_of(tmp_path, "experiment=bench_sft_klein_4b", "model=shapes", *small)
    assert all(row["value"] > 0 for row in rows.values())
    step = rows["seconds of a step"]["value"]
    assert rows["samples a second"]["value"] == pytest.approx(2 / step)
    assert rows["bare step that encodes, as in diffusers over a step"]["at_least"] == 1.5
    assert not any("MFU" in name or "memory" in name for name in rows), "a CPU has neither"


def test_the_benchmark_of_the_controller_runs_on_a_cpu_with_the_tiny_one_swapped_in(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = ["vlm.tokens=256", "vlm.image_px=[96,64]", "vlm.batch=2", "vlm.warmup=1", "vlm.steps=1"]
    folder = Path(__file__).resolve().parents[2] / "models/shapes/controller"
    rows = rows_of(tmp_path, "experiment=bench_sft_qwen3vl_8b", f"vlm.folder={folder}", *small)
    step = rows["seconds of a step"]["value"]
    assert rows["tokens a second"]["value"] == pytest.approx(2 * 256 / step)
    assert not any("MFU" in name or "memory" in name for name in rows), "a CPU has neither"


def test_the_benchmark_of_rollouts_runs_on_a_cpu_with_the_tiny_model_swapped_in(tmp_path, monkeypatch):
    """A reference, two forwards for a group, and as many network evaluations as planned."""
    monkeypatch.chdir(tmp_path)
    small = ["group_size=3", "batch=2", "steps=2", "micro_batch=4", "warmup=0", "pairs=1", "references=1"]
    rows = rows_of(tmp_path, "experiment=bench_pprl_klein_4b", "model=shapes", *(f"pprl.{key}" for key in small))
    counts = {name: row["met"] for name, row in rows.items() if "counted beyond the plan" in name}
    assert len(counts) == 7 and all(counts.values())
    speeds = {name: row["value"] for name, row in rows.items() if name not in counts}
    assert len(speeds) == 6 and all(value > 0 for value in speeds.values())
    assert rows["rollout, images a second"]["at_least"] == 2.4
    assert rows["rollout over the pipeline"]["at_least"] == 1.5
    assert rows["update, images a second at 2 times"]["at_least"] == 4.0


def test_what_the_benchmark_of_the_controller_feeds_it_is_what_it_says():
    model = random_model(str(Path(__file__).resolve().parents[2] / "models/shapes/controller"), torch.float32,
                         torch.device("cpu"))  # fmt: skip
    (row,) = random_inputs(model, 1, 100, 2, (96, 64))
    assert row["input_ids"].shape == (1, 100) and row["image_grid_thw"].tolist() == [[1, 6, 4]] * 2
    assert (row["input_ids"] == model.config.image_token_id).sum() == 12 == row["mm_token_type_ids"].sum()
    assert 15 < (row["labels"] != -100).sum() < 26
    with torch.no_grad():
        assert model(**row).loss.isfinite()
    with pytest.raises(ValueError, match="vlm.tokens=10: 2 images of 96 x 64 px do not fit"):
        random_inputs(model, 1, 10, 2, (96, 64))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("bench=speed", "is not one of data, sft, sft_klein, pprl, vlm"),
        ("data.samples=1", "one batch"),
    ],
)
def test_what_cannot_be_measured_is_refused(tmp_path, monkeypatch, capsys, override, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        main([override])
    text = capsys.readouterr().err
    assert text.startswith("error: ") and message in text
