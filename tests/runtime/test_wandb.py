"""The mirror to Weights & Biases: what it gets, and that nothing that happens there stops a run."""

import json
import logging
import os
import re
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import wandb
from PIL import Image

from clvr_train.runtime import metrics as module
from clvr_train.runtime.metrics import Metrics, read_metrics

SCRIPT = """
import logging, sys, time
from clvr_train.runtime import metrics as module
from clvr_train.runtime.metrics import Metrics

logging.basicConfig(format="%(message)s")
module.WAITS |= {"init_timeout": 1.0, "finish_timeout": 1.0}
with Metrics("run", wandb={"project": "p", "id": "x", "resume": "allow", "mode": None}) as metrics:
    start = time.monotonic()
    for step in range(1, 6):
        metrics.log(step, loss=1 / step)
    print(time.monotonic() - start)
    while sys.argv[1:] and metrics._mirror._calls:  # until a server that answers has been told all so far
        metrics._mirror._look()
        time.sleep(0.01)
    if sys.argv[1:]:
        open("told", "w").close()
        while not open("told").read():
            time.sleep(0.01)
    metrics.log(6, loss=1 / 6)
"""


class Run:
    """Of wandb; fails at the call that it is told to fail at, by an exception of no common kind."""

    def __init__(self, calls: list, fails_at: str = "") -> None:
        self.calls, self.fails_at = calls, fails_at

    def _take(self, name: str, *value: object) -> None:
        self.calls.append((name, *value))
        if name == self.fails_at:
            raise type("Strange", (Exception,), {})("no\nnetwork for sk-1234567890abcdef")

    def init(self, settings: wandb.Settings, **options: object) -> "Run":
        self._take("init", options)
        return self

    def log(self, values: dict, step: int) -> None:
        self._take("log", step, values)

    def finish(self, exit_code: int) -> None:
        self._take("finish", exit_code)


def test_wandb_gets_what_the_file_gets(tmp_path: Path, monkeypatch) -> None:
    calls: list = []
    monkeypatch.setattr(wandb, "init", Run(calls).init)
    with Metrics(tmp_path, wandb={"project": "p", "id": "a/b"}) as metrics:
        metrics.log(1, loss=1.0)
    assert calls == [("init", {"project": "p", "id": "a-b"}), ("log", 1, {"loss": 1.0}), ("finish", 0)]


def test_wandb_gets_images(tmp_path: Path, monkeypatch) -> None:
    """A picture that is gone by then is a failure like others: the run goes on."""
    Image.new("RGB", (4, 4)).save(tmp_path / "grid.png")
    for file, shown in (("grid.png", True), ("gone.png", False)):
        calls: list = []
        monkeypatch.setattr(wandb, "init", Run(calls).init)
        with Metrics(tmp_path, wandb={"project": "p"}) as metrics:
            metrics.image(1, "samples", tmp_path / file)
            metrics.log(1, loss=1.0)
        logged = [call[2] for call in calls if call[0] == "log"]
        images = [values["samples"] for values in logged if "samples" in values]
        assert [type(image) for image in images] == [wandb.Image] * shown
        assert len(read_metrics(tmp_path)) == 1
    with Metrics(tmp_path) as metrics:
        metrics.image(1, "samples", tmp_path / "grid.png")  # without a mirror there is nothing to do


def test_wandb_gets_tables_with_their_pictures(tmp_path: Path, monkeypatch) -> None:
    calls: list = []
    monkeypatch.setattr(wandb, "init", Run(calls).init)
    rows = [{"goal": "a red circle", "rollouts": Image.new("RGB", (4, 4)), "reward": 0.5}, {"goal": "b", "words": "no"}]
    with Metrics(tmp_path, wandb={"project": "p"}) as metrics:
        metrics.table(3, "rollouts", rows)
        metrics.table(3, "nothing", [])
        metrics.log(3, loss=1.0)
    (_, step, shown), (*_, values) = [call for call in calls if call[0] == "log"]
    table = shown["rollouts"]
    assert step == 3 and values == {"loss": 1.0} and list(shown) == ["rollouts"]
    assert table.columns == ["goal", "rollouts", "reward", "words"] and table.data[1] == ["b", None, None, "no"]
    assert table.data[0][0] == "a red circle" and isinstance(table.data[0][1], wandb.Image)
    with Metrics(tmp_path / "plain") as metrics:
        metrics.table(1, "rollouts", rows)  # without a mirror there is nothing to do
    assert [path.name for path in (tmp_path / "plain").iterdir()] == ["metrics.jsonl"]


TABLE = """
import logging
from PIL import Image
from clvr_train.runtime.metrics import Metrics

logging.basicConfig(format="%(message)s")
with Metrics("run", wandb={"project": "p", "id": "x", "mode": None}) as metrics:
    metrics.table(1, "rollouts", [{"goal": "a red circle", "image": Image.new("RGB", (8, 8), "red")}])
    metrics.log(1, loss=0.5)
"""


def test_tables_and_pictures_offline(tmp_path: Path) -> None:
    """wandb keeps a table's texts in a file, and tells of each of its pictures in the log that is sent later."""
    mine = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    mine |= {"PYTHONPATH": str(Path(__file__).resolve().parents[2]), "WANDB_MODE": "offline"}
    result = subprocess.run([sys.executable, "-c", TABLE], cwd=tmp_path, env=mine, capture_output=True, text=True)
    assert result.returncode == 0 and "wandb is off" not in result.stderr, result.stderr
    (file,) = tmp_path.glob("wandb/offline-run-*/files/media/table/rollouts_*.table.json")
    table = json.loads(file.read_text())
    assert table["columns"] == ["goal", "image"] and table["data"][0][0] == "a red circle"
    (log,) = tmp_path.glob("wandb/offline-run-*/run-x.wandb")
    assert b"rollouts.table.json" in log.read_bytes() and re.search(rb"media/images/\w+\.png", log.read_bytes())


@pytest.mark.parametrize("fails_at", ["init", "log", "finish"])
def test_any_failure_warns_once_and_never_stops(tmp_path: Path, monkeypatch, caplog, fails_at: str) -> None:
    calls: list = []
    monkeypatch.setattr(wandb, "init", Run(calls, fails_at).init)
    with caplog.at_level(logging.WARNING), Metrics(tmp_path, wandb={"project": "p"}) as metrics:
        for step in range(20):
            metrics.log(step, loss=1.0)
            time.sleep(0.005)
    assert len(read_metrics(tmp_path)) == 20
    assert [name for name, *_ in calls].count(fails_at) == 1, "it went on after the failure"
    (message,) = caplog.messages
    assert message.startswith("wandb is off") and message.endswith("Strange: no network for <redacted>")


def test_a_wandb_that_does_not_keep_up_is_given_up(tmp_path: Path, monkeypatch, caplog) -> None:
    monkeypatch.setattr(module, "MOST_WAITING", 3)
    over = threading.Event()
    monkeypatch.setattr(wandb, "init", lambda **options: over.wait(20))
    with Metrics(tmp_path, wandb={"project": "p"}) as metrics:
        for step in range(9):
            metrics.log(step, loss=1.0)
        over.set()
    assert len(read_metrics(tmp_path)) == 9 and caplog.text.count("wandb is off") == 1 and "wait for it" in caplog.text


def run_script(folder: Path, *arguments: str, **environment: str) -> subprocess.Popen:
    root = str(Path(__file__).resolve().parents[2])
    mine = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    mine |= {"PYTHONPATH": root, "WANDB_API_KEY": "a" * 40, **environment}
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, *arguments], cwd=folder, env=mine,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def assert_unharmed(folder: Path, process: subprocess.Popen, warnings: int = 1) -> str:
    out, error = process.communicate(timeout=120)
    assert process.returncode == 0, error
    assert float(out.splitlines()[0]) < 0.5, "a step waited for wandb"
    assert [row["step"] for row in read_metrics(folder / "run")] == [1, 2, 3, 4, 5, 6]
    assert error.count("wandb is off") == warnings, error
    return error


def test_offline_by_the_environment(tmp_path: Path) -> None:
    assert_unharmed(tmp_path, run_script(tmp_path, WANDB_MODE="offline"), warnings=0)
    assert list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))


@pytest.mark.slow
def test_a_server_that_refuses(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound and not listening: nobody else gets the port
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        assert "refused" in assert_unharmed(tmp_path, run_script(tmp_path, WANDB_BASE_URL=url))


@pytest.mark.slow
def test_a_server_that_hangs(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        assert_unharmed(tmp_path, run_script(tmp_path, WANDB_BASE_URL=url))


class Server(BaseHTTPRequestHandler):
    """As much of a wandb server as a run needs to begin; what else is asked gets an empty answer, or none."""

    protocol_version = "HTTP/1.1"
    hangs = False

    def do_POST(self) -> None:
        text = self.rfile.read(int(self.headers.get("content-length", 0)))
        while Server.hangs:
            time.sleep(0.1)
        data: dict = {}
        if b"UpsertBucket" in text:
            project = {"id": "p", "name": "p", "entity": {"id": "e", "name": "e"}}
            bucket = {"id": "b", "name": "x", "displayName": "n", "config": "{}", "project": project}
            data = {"upsertBucket": {"bucket": bucket, "inserted": True}}
        elif b"viewer" in text:
            data = {"viewer": {"id": "v", "entity": "e", "username": "u", "flags": "{}", "teams": {"edges": []}}}
        elif b"RunResumeStatus" in text:
            data = {"model": {"bucket": None}}
        answer = json.dumps({"data": data}).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    do_GET = do_PUT = do_POST

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.mark.slow
@pytest.mark.parametrize("then", ["nonsense", "hangs"])
def test_a_server_that_answers_first(tmp_path: Path, monkeypatch, then: str) -> None:
    """And later answers what breaks wandb's own process, or no more."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        process = run_script(tmp_path, then, WANDB_BASE_URL=f"http://127.0.0.1:{server.server_port}")
        deadline = time.monotonic() + 60
        while not (tmp_path / "told").exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        monkeypatch.setattr(Server, "hangs", then == "hangs")
        (tmp_path / "told").write_text("go on")
        assert_unharmed(tmp_path, process)
    finally:
        monkeypatch.undo()
        server.shutdown()
        server.server_close()
