"""The web page: over HTTP, and in a headless browser where there is one."""

import json
import re
import subprocess
import threading
import time
from importlib.util import find_spec
from pathlib import Path

import httpx
import pytest
from PIL import Image

from clvr_train.inference.closed_loop import Budget
from clvr_train.inference.loop import ClosedLoop
from tests.inference.driven import Browser
from tests.inference.test_closed_loop import EDIT, GENERATE, STOP, VERIFY, Brush, Scripted
from tests.recipes.conftest import ROOT, command

if not (find_spec("starlette") and find_spec("uvicorn")):
    pytest.skip("pip install -e '.[web]'", allow_module_level=True)

import uvicorn

from clvr_train.inference.web import Desk, make_app

SCRIPT = {
    "a house": [GENERATE, VERIFY, EDIT, STOP],
    "forever": lambda turn, seed: EDIT if turn else GENERATE,
    "<b>bold</b>": ["<img src=http://evil/>\ngenerate <IMG_GEN_{n}>", STOP],
    "broken": [GENERATE, "mumble"],
}


class Gated(Brush):
    """Draws an image whenever the test lets it."""

    nfe_per_image = 4

    def __init__(self) -> None:
        super().__init__()
        self.allowed = threading.Semaphore(0)

    def draw(self, samples, seeds):
        assert self.allowed.acquire(timeout=60)
        if any(sample.goal == "too much" for sample in samples):
            raise RuntimeError("out of memory")
        super().draw(samples, seeds)
        return [Image.new("RGB", (8, 8), (40 * sample.step, 0, 0)) for sample in samples]


@pytest.fixture
def page():
    """(URL, brush) of a served page with a scripted controller."""
    brush = Gated()
    loop = ClosedLoop(Scripted(SCRIPT | {"too much": [GENERATE]}), brush, retries=0)
    with Desk(loop, active=2, waiting=1) as desk:
        options = {"port": 0, "log_config": None, "ws": "none", "lifespan": "off"}
        server = uvicorn.Server(uvicorn.Config(make_app(desk, Budget(max_rounds=3)), **options))
        thread = threading.Thread(target=server.run)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        try:
            yield f"http://127.0.0.1:{port}/", brush
        finally:
            server.should_exit = True
            brush.allowed.release(100)
            thread.join()


def post(url: str, **fields) -> httpx.Response:
    return httpx.post(f"{url}draw", json=fields, timeout=60, trust_env=False)


def test_a_request_is_answered_by_a_line_a_round(page) -> None:
    url, brush = page
    brush.allowed.release(10)
    rows = [json.loads(line) for line in post(url, goal="a house", max_rounds=5).text.splitlines()]
    assert [row["action"] for row in rows[:-1]] == ["generate", "verify", "edit", "stop"]
    assert [bool(row["image"]) for row in rows[:-1]] == [True, False, True, False]
    end = rows[-1]
    assert (end["stop_reason"], end["images"], end["nfe"]) == ("stop", 2, 8) and len(end["turn_seconds"]) == 4


@pytest.mark.parametrize("fields, message", [
    ({"goal": " "}, "the goal is empty"),
    ({"goal": 3}, "goal: a text is needed"),
    ({"goal": "a house", "max_rounds": 0}, "max_rounds=0: must be at least 1"),
    ({"goal": "a house", "max_rounds": "9"}, "max_rounds: a number is needed"),
    ({"goal": "a house", "max_rounds": 2.5}, "max_rounds=2.5: must be a whole number"),
    ({"goal": "a house", "max_nfe": 3}, "max_nfe=3: an image takes 4 network evaluations"),
    ({"goal": "a house", "seed": 3}, "seed: no such field"),
])
def test_a_bad_request_says_why(page, fields: dict, message: str) -> None:
    reply = post(page[0], **fields)
    assert reply.status_code == 400 and message in reply.json()["error"]


def test_only_this_machine_and_this_page_may_ask(page) -> None:
    url, _ = page
    options = {"timeout": 10, "trust_env": False}
    assert httpx.get(url, headers={"Host": "evil.example"}, **options).status_code == 400
    assert httpx.post(f"{url}draw", content=b'{"goal": "a house"}', headers={"Content-Type": "text/plain"},
                      **options).status_code == 415  # fmt: skip
    assert httpx.post(f"{url}draw", content=b" " * 300_000, headers={"Content-Type": "application/json"},
                      **options).status_code == 413  # fmt: skip
    policy = httpx.get(url, **options).headers["content-security-policy"]
    assert "default-src 'none'" in policy and "http" not in policy


def test_a_round_that_fails_is_an_end_with_the_reason_and_the_next_request_is_drawn(page) -> None:
    url, brush = page
    brush.allowed.release(10)
    assert json.loads(post(url, goal="too much").text)["stop_reason"] == "error: out of memory"
    assert '"stop_reason": "stop"' in post(url, goal="a house").text


def wait_for(condition) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_requests_share_batches_whichever_round_they_are_in(page) -> None:
    url, brush = page
    replies: dict[str, list] = {}

    def ask(name: str, goal: str, **budget) -> threading.Thread:
        def work() -> None:
            replies[name] = [json.loads(line) for line in post(url, goal=goal, **budget).text.splitlines()]

        thread = threading.Thread(target=work)
        thread.start()
        return thread

    first = ask("first", "forever", max_rounds=3)
    brush.allowed.release()
    wait_for(lambda: len(brush.batches) == 1)  # the second image of the first waits for the gate
    second = ask("second", "forever", max_rounds=2)
    time.sleep(0.3)
    brush.allowed.release()
    wait_for(lambda: len(brush.batches) == 2)
    brush.allowed.release(10)
    for thread in (first, second):
        thread.join()
    assert [sorted(sample.step for sample in batch) for batch in brush.batches] == [[1], [2], [1, 3], [2]]
    assert [replies[name][-1]["images"] for name in ("first", "second")] == [3, 2]


def test_no_more_requests_wait_than_allowed(page) -> None:
    url, brush = page
    threads = [threading.Thread(target=post, args=(url,), kwargs={"goal": "forever"}) for _ in range(3)]
    for thread in threads:  # one is drawn, one waits for the next round, one more than that is refused
        thread.start()
        time.sleep(0.2)
    statuses = [post(url, goal="a house").status_code] if len(brush.batches) == 0 else []
    brush.allowed.release(30)
    for thread in threads:
        thread.join()
    assert statuses == [503]


def test_who_leaves_is_not_drawn_for(page) -> None:
    url, brush = page
    with httpx.stream("POST", f"{url}draw", json={"goal": "forever", "max_rounds": 16}, timeout=60,
                      trust_env=False) as reply:  # fmt: skip
        brush.allowed.release()
        next(reply.iter_lines())
    time.sleep(0.5)
    brush.allowed.release(20)
    assert '"stop_reason": "stop"' in post(url, goal="a house").text
    # What was begun is drawn to its end; the budget of 16 images is not used up.
    assert max(sample.step for batch in brush.batches for sample in batch if sample.goal == "forever") <= 3


# ---------------------------------------------------------------------------- in a browser


@pytest.fixture
def tab(tmp_path: Path):
    with Browser(tmp_path) as tab:
        yield tab


TEXT = "document.getElementById('{}').textContent".format
ENDED = f"!['', 'drawing'].includes({TEXT('status')}) && {TEXT('status')}"
SHOWN = "document.querySelectorAll('#rounds li').length"


@pytest.mark.slow
def test_rounds_appear_as_they_are_drawn(page, tab: Browser) -> None:
    url, brush = page
    tab.open(url)
    tab.click("#goal")
    tab.type("forever")
    assert tab.run("document.getElementById('max_rounds').value") == "3"
    tab.run("document.getElementById('max_rounds').focus()")
    tab.press("ArrowLeft", 37)
    assert tab.run("document.querySelector('#max_rounds + output').textContent") == "2"
    tab.click("#draw")
    tab.until(f"{TEXT('status')} === 'drawing'")
    assert tab.run(SHOWN) == 0
    brush.allowed.release()
    tab.until(f"{SHOWN} === 1")
    assert tab.run(TEXT("status")) == "drawing" and not tab.run("document.getElementById('cancel').disabled")
    brush.allowed.release()
    tab.until(f"{SHOWN} === 2")
    assert "max_rounds: 2 images, 8 network evaluations" in tab.until(ENDED)
    assert tab.run("[...document.images].map(i => i.naturalWidth)") == [8, 8]
    assert tab.run("[...document.querySelectorAll('#rounds p')].map(p => p.textContent)") == ["draw", "change"]
    assert tab.errors == [] and all(each.startswith((url, "data:", "about:")) for each in tab.requests)


@pytest.mark.slow
def test_texts_are_texts_errors_are_said_and_a_drawing_can_be_stopped(page, tab: Browser) -> None:
    url, brush = page
    tab.open(url)

    def draw(goal: str) -> None:
        tab.run(f"document.getElementById('goal').value = {json.dumps(goal)}")
        tab.click("#draw")

    brush.allowed.release(2)
    draw("<b>bold</b>")
    tab.until(f"{TEXT('status')}.startsWith('stop: 1 images')")
    assert tab.run("document.querySelector('#rounds p').textContent") == "<img src=http://evil/>"
    assert not [each for each in tab.requests if "evil" in each]
    draw("a <image>")
    tab.until(f"{TEXT('status')}.startsWith('error: goal: the goal holds <image>')")
    draw("broken")
    tab.until(f"{TEXT('status')}.startsWith('malformed: the last line')")
    assert tab.run(SHOWN) == 1, "the canvas stays"
    draw("forever")
    tab.until(f"{TEXT('status')} === 'drawing'")
    tab.click("#cancel")
    tab.until(f"{TEXT('status')} === 'stopped by you'")


@pytest.mark.slow
def test_the_recipe_draws_with_real_models_in_a_browser(tab: Browser, tmp_path: Path) -> None:
    (tmp_path / "models").symlink_to(ROOT / "models")
    words = command("serve_closed_loop", "experiment=shapes_serve", "port=0", "max_rounds=2")
    with subprocess.Popen(words, cwd=tmp_path, stderr=subprocess.PIPE, text=True) as process:
        try:
            found = (re.match(r"open (http://127\.0\.0\.1:\d+)$", line) for line in process.stderr)
            tab.open(next(filter(None, found))[1])
            tab.click("#goal")
            tab.type("a green triangle , a blue square and a yellow circle")
            tab.click("#draw")
            end = tab.until(ENDED, seconds=120)
            assert re.match(r"\w+: [12] images, [48] network evaluations", end)
            assert set(tab.run("[...document.images].map(i => i.naturalWidth)")) == {96}
            assert tab.errors == []
        finally:
            process.terminate()
            process.communicate(timeout=60)
    assert process.returncode == 143


def test_a_port_that_is_taken_is_one_line(tmp_path: Path, page, monkeypatch, capsys) -> None:
    from recipes.serve_closed_loop import main

    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        main(["controller.folder=none", f"port={page[0].split(':')[2].strip('/')}"])
    assert "Address already in use" in capsys.readouterr().err
