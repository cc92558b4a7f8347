"""Sweeps: the table at the end, jobs that fail, jobs of several processes, jobs of a launcher."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import DictConfig

from recipes._recipe import recipe, run_folder
from recipes._sweep import Sweep, values

ROOT = Path(__file__).resolve().parents[2]
CONF = "defaults: [_self_, {experiment: null}]\nrun: tiny\nlr: 0.1\nseed: 0\nbad: null\n"
SCRIPT = """
'''Logs a loss that comes down by lr a step.'''
import json, os, signal, sys, time
from pathlib import Path
from recipes._recipe import recipe, run_folder

@recipe("tiny", conf=Path("conf").absolute())
def main(cfg):
    rank = os.environ.get("RANK", "-")
    if cfg.bad == cfg.lr:
        sys.stderr.write("a bar |####|\\r")
        raise ValueError(f"data.jsonl:3: goal: too good for {cfg.lr}")
    if cfg.bad == "wait":
        Path(f"ready-{rank}").touch()
        time.sleep(60)
    if rank in "-0":
        rows = [{"step": step, "loss": 1 - step * cfg.lr + 0.1 * (step == 3)} for step in (1, 2, 3)]
        (run_folder(cfg) / "metrics.jsonl").write_text("".join(json.dumps(row) + "\\n" for row in rows))
    (Path("runs") / f"{cfg.lr}-{cfg.seed}-{rank}-{os.environ.get('WORLD_SIZE')}").touch()

if __name__ == "__main__":
    main()
"""


@pytest.fixture
def conf(tmp_path: Path, monkeypatch) -> Path:
    (tmp_path / "conf" / "experiment").mkdir(parents=True)
    (tmp_path / "conf" / "tiny.yaml").write_text(CONF)
    (tmp_path / "tiny.py").write_text(SCRIPT)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "conf"


@pytest.fixture
def main(conf: Path):
    @recipe("tiny", conf=conf)
    def fn(cfg: DictConfig) -> None:
        if cfg.bad == cfg.lr:
            raise (ValueError if cfg.seed == 0 else KeyError)(f"lr\n{cfg.lr}")
        if cfg.bad == "exit":
            raise SystemExit(3)
        rows = [{"step": k, "loss": loss} for k, loss in enumerate((0.5, cfg.lr, 0.4, None))]
        (run_folder(cfg) / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    return fn


def script(*words: str, **variables: str) -> subprocess.CompletedProcess:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("TORCHELASTIC")}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | variables
    command = [sys.executable, "tiny.py", *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def table(folder: str = "runs/tiny") -> list[list[str]]:
    lines = [line for line in Path(folder, "sweep.md").read_text().splitlines() if line.startswith("| ")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [row for row in rows if set(row) != {"---"}]


def test_a_sweep_ends_with_a_table(main, caplog) -> None:
    with caplog.at_level("INFO"):
        main(["-m", "lr=0.1,0.2", "seed=0,1", "run=base"])
    assert table("runs/base") == [
        ["lr", "seed", "result", "loss last", "loss best"],
        *([lr, seed, "done", "0.4", lr] for lr in ("0.1", "0.2") for seed in "01"),
    ]
    assert Path("runs/base/sweep.md").read_text() in caplog.text
    rows = json.loads(Path("runs/base/sweep.json").read_text())
    assert [row["run"] for row in rows] == [f"base/lr={lr},seed={seed}" for lr in (0.1, 0.2) for seed in (0, 1)]
    assert rows[0]["metrics"] == {"loss": {"last": 0.4, "min": 0.1, "max": 0.5}}


def test_failed_jobs_are_listed_and_stop_no_other(main, capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["-m", "lr=0.1,0.2", "seed=0,1", "bad=0.1"])
    assert stop.value.code == 1
    assert [row[2] for row in table()] == ["result", "failed", "failed", "done", "done"]
    text = Path("runs/tiny/sweep.md").read_text()
    assert text.endswith("2 of 4 jobs failed:\n\n- lr=0.1,seed=0: lr 0.1\n- lr=0.1,seed=1: KeyError: 'lr\\n0.1'\n")
    said = capsys.readouterr().err
    assert "error: [lr=0.1 seed=0] lr 0.1" in said and "Traceback" in said, "a bug shows where it is"


def test_a_job_that_ends_the_process_fails(main) -> None:
    with pytest.raises(SystemExit):
        main(["-m", "lr=0.1", "bad=exit,no"])
    assert json.loads(Path("runs/tiny/sweep.json").read_text())[0]["error"] == "exit status 3"


def test_a_sweep_that_writes_no_runs_writes_no_table(conf: Path) -> None:
    recipe("tiny", conf=conf)(lambda cfg: None)(["-m", "seed=1,2"])
    assert not list(Path("runs").rglob("sweep.*"))


def test_what_an_evaluation_says_is_shown(tmp_path: Path) -> None:
    (tmp_path / "evaluation.json").write_text('{"pass_rate": 0.25, "n": 192, "mode": "single_step", "ci95": [0, 1]}')
    assert values(tmp_path) == {"pass_rate": {"last": 0.25, "min": 0.25, "max": 0.25}}


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["sweep.nproc=2"], "sweep.nproc=2: is of sweeps (-m)"),
        (["-m", "sweep.nproc=0", "seed=1,2"], "sweep.nproc=0: a whole number of at least 1"),
        (["-m", "sweep.nprocs=2", "seed=1,2"], "unknown key 'sweep.nprocs': did you mean 'sweep.nproc'?"),
        (["-m", "sweep.nproc=1,2"], "a whole number of at least 1"),
    ],
)
def test_bad_keys_of_a_sweep_are_refused(main, capsys, words: list[str], part: str) -> None:
    with pytest.raises(SystemExit):
        main(words)
    assert part in capsys.readouterr().err and not Path("runs").exists()


def test_a_sweep_within_torchrun_is_refused(main, capsys, monkeypatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    with pytest.raises(SystemExit):
        main(["-m", "seed=1,2"])
    assert "give its processes as sweep.nproc=N" in capsys.readouterr().err


def test_the_folder_of_jobs_that_name_their_own_runs() -> None:
    assert Sweep([["a=1"], ["a=2"]], ["x/y/a=1", "x/z/a=2"], [], False).folder == Path("runs/x")
    assert Sweep([[]], ["tiny"], [], False).folder == Path("runs/tiny")


@pytest.mark.slow
def test_every_job_is_a_torchrun(conf: Path) -> None:
    done = script("-m", "lr=0.1,0.2", "bad=0.2", "seed=3", "sweep.nproc=2", "run=the run")
    assert done.returncode == 1, done.stderr[-3000:]
    assert table("runs/the run") == [
        ["lr", "result", "loss last", "loss best"],
        ["0.1", "done", "0.8", "0.8"],
        ["0.2", "failed", "", ""],
    ]
    assert "- lr=0.2: data.jsonl:3: goal: too good for 0.2" in Path("runs/the run/sweep.md").read_text()
    assert {path.name for path in Path("runs").glob("0.1-*")} == {"0.1-3-0-2", "0.1-3-1-2"}


@pytest.mark.slow
def test_jobs_of_the_submitit_launcher(conf: Path) -> None:
    """Its local executor; SLURM's differs from it in how a job gets to its machine."""
    done = script("-m", "lr=0.1,0.2,0.3", "bad=0.2", "hydra/launcher=submitit_local", "hydra.launcher.timeout_min=5")
    assert done.returncode == 1, done.stderr[-3000:]
    assert [row[:2] for row in table()[1:]] == [["0.1", "done"], ["0.2", "failed"], ["0.3", "done"]]
    assert "1 of 3 jobs failed:\n\n- lr=0.2: data.jsonl:3: goal: too good for 0.2" in done.stderr
    assert not Path("runs/tiny/multirun.yaml").exists() and not Path("runs/tiny/.sweep").exists()


@pytest.mark.slow
def test_a_sweep_that_is_asked_to_end_hands_it_to_its_job(conf: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "tiny.py", "-m", "seed=0,1", "bad=wait", "sweep.nproc=1"]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    while not Path("ready-0").exists():
        assert process.poll() is None
    process.terminate()
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 143, said
    assert said.count("terminated; run the same command again") == 2, "the job's process and the sweep's"
