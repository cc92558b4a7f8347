"""Launch scripts: what they would run, and torchrun for real with two processes on a CPU."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from clvr_train.runtime.metrics import read_metrics

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
SCRIPTS = sorted([*(ROOT / "launch").glob("*.sh"), *(ROOT / "launch").glob("*.sbatch")])


def run(script, *words, **variables):
    """The script with a `nvidia-smi` and a `scontrol` that the test chooses, if any."""
    environment = {"PATH": f"{BIN}:{os.environ['PATH']}", "HOME": "/nowhere"} | variables
    command = ["bash", str(ROOT / "launch" / script), *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def words_of(result):
    assert result.returncode == 0, result.stderr
    return result.stdout.split()


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_finds_nothing(script):
    done = subprocess.run([BIN / "shellcheck", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert "set -euo pipefail" in script.read_text()


def program(folder, name, text):
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
    (folder / name).chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


def test_torchrun_takes_the_gpus_that_are_there(tmp_path):
    path = program(tmp_path / "bin", "nvidia-smi", "printf 'GPU 0\\nGPU 1\\nGPU 2\\n'")
    found = words_of(run("torchrun.sh", "train_dit", "experiment=klein_4b_sft", DRY_RUN="1", PATH=path))
    assert found[:4] == ["torchrun", "--standalone", "--nproc_per_node", "3"]
    assert found[4:] == ["--shutdown-timeout", "280", "recipes/train_dit.py", "experiment=klein_4b_sft"]
    chosen = words_of(run("torchrun.sh", "train_dit", DRY_RUN="1", PATH=path, CUDA_VISIBLE_DEVICES="0,2"))
    assert chosen[3] == "2"
    assert words_of(run("torchrun.sh", "train_dit", DRY_RUN="1", PROCESSES="5"))[3] == "5"
    if not shutil.which("nvidia-smi"):
        assert words_of(run("torchrun.sh", "train_dit", DRY_RUN="1"))[3] == "1"


def test_slurm_meets_at_the_first_node(tmp_path):
    path = program(tmp_path / "bin", "scontrol", "printf 'node7\\nnode8\\n'")
    job = {"SLURM_JOB_NODELIST": "node[7-8]", "SLURM_JOB_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "4"}
    job |= {"SLURM_JOB_ID": "31", "SLURM_SUBMIT_DIR": str(ROOT)}
    found = words_of(run("slurm.sbatch", "train_dit", "run=x", DRY_RUN="1", PATH=path, **job))
    assert found == ["torchrun", "--nnodes", "2", "--nproc_per_node", "4", "--shutdown-timeout", "280",
                     "--rdzv_backend", "c10d", "--rdzv_id", "31", "--rdzv_endpoint", "node7:29500",
                     "recipes/train_dit.py", "run=x"]  # fmt: skip


def test_slurm_queues_a_job_again_that_was_asked_to_end(tmp_path):
    """`srun` is a real process that gets SIGTERM and takes its time; then the job is queued again."""
    folder = tmp_path / "bin"
    program(folder, "scontrol", f'[[ $1 == show ]] && echo localhost || echo "$@" >>{tmp_path}/requeued')
    saving = f"trap 'echo saved >{tmp_path}/saved; exit 143' TERM"
    path = program(folder, "srun", f"{saving}; touch {tmp_path}/up; sleep 60 & wait")
    environment = {"PATH": path, "HOME": "/nowhere", "SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_ID": "31"}
    job = subprocess.Popen(["bash", str(ROOT / "launch" / "slurm.sbatch"), "train_dit"], env=environment)
    while not (tmp_path / "up").exists():
        assert job.poll() is None
    job.terminate()
    assert job.wait(timeout=30) == 0
    assert (tmp_path / "saved").exists() and (tmp_path / "requeued").read_text() == "requeue 31\n"


@pytest.mark.parametrize("script", ["torchrun.sh", "slurm.sbatch"])
def test_an_unknown_recipe_is_refused(script):
    result = run(script, "train_all", DRY_RUN="1", SLURM_SUBMIT_DIR=str(ROOT))
    assert result.returncode == 1 and "error: recipes/train_all.py: no such recipe" in result.stderr


def test_torchrun_for_real(tmp_path):
    """Two processes train; the run lies below the project's folder, as it would for everyone."""
    name = f"test_launch_{os.getpid()}"
    try:
        result = run("torchrun.sh", "train_dit", "experiment=shapes_sft", "engine=ddp", f"run={name}", "train.steps=2",
                     "data.folder=null", "data.direct=false", "data.captions=8", "train.batch=4", "train.log_every=1",
                     PROCESSES="2", CUDA_VISIBLE_DEVICES="")  # fmt: skip
        assert result.returncode == 0, result.stderr[-2000:]
        assert [row["step"] for row in read_metrics(ROOT / "runs" / name)] == [1, 2]
    finally:
        shutil.rmtree(ROOT / "runs" / name, ignore_errors=True)
