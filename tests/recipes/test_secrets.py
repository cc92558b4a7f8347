"""Recipes run with secrets in the environment, in overrides and in errors: none is in what they write or say."""

import os
import subprocess
import sys
from pathlib import Path

from tests.recipes.conftest import ROOT, command

SECRETS = {
    "HF_TOKEN": "hf_QxVdLmPzRtYwKsBnGhJf0123456789",
    "OPENAI_API_KEY": "sk-proj-Zx9Yw8Vu7Ts6Rq5Po4Nm3Lk2",
    "WANDB_API_KEY": "7f3c" * 10,
    "CORRECT_SECRET": "horse-battery-staple",
}
USER = "somebody:unguessable"
BROKEN = """
import logging, warnings
from recipes._recipe import recipe, run_folder

@recipe("tiny", conf=__import__("pathlib").Path("conf").absolute())
def main(cfg):
    run_folder(cfg)
    logging.getLogger("some.library").warning("the answer to %s was 401", cfg.text)
    try:
        {}[cfg.text]
    except KeyError:
        logging.exception("no such thing")
    raise KeyError(cfg.text)

main()
"""
SFT = ["experiment=shapes_sft", "model.folder=base", "data.folder=runs/data", "data.limit=8", "train.steps=2",
       "train.batch=4", "train.save_every=1", "train.log_every=1", "logger=wandb"]  # fmt: skip


def run(folder: Path, *words: str) -> subprocess.CompletedProcess:
    mine = {"WANDB_MODE": "offline", "CLVR_TRACEBACK": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    environment = os.environ | SECRETS | mine | {"TOKENIZERS_PARALLELISM": "false"}
    return subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


def assert_none_in(text: bytes, where: object) -> None:
    for secret in (*SECRETS.values(), *USER.split(":")):
        assert secret.encode() not in text, f"{secret} in {where}"


def assert_none_is_left(folder: Path, result: subprocess.CompletedProcess) -> None:
    assert_none_in(result.stderr.encode(), result.stderr[-3000:])
    assert_none_in(result.stdout.encode(), result.stdout[-3000:])
    files = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    for path in files:
        assert_none_in(path.name.encode(), path)
        assert_none_in(path.read_bytes(), path)


def test_a_training_leaves_none(world, tmp_path):
    (tmp_path / "base").symlink_to(world / "base")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "data").symlink_to(world / "runs" / "data")
    named = f"logger.wandb.name='{SECRETS['OPENAI_API_KEY']} of {SECRETS['CORRECT_SECRET']}'"
    project = f"logger.wandb.project={SECRETS['HF_TOKEN']}"
    result = run(tmp_path, *command("train_dit", *SFT, named, project, "run=x"))
    assert result.returncode == 0, result.stderr[-3000:]
    assert "name: <redacted> of <redacted>" in (tmp_path / "runs" / "x" / "config.yaml").read_text()
    assert list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
    assert_none_is_left(tmp_path, result)


def test_errors_of_a_sweep_say_none(tmp_path):
    folder = f"data.folder='https://{USER}@host/{SECRETS['HF_TOKEN']}'"
    result = run(tmp_path, *command("make_proxy_prompts", "-m", folder, "data.max_refused=0.1,0.2", "run=x"))
    assert result.returncode == 1, result.stderr[-3000:]
    assert result.stderr.count("error: [data.max") == 2 and "<redacted>@host/<redacted>" in result.stderr
    assert_none_is_left(tmp_path, result)


def test_logs_and_tracebacks_of_bugs_say_none(tmp_path):
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "tiny.yaml").write_text("defaults: [_self_, {experiment: null}]\nrun: x\ntext: a\n")
    (tmp_path / "tiny.py").write_text(BROKEN)
    result = run(tmp_path, sys.executable, "tiny.py", f"text='{SECRETS['CORRECT_SECRET']}'")
    assert result.returncode == 1 and result.stderr.count("KeyError: '<redacted>'") == 2
    assert "the answer to <redacted> was 401" in result.stderr
    assert_none_is_left(tmp_path, result)
