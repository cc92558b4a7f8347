"""The doctor: what is broken is found, named with its remedy, within its time."""

import json
import socket
import time
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import pytest
import torch

from clvr_train.services.options import ChatOptions
from recipes import _doctor
from recipes._config import check_job
from recipes._doctor import FAILED, OK, WARNING, Finding
from recipes._recipe import CONF
from recipes.doctor import main, text
from tests.services.server import ScriptedServer, http

JUDGES = ["reward=unified_reward", "teacher=openai", "teacher.chat.model=teacher"]


def statuses(findings) -> dict[str, str]:
    findings = list(findings)
    assert all(finding.remedy for finding in findings if finding.status != OK)
    return {finding.name: finding.status for finding in findings}


@pytest.fixture
def doctor(tmp_path, monkeypatch, capsys):
    """doctor(*overrides) -> (what it prints, its exit status)."""
    monkeypatch.chdir(tmp_path)

    def run(*overrides: str) -> tuple[str, int]:
        status = 0
        try:
            main(list(overrides))
        except SystemExit as end:
            status = end.code
        return capsys.readouterr().out, status

    return run


@pytest.mark.slow
def test_a_machine_that_is_fit(doctor, tmp_path):
    out, status = doctor("format=json")
    found = json.loads(out)
    assert status == 0 and found["ok"] is True
    assert {"python", "packages", "torch", "cuda", "disk", "run folder", "step on cpu"} <= {
        row["name"] for row in found["checks"]
    }
    assert all(row.keys() == {"name", "status", "found", "remedy", "seconds"} for row in found["checks"])
    assert not (tmp_path / "runs").exists(), "it leaves nothing"


def test_what_is_broken_gives_status_1_and_its_remedy(doctor, monkeypatch):
    broken = [Finding("step on cpu", FAILED, "loss nan", "reinstall torch")]
    monkeypatch.setattr(_doctor, "devices", lambda device: broken)
    out, status = doctor()
    assert status == 1
    assert "failed   step on cpu" in out and "-> reinstall torch" in out
    out, status = doctor("format=json")
    assert status == 1 and json.loads(out)["ok"] is False


def test_warnings_alone_are_no_failure(doctor, monkeypatch):
    monkeypatch.setattr(_doctor, "devices", lambda device: [])
    out, status = doctor("disk_gb=1e9")
    assert status == 0 and "warning  disk" in out and "disk_gb=" in out


@pytest.mark.parametrize("word", ["format=xml", "device=tpu"])
def test_unknown_choices_are_refused(doctor, word):
    assert doctor(word)[1] == 1


def test_python_is_too_old():
    assert statuses(_doctor.python((3, 10, 2))) == {"python": FAILED}
    assert statuses(_doctor.python((3, 13, 0))) == {"python": OK}


def test_versions_that_were_not_tested(monkeypatch):
    def installed(name: str) -> str:
        if name in ("trl", "deepspeed"):
            raise PackageNotFoundError(name)
        return {"torch": "2.9.0+cu128", "diffusers": "0.42.1.post1"}.get(name, version(name))

    monkeypatch.setattr(_doctor, "version", installed)
    found = {finding.name: finding for finding in _doctor.packages()}
    assert {name: finding.status for name, finding in found.items() if finding.status != OK} == {
        "torch": WARNING,
        "diffusers": WARNING,
        "trl": FAILED,  # deepspeed is of an extra
    }
    pin = next(line for line in requires("clvr-train") if line.startswith("torch=="))
    assert found["torch"].remedy == f"pip install {pin}"


def test_a_cuda_build_counts_as_its_version(monkeypatch):
    monkeypatch.setattr(_doctor, "version", lambda name: f"{version(name).partition('+')[0]}+cu130")
    assert statuses(_doctor.packages()) == {"packages": OK}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_asked_for_and_is_not_there(monkeypatch):
    assert statuses(_doctor.gpus("cuda"))["cuda"] == FAILED
    assert statuses(_doctor.gpus("auto"))["cuda"] == statuses(_doctor.gpus("cpu"))["cuda"] == OK
    monkeypatch.setattr(_doctor.shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    assert statuses(_doctor.gpus("auto"))["cuda"] == FAILED, "a driver that torch cannot use"


def test_gpus_as_torch_tells_of_them(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda number: ((79, 40)[number] * 10**9, 80 * 10**9))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda number: "H100")
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: False)
    found = statuses(_doctor.gpus("cuda"))
    assert (found["memory of GPU 0"], found["memory of GPU 1"], found["nccl"]) == (OK, WARNING, WARNING)


def test_a_folder_that_cannot_be_written(tmp_path):
    assert statuses(_doctor.writes(tmp_path / "runs" / "a")) == {"run folder": OK}
    assert not list(tmp_path.iterdir())
    (tmp_path / "runs").write_text("a file where the folder should be")
    assert statuses(_doctor.writes(tmp_path / "runs" / "a")) == {"run folder": FAILED}
    read_only = Path("/proc/sys/kernel")  # for root too
    assert statuses(_doctor.writes(read_only)) == {"run folder": FAILED}


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    def refuse(*_) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(_doctor.fcntl, "lockf", refuse)
    assert statuses(_doctor.writes(tmp_path)) == {"run folder": OK, "locks": WARNING}
    assert not list(tmp_path.iterdir())


def test_a_device_that_miscalculates(monkeypatch):
    monkeypatch.setattr(_doctor, "tiny_step", lambda device, dtype: float("nan") if device.type == "cuda" else 1.0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    losses = iter((1.0, 1.5))
    assert statuses(_doctor.devices("cpu")) == {"step on cpu": OK}
    monkeypatch.setattr(_doctor, "tiny_step", lambda device, dtype: next(losses))
    assert statuses(_doctor.devices("auto")) == {"step on cpu": OK, "step on cuda:0": FAILED}


def test_a_step_in_bfloat16_is_within_its_tolerance():
    """What `TOLERANCE` allows a GPU, measured on the CPU."""
    exact = _doctor.tiny_step(torch.device("cpu"), torch.float32)
    assert abs(_doctor.tiny_step(torch.device("cpu"), torch.bfloat16) - exact) < _doctor.TOLERANCE / 3


def test_servers_are_those_of_the_training(monkeypatch):
    cfg = check_job("doctor", CONF, [*JUDGES, "reward.of_edits.unified_reward_edit=0"])
    found = _doctor.chat_servers(cfg.reward, cfg.teacher, 3.0)
    assert found["judge unified_reward"][1] == ChatOptions("http://127.0.0.1:8080/v1", "UnifiedReward", attempt_s=3.0)
    assert found.keys() == {"judge unified_reward", "teacher"} and found["teacher"][1].model == "teacher"
    assert not _doctor.chat_servers(*(check_job("doctor", CONF, [])[key] for key in ("reward", "teacher")), 3.0)


def look(url: str, **options) -> list[Finding]:
    return list(_doctor.server("teacher", "teacher.chat.url", ChatOptions(url, "mine", attempt_s=1.0, **options)))


def test_servers_up_and_down(monkeypatch):
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    with ScriptedServer() as server:
        assert statuses(look(server.url)) == {"teacher": OK}
        server.health = 503
        assert statuses(look(server.url)) == {"teacher": FAILED}
        assert statuses(look(server.url, key_env="NO_SUCH_KEY")) == {"teacher": FAILED}
        url = server.url
    down = look(url)
    assert statuses(down) == {"teacher": FAILED}
    assert "no connection" in down[0].found and "launch/serve_teacher.sh" in down[0].remedy


def test_a_server_of_another_model(monkeypatch):
    monkeypatch.setattr("tests.services.server.http", lambda status, body: http(status, '{"data": [{"id": "yours"}]}'))
    with ScriptedServer() as server:
        found = look(server.url)
        assert statuses(found) == {"teacher": WARNING} and "lists yours, not mine" in found[0].found


def test_a_server_that_hangs_costs_its_time_only():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        start = time.monotonic()
        assert statuses(look(f"http://127.0.0.1:{silent.getsockname()[1]}/v1")) == {"teacher": FAILED}
        assert time.monotonic() - start < 10


def test_a_check_that_hangs_or_breaks_is_a_failure():
    def hang():
        yield Finding("first", OK, "fine")
        time.sleep(30)

    start = time.monotonic()
    assert statuses(_doctor.bounded("slow", hang, 0.2)) == {"first": OK, "slow": FAILED}
    assert time.monotonic() - start < 10
    assert statuses(_doctor.bounded("broken", lambda: {}["x"], 5)) == {"broken": FAILED}


def test_the_table_is_aligned():
    rows = [{"name": "a", "status": OK, "found": "x", "remedy": ""}]
    rows.append({"name": "long name", "status": FAILED, "found": "y", "remedy": "do it"})
    indent = " " * 18
    assert text(rows) == f"ok       a          x\nfailed   long name  y\n{indent}  -> do it"
