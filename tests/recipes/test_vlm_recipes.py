"""train_vlm and run_closed_loop run whole, on tiny models; bad input ends in one line."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch

from clvr_train.data.sharegpt import write_trajectories
from clvr_train.models.qwen_vl import load_vlm
from clvr_train.runtime.metrics import read_metrics
from clvr_train.shapes.controller import make_trajectories
from recipes.plan import main as plan
from recipes.run_closed_loop import main as run_closed_loop
from recipes.train_vlm import main as train_vlm
from tests.logs import unmeasured
from tests.recipes.conftest import ROOT, command


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
    rows = read_metrics(run)
    assert [row["step"] for row in rows] == [2, 4] and {"loss", "lr", "grad_norm", "skipped"} <= rows[0].keys()
    weights = (run / "model/model.safetensors").read_bytes()
    train_vlm([*TRAIN, "run=made"])
    assert (run / "model/model.safetensors").read_bytes() == weights


def test_validation_shortening_tokens_and_frozen_tower_by_keys(
    place: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(place)
    with caplog.at_level("WARNING"):
        train_vlm([*TRAIN, "run=keys", "validation.folder=data", "validation.num=2", "validation.every=3",
                   "validation.max_new_tokens=4", "train.max_length=120", "train.too_long=shorten",
                   "train.vision=false", "controller.image_tokens=8", "engine.checkpointing=selective",
                   "engine.precision=bf16", "train.save_precision=bf16"])  # fmt: skip
    assert "longer than train.max_length=120" in caplog.text and "turns are lost" in caplog.text
    rows = read_metrics(place / "runs/keys")
    assert [(row["step"], "val_action" in row) for row in rows] == [(2, False), (3, True), (4, True), (4, False)]
    before, _ = load_vlm(place / "runs/keys/untrained")
    after, processor = load_vlm(place / "runs/keys/model", dtype=None)
    assert after.dtype == torch.bfloat16 and len(processor.tokenizer("<IMG_GEN_8>")["input_ids"]) == 1
    tower = [dict(model.model.visual.named_parameters()) for model in (before, after)]
    assert all(torch.equal(p.bfloat16(), tower[1][name]) for name, p in tower[0].items())


@pytest.mark.slow
def test_sigterm_saves_and_the_next_command_ends_as_if_it_had_not_come(place: Path, run_recipe) -> None:
    arguments = [*TRAIN, "train.log_every=1", "train.steps=20", "train.save_every=1000"]
    run = place / "runs/asked"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # sums depend on it
    with subprocess.Popen(
        command("train_vlm", *arguments, "run=asked"), cwd=place, env=environment, stderr=subprocess.PIPE
    ) as process:
        deadline = time.monotonic() + 120
        while not (run / "metrics.jsonl").exists() or len(read_metrics(run)) < 3:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 143 and b"run the same command again" in errors
    assert not (run / "model").exists()
    (step,) = (int(path.name.removeprefix("step-")) for path in (run / "checkpoints").glob("step-*"))
    assert 3 <= step < 20 and len(read_metrics(run)) == step
    run_recipe(place, "train_vlm", *arguments, "run=asked")
    run_recipe(place, "train_vlm", *arguments, "run=calm")
    models = [(place / "runs" / name / "model/model.safetensors").read_bytes() for name in ("asked", "calm")]
    assert models[0] == models[1]
    assert unmeasured(read_metrics(run)) == unmeasured(read_metrics(place / "runs/calm"))


def test_the_papers_settings_are_planned_and_run_on_a_cpu_with_one_override(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(place)
    plan(["experiment=qwen3vl_8b_sft", "format=json"])
    found = json.loads(capsys.readouterr().out)
    assert found["fits"] and found["trained_parameters"] > 8.7e9
    settings = {"engine": "zero2", "gpus": 8, "precision": "bf16", "micro_batch": 1, "batch": 64}
    assert settings.items() <= found["settings"].items()
    (place / "models").symlink_to(ROOT / "models")
    train_vlm(["experiment=qwen3vl_8b_sft", "tiny=shapes_controller"])
    run = place / "runs/qwen3vl_8b_sft/shapes"
    validated = [row for row in read_metrics(run) if "val_loss" in row]
    assert [row["step"] for row in validated] == [2, 4]
    assert validated[-1]["val_parsed"] > 0.7  # the controller that ships speaks the protocol
    assert load_vlm(run / "model", dtype=None)[0].dtype == torch.bfloat16


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
    assert all(row["stop_reason"] and row["images"] <= 8 and row["turn_seconds"] for row in rows)
    pages = sorted((place / "runs/loop/pages").iterdir())
    assert [page.stem for page in pages] == [row["id"] for row in rows]
    assert "<title>two squares</title>" in pages[1].read_text() and "malformed" in pages[1].read_text()
    assert (place / "runs/loop/trajectories.jsonl").exists()


@pytest.mark.parametrize("command, arguments, message", [
    (train_vlm, ["controller.folder=none"], "none/config.json: no such file"),
    (train_vlm, ["controller.folder=data"], "data/config.json: no such file"),
    (train_vlm, ["data.folder=none"], "none/trajectories.jsonl: no such file"),
    (train_vlm, ["data.folder=broken"], "broken/trajectories.jsonl:1: images[1]: "),
    (train_vlm, ["train.batch=6"], "batch=6: must be a multiple"),
    (train_vlm, ["engine.precision=fp8"], "engine.precision='fp8' is not one of fp32, bf16"),
    (train_vlm, ["engine.compile=true"], "engine.compile=true: trajectories have all lengths"),
    (train_vlm, ["engine.checkpointing=half"], "checkpointing='half' is not one of none, selective, full"),
    (train_vlm, ["controller.device=gpu"], "controller.device='gpu' is not one of cpu, cuda, auto"),
    (train_vlm, ["controller.image_tokens=1"], "images: controller.image_tokens=1"),
    (train_vlm, ["train.max_length=9", "train.too_long=shorten"], "no trajectory fits 9 tokens"),
    (train_vlm, ["train.max_length=90"], "tokens, 90 are allowed; raise max_length"),
    (train_vlm, ["train.too_long=cut", "train.max_length=90"], "too_long='cut' is not one of refuse, shorten"),
    (train_vlm, ["train.save_precision=fp8"], "train.save_precision='fp8' is not one of fp32, bf16"),
    (train_vlm, ["validation.folder=none"], "none/trajectories.jsonl: no such file"),
    (train_vlm, ["train.step=3"], "did you mean 'train.steps'"),
    (run_closed_loop, ["controller.folder=x"], "there is no goal"),
    (run_closed_loop, ["controller.folder=x", "goals_file=none.txt"], "none.txt"),
    (run_closed_loop, ["controller.folder=x", "goals_file=long.txt"], "long.txt:2: a goal of 10,000,000 characters"),
    (run_closed_loop, ["controller.folder=x", "goals=[y]", "max_nfe=0"], "max_nfe=0: must be at least 1"),
    (run_closed_loop, ["controller.folder=x", "goals=[y]"], "x/config.json: no such file"),
    (run_closed_loop, ["controller.folder=x", "goals=['<image>']"], "goals[0]: goal: the goal holds <image>"),
    (run_closed_loop, ["controller.folder=x", "goals_file=empty.txt"], "there is no goal"),
    (run_closed_loop, ["goals=[y]"], "give controller.folder=FOLDER, or controller.url=URL"),
    (run_closed_loop, ["goals=[y]", "controller.folder=x", "controller.url=http://x/v1"], "give controller.folder="),
    (run_closed_loop, ["goals=[y]", "controller.url=http://x/v1"], "the name under which the server knows the model"),
    (run_closed_loop, ["goals=[y]", "controller.url=ftp://x", "controller.model=m"], "url: http://host:port/v1 or"),
    (run_closed_loop, ["goals=[y]", "controller.folder=x", "controller.precision=fp8"], "'fp8' is not one of fp32"),
])
def test_bad_input_is_one_line(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, command, arguments, message
) -> None:
    monkeypatch.chdir(place)
    broken = place / "broken"
    if not broken.exists():
        write_trajectories(broken, make_trajectories(1, 0, "train"))
        next((broken / "images").iterdir()).unlink()
        (place / "long.txt").write_text("a goal\n" + "x" * 10_000_000)
        (place / "empty.txt").write_text("")
    first = TRAIN if command is train_vlm else []
    with pytest.raises(SystemExit) as end:
        command([*first, "run=bad", *arguments])
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert end.value.code == 1 and len(lines) == 1 and message in lines[0]
    assert not (place / "runs/bad/model").exists()
    (place / "runs/bad/config.yaml").unlink(missing_ok=True)
