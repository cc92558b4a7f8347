"""The saved view of a wandb project: a plot for every metric of a run, written offline, saved on a server."""

import importlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

pytest.importorskip("wandb_workspaces")
ROOT = Path(__file__).resolve().parents[2]
METRICS = ["reward", "reward_q05", "reward_q95", "kl", "loss", "seconds_update", "seconds_total", "new_one"]


@pytest.fixture
def here(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    (tmp_path / "runs/r").mkdir(parents=True)
    rows = [{"step": 1, **dict.fromkeys(METRICS[:4], 0.5)}, {"step": 2, **dict.fromkeys(METRICS[4:], None)}]
    (tmp_path / "runs/r/metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def make(*overrides: str) -> dict:
    importlib.import_module("recipes.wandb_workspace").main(["run=r", *overrides])
    return json.loads(Path("runs/r/wandb_workspace.json").read_text())


def test_every_metric_has_its_plot_and_pictures_are_shown(here: Path) -> None:
    made = make("project=p", "name=view", "media=[samples]")
    assert (made["project"], made["displayName"]) == ("p", "view")
    sections = made["spec"]["section"]["panelBankConfig"]["sections"]
    plots = {tuple(panel["config"].get("metrics", ())): (section["name"], panel["config"]["chartTitle"])
             for section in sections for panel in section["panels"]}  # fmt: skip
    assert sorted(metric for metrics in plots for metric in metrics) == sorted(METRICS)
    assert plots[("reward_q05", "reward_q95")] == ("Reward", "reward: quantiles")
    assert plots[("seconds_update", "seconds_total")] == ("Time and memory", "seconds by phase")
    assert sections[-1]["panels"][0]["config"]["mediaKeys"] == ["samples"]
    assert str(here) not in json.dumps(made)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["upload=true"], "error: upload=true needs entity=NAME"),
        (["upload=true", "entity=me"], "error: no key for wandb: set WANDB_API_KEY in the environment"),
        (["run=none"], "error: runs/none/metrics.jsonl: no such log"),
    ],
)
def test_what_is_missing_is_one_line(here: Path, capsys, overrides: list[str], message: str) -> None:
    with pytest.raises(SystemExit) as end:
        make(*overrides)
    lines = capsys.readouterr().err.strip().splitlines()
    assert end.value.code == 1 and lines[-1].startswith(message), lines


class Server(BaseHTTPRequestHandler):
    """As much of a wandb server as saving a view needs."""

    protocol_version = "HTTP/1.1"
    views: list[dict] = []
    refuses = False

    def do_POST(self) -> None:
        text = self.rfile.read(int(self.headers.get("content-length", 0)))
        data: dict = {"viewer": {"id": "v", "entity": "me", "username": "u", "flags": "{}", "teams": {"edges": []}}}
        if b"upsertView" in text:
            Server.views.append(json.loads(text)["variables"])
            data = {"upsertView": {"view": {"id": "v", "name": "nw-abc-v"}, "inserted": True}}
        refused = {"errors": [{"message": "permission denied"}], "data": None}
        answer = json.dumps(refused if Server.refuses and b"upsertView" in text else {"data": data}).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    do_GET = do_PUT = do_POST

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.mark.slow
@pytest.mark.parametrize("refuses", [False, True])
def test_the_view_is_saved_on_a_server(here: Path, monkeypatch, refuses: bool) -> None:
    monkeypatch.setattr(Server, "views", [])
    monkeypatch.setattr(Server, "refuses", refuses)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        mine = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
        mine |= {"WANDB_BASE_URL": f"http://127.0.0.1:{server.server_port}", "WANDB_API_KEY": "a" * 40}
        mine |= {"HOME": str(here)}
        command = [sys.executable, str(ROOT / "recipes/wandb_workspace.py"), "run=r", "upload=true", "entity=me"]
        result = subprocess.run(command, env=mine, capture_output=True, text=True, timeout=300)
    finally:
        server.shutdown()
        server.server_close()
    if refuses:
        assert result.returncode == 1 and "me/clvr: the view was not saved" in result.stderr, result.stderr
        assert "Traceback" not in result.stderr and "a" * 40 not in result.stderr
        return
    assert result.returncode == 0, result.stderr
    (view,) = Server.views
    assert (view["entityName"], view["projectName"], view["displayName"]) == ("me", "clvr", "CLVR")
    assert json.loads(view["spec"]) == json.loads((here / "runs/r/wandb_workspace.json").read_text())["spec"]
