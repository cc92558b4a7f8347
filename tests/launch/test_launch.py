"""Launch scripts: what they would run, and torchrun for real with two processes on a CPU."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hydra._internal.utils import get_args_parser
from omegaconf import OmegaConf

from clvr_train.runtime.metrics import read_metrics
from recipes._config import check_command
from recipes._recipe import CONF

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


def test_a_sweep_starts_torchrun_itself():
    found = words_of(run("torchrun.sh", "train_dit", "-m", "seed=0,1", DRY_RUN="1", PROCESSES="4"))
    assert found == ["python", "recipes/train_dit.py", "-m", "seed=0\\,1", "sweep.nproc=4"]


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


def recipe_lines(text):
    """(recipe, overrides) of every command of a dry run."""
    found = [re.search(r"\brecipes/(\w+)\.py ?(.*)", line) for line in text.splitlines()]
    return [(match[1], shlex.split(match[2])) for match in found if match]


@pytest.mark.parametrize("servers", ["split", "share"])
def test_the_pipeline_says_what_it_would_run(servers):
    """Every recipe's line composes, so that a misspelt key is found here and not after days."""
    done = run("pipeline_klein_4b.sh", DRY_RUN="1", SERVERS=servers)
    assert done.returncode == 0, done.stderr
    lines = recipe_lines(done.stdout)
    names = [name for name, _ in lines if name != "evaluate"]
    assert names == ["doctor", "validate_data", "validate_data", "train_dit", "train_vlm", "make_proxy_prompts",
                     "train_pprl", "merge_weights", "run_closed_loop", "report"]  # fmt: skip
    for name, words in lines if servers == "split" else ():
        args = get_args_parser().parse_intermixed_args(words)
        (cfg,) = check_command(name, CONF, args.overrides)
        assert not OmegaConf.missing_keys(cfg), (name, OmegaConf.missing_keys(cfg))
    served = [line for line in done.stdout.splitlines() if " vllm serve " in line]
    places = [re.search(r"VISIBLE_DEVICES=(\S+).*--port (\d+).*utilization (\S+)", line).groups() for line in served]
    assert places == {
        "split": [("0\\,1\\,2\\,3", "8082", "0.90"), ("6", "8080", "0.90"), ("7", "8081", "0.90")],
        "share": [("6\\,7", "8082", "0.90"), ("6\\,7", "8080", "0.45"), ("6\\,7", "8081", "0.45")],
    }[servers]


def test_the_pipeline_refuses_what_it_cannot_run(tmp_path):
    shutil.copytree(ROOT / "launch", tmp_path / "launch")
    said = [({}, "error: data/train: not found"), ({"SERVERS": "some"}, "error: SERVERS=some is not one")]
    for variables, message in said:
        command = ["bash", str(tmp_path / "launch/pipeline_klein_4b.sh")]
        done = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True, timeout=60)
        assert done.returncode == 1 and done.stderr.startswith(message)
    assert not (tmp_path / "runs").exists()


@pytest.fixture
def pipeline(tmp_path):
    """pipeline(FAIL=word) -> (the recipes that it started, each with the ports that were served then; exit status).

    The programs that it calls are stand-ins which note that they were; the one whose command has the word fails.
    """
    shutil.copytree(ROOT / "launch", tmp_path / "launch")
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes", ignore=shutil.ignore_patterns("__pycache__"))
    note = 'echo "$(ls up 2>/dev/null | xargs) $*" >>notes; [[ -z ${FAIL:-} || $* != *$FAIL* ]]'
    program(tmp_path / "bin", "python", note)
    program(tmp_path / "bin", "torchrun", note)
    up = "port=$(sed 's/.*--port \\([0-9]*\\).*/\\1/' <<<\"$*\"); mkdir -p up; touch up/$port"
    up = f"[[ -z ${{NO_SERVER:-}} ]] || exit 1; {up}"
    program(tmp_path / "bin", "vllm", f"{up}; trap 'rm up/$port; exit' TERM; sleep 100 & wait")
    path = program(tmp_path / "bin", "curl", "port=${*: -1}; port=${port#*:*:}; [[ -e up/${port%%/*} ]]")
    names = ("DATA", "HELD_OUT", "GOALS", "GENEVAL", "BASE", "DISTILLED", "QWEN")

    def go(**variables):
        (tmp_path / "notes").write_text("")
        environment = os.environ | {"PATH": path} | dict.fromkeys(names, "launch") | variables
        command = ["bash", str(tmp_path / "launch/pipeline_klein_4b.sh")]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
        notes = (tmp_path / "notes").read_text().splitlines()
        lines = [re.fullmatch(r"([\d ]*) .*?recipes/(\w+)\.py.*", line) for line in notes]
        assert not list((tmp_path / "up").glob("*")), "no server is left"
        return [(match[2], match[1]) for match in lines], done.returncode

    return go


def test_the_pipeline_goes_on_where_it_stopped(pipeline):
    first, status = pipeline(FAIL="train_pprl")
    assert status != 0
    assert first[-2:] == [("make_proxy_prompts", "8082"), ("train_pprl", "8080 8081")]
    second, status = pipeline()
    assert status == 0
    assert second[:3] == [("train_pprl", "8080 8081"), ("merge_weights", ""), ("run_closed_loop", "")]
    assert pipeline() == ([], 0)


def test_the_pipeline_ends_with_a_server_that_ends(pipeline):
    lines, status = pipeline(NO_SERVER="1")
    assert status == 1 and lines[-1][0] == "train_vlm", "no prompts are asked for"


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
