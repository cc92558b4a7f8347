"""What the wrapper around Hydra promises, on a recipe and a conf folder made for the test."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from omegaconf import DictConfig, OmegaConf

from recipes._recipe import recipe, run_folder

ROOT = Path(__file__).resolve().parents[2]
HEAD = "# @package _global_\n"
FILES = {
    "tiny.yaml": """
defaults: [_self_, {model: small}, {experiment: null}]
run: tiny
fail: null
train: {lr: 0.1, steps: 3, name: adam, flag: false, betas: [0.9, 0.99]}
out: ${run}
""",
    "model/small.yaml": "width: 8\n",
    "model/big.yaml": "width: 64\ndepth: 2\n",
    "experiment/good.yaml": """# @package _global_
# Shows the smallest recipe.
# command: python recipes/tiny.py experiment=good
# hardware: any
# expected: a file
defaults: [{override /model: big}]
train: {lr: 0.5}
model: {depth: 3}
""",
    "experiment/typo.yaml": HEAD + "# recipes/tiny.py experiment=typo\ntrain: {stepz: 1}\n",
    "experiment/code.yaml": HEAD + "# recipes/tiny.py experiment=code\n_target_: os.system\n",
    "experiment/other.yaml": HEAD + "# recipes/huge.py experiment=other\ntrain: {lr: 1}\n",
}
SCRIPT = """
'''Writes one file: the purpose of the tiny recipe.'''
import sys, time
from pathlib import Path
from recipes._recipe import recipe, run_folder

@recipe("tiny", conf=Path("conf").absolute())
def main(cfg):
    (run_folder(cfg) / "ready").write_text("")
    time.sleep(cfg.train.steps)

if __name__ == "__main__":
    main()
"""


@pytest.fixture
def conf(tmp_path: Path, monkeypatch) -> Path:
    for name, text in FILES.items():
        path = tmp_path / "conf" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "conf"


@pytest.fixture
def seen() -> list[DictConfig]:
    return []


@pytest.fixture
def main(conf: Path, seen: list[DictConfig]):
    @recipe("tiny", conf=conf)
    def fn(cfg: DictConfig) -> None:
        if cfg.fail == cfg.train.steps:
            raise ValueError(f"data.jsonl:3: goal: must not be empty\nseen at step {cfg.train.steps}")
        run_folder(cfg)
        seen.append(cfg)

    return fn


def refused(main, capsys, *arguments: str) -> str:
    with pytest.raises(SystemExit) as stop:
        main(list(arguments))
    assert stop.value.code == 1
    text = capsys.readouterr().err
    assert text.startswith("error: ") and text.count("\n") == 1, text
    assert not Path("runs").exists(), "nothing may be written before the refusal"
    return text


def test_it_runs_with_what_it_was_given(main, seen) -> None:
    main(["experiment=good", "train.steps=4"])
    assert seen[0].train == {"lr": 0.5, "steps": 4, "name": "adam", "flag": False, "betas": [0.9, 0.99]}
    assert seen[0].model == {"width": 64, "depth": 3} and seen[0].out == "tiny"
    assert OmegaConf.load("runs/tiny/config.yaml").train.steps == 4
    assert sorted(path.name for path in Path().iterdir()) == ["conf", "runs"]
    assert "HYDRA_FULL_ERROR" not in os.environ


@pytest.mark.parametrize(
    ("argument", "parts"),
    [
        ("train.lrr=1", ["unknown key 'train.lrr'", "'train.lr'"]),
        ("+train.lrr=1", ["unknown key 'train.lrr'", "'train.lr'"]),
        ("++trian.lr=1", ["unknown key 'trian.lr'", "'train.lr'"]),
        ("train={lr: 1, stesp: 2}", ["unknown key 'train.stesp'", "'train.steps'"]),
        ("rnu=x", ["unknown key 'rnu'", "'run'"]),
        ("model.depth=2", ["unknown key 'model.depth'", "'model.width'"]),
        ("train.lr={a: 1}", ["unknown key 'train.lr.a'"]),
        ("fail={a: 1}", ["unknown key 'fail.a'"]),
        ("train.lr=fast", ["train.lr", "expected a number, got 'fast'"]),
        ("train.betas=1", ["train.betas", "expected a list"]),
        ("train.betas=[{a: 1}]", ["unknown key 'train.betas[0].a'"]),
        ("train.flag=3", ["train.flag", "expected true or false"]),
        ("~train.lr", ["cannot be removed"]),
        ("train.lr=1,2", ["several values need -m"]),
        ("train.lr", ["train.lr"]),
        ("+_target_=os.system", ["unknown key '_target_'"]),
        ("experiment=god", ["unknown experiment 'god'", "did you mean 'good'", "good"]),
        ("experiment=other", ["experiment 'other' is for huge, not tiny"]),
        ("experiment=typo", ["experiment/typo.yaml: unknown key 'train.stepz'", "'train.steps'"]),
        ("experiment=code", ["_target_: a config cannot name code"]),
        ("model=smal", ["unknown model 'smal'", "small"]),
        ("--config-name=other", ["--config-name"]),
        ("fail=3", ["data.jsonl:3: goal: must not be empty seen at step 3"]),
        ("run=../up", ["run: '../up'"]),
        ("out=${nothing}", ["nothing"]),
    ],
)
def test_bad_input_is_refused_in_one_line(main, seen, capsys, argument: str, parts: list[str]) -> None:
    text = refused(main, capsys, argument)
    assert all(part in text for part in parts), text
    assert not seen


def test_a_missing_root_config_is_named(conf: Path, capsys) -> None:
    refused(recipe("absent", conf=conf)(lambda cfg: None), capsys)


def test_help_says_purpose_keys_and_the_experiments_that_fit(main, seen, capsys) -> None:
    main(["--help", "model=big"])
    text = capsys.readouterr().out
    assert "What the wrapper around Hydra promises" in text
    assert "Shows the smallest recipe." in text and "other" not in text
    assert "lr: 0.1" in text and "depth: 2" in text
    assert not seen


def test_cfg_job_prints_the_config_and_does_not_run(main, seen, capsys) -> None:
    main(["--cfg", "job", "train.lr=0.25"])
    assert OmegaConf.create(capsys.readouterr().out).train.lr == 0.25
    assert not seen


def test_a_sweep_names_each_job_and_outlives_a_failed_one(main, seen, capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["experiment=good", "-m", "train.steps=1,2,3", "fail=2", "run=base"])
    assert stop.value.code == 1
    assert capsys.readouterr().err.startswith("error: [train.steps=2] data.jsonl:3")
    assert [cfg.run for cfg in seen] == ["base/train.steps=1", "base/train.steps=3"]
    assert Path("runs/base/train.steps=3/config.yaml").exists()


def test_a_sweep_with_one_bad_job_does_not_start(main, seen, capsys) -> None:
    assert "'other' is for huge" in refused(main, capsys, "-m", "experiment=good,other")
    assert not seen


def test_a_run_goes_on_with_its_own_config_only(main, seen, capsys) -> None:
    main([])
    main([])
    main(["train.lr=0.2"])  # nothing was written yet: a command that failed can be put right
    main([])
    assert len(seen) == 4
    Path("runs/tiny/metrics.jsonl").write_text("{}\n")
    with pytest.raises(SystemExit):
        main(["train.lr=0.3"])
    assert "made with train.lr=0.1 and is now asked for 0.3" in capsys.readouterr().err
    longer = OmegaConf.merge(seen[0], {"train": {"steps": 9}})
    assert run_folder(longer, may_change=("train.steps",)) == Path("runs/tiny")
    assert OmegaConf.load("runs/tiny/config.yaml").train.steps == 9


def test_a_value_that_must_be_given_is_asked_for_before_anything_is_written(main, conf, seen, capsys) -> None:
    (conf / "tiny.yaml").write_text((conf / "tiny.yaml").read_text() + "data: {folder: \"???\"}\n")
    assert "tiny needs data.folder=..." in refused(main, capsys)
    main(["--cfg", "job"])
    main(["--help"])
    assert not seen
    main(["data.folder=x"])
    assert seen[0].data.folder == "x"


def test_a_bug_keeps_its_traceback(conf: Path) -> None:
    @recipe("tiny", conf=conf)
    def broken(cfg: DictConfig) -> None:
        raise KeyError("ours")

    with pytest.raises(KeyError, match="ours"):
        broken([])


def test_ctrl_c_ends_with_130(conf: Path, capsys) -> None:
    @recipe("tiny", conf=conf)
    def interrupted(cfg: DictConfig) -> None:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as stop:
        interrupted([])
    assert stop.value.code == 130 and "same command" in capsys.readouterr().err


def test_sigterm_ends_a_script_with_143(conf: Path) -> None:
    Path("tiny.py").write_text(SCRIPT)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "tiny.py", "train.steps=60"], env=environment, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 60
    while not Path("runs/tiny/ready").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, text = process.communicate(timeout=30)
    assert process.returncode == 143 and "same command" in text
