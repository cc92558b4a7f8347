"""The controller on a chat server: a scripted one over real sockets, and the real server of transformers on a CPU."""

import base64
import io
import threading
import time

import pytest
from PIL import Image

from clvr_train.inference.chat_controller import ChatController
from clvr_train.inference.closed_loop import Budget, NoReply, run_closed_loop
from clvr_train.method.protocol import chat_messages
from clvr_train.method.trajectory import Step
from clvr_train.services.chat import ChatClient
from clvr_train.services.options import ChatOptions
from tests.launch.test_serve_judge import SERVING
from tests.launch.test_serve_judge import server as real_server  # noqa: F401, a fixture
from tests.services.server import ScriptedServer, completion, hangs, http, says, trickles

RED, BLUE = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (64, 32), "blue")
STEPS = [
    Step("draw a circle", "generate", RED),
    Step("look again", "verify"),
    Step("make it blue", "edit", BLUE),
]


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONTROLLER_KEY", "sesame-opens")


def controller(url: str, max_pixels: int | None = None, **options) -> ChatController:
    options = {"limit": 4, "retries": 0, "attempt_s": 5, "deadline_s": 5, "key_env": "CONTROLLER_KEY"} | options
    return ChatController(ChatClient(ChatOptions(url, "my/qwen3-vl", **options)), max_pixels)


def answers(turn):
    """An act that writes what turn(goal, number of assistant turns, request) says: a text, or a status."""

    def act(connection, request: dict) -> None:
        messages = request["messages"]
        text = turn(messages[0]["content"], sum(m["role"] == "assistant" for m in messages), request)
        connection.sendall(http(text, "it broke") if isinstance(text, int) else http(200, completion(text)))

    return act


def decoded(url: str) -> Image.Image:
    head, data = url.split(",", 1)
    assert head == "data:image/png;base64"
    return Image.open(io.BytesIO(base64.b64decode(data)))


def test_the_conversation_in_true_order_the_model_and_the_key() -> None:
    with ScriptedServer(says("all is well\nstop")) as server:
        asked = controller(server.url)
        with asked.client:
            assert asked.reply([chat_messages("a circle <|im_start|>", STEPS)]) == ["all is well\nstop"]
    (request,) = server.requests
    assert (request["model"], request["temperature"], "seed" in request) == ("my/qwen3-vl", 0, False)
    assert "authorization: Bearer sesame-opens" in [
        f"{name.lower()}: {value}" for name, value in (line.split(": ", 1) for line in server.heads[0][1:])]
    messages = request["messages"]
    assert [message["role"] for message in messages] == ["user", "assistant"] * 3 + ["user"]
    assert messages[0]["content"] == "a circle < |im_start|>" and messages[4]["content"] == "continue"
    assert messages[1]["content"] == "draw a circle\ngenerate <IMG_GEN_1>"
    assert messages[5]["content"] == "make it blue\nedit <IMG_GEN_2>"
    for message, image in ((messages[2], RED), (messages[6], BLUE)):
        (part,) = message["content"]
        shown = decoded(part["image_url"]["url"])
        assert shown.size == image.size and shown.tobytes() == image.tobytes(), "no pixel is changed"


def test_large_images_are_made_smaller() -> None:
    with ScriptedServer(says("fine\nstop")) as server:
        asked = controller(server.url, max_pixels=512)
        with asked.client:
            asked.reply([chat_messages("a circle", STEPS)])
    sizes = [decoded(message["content"][0]["image_url"]["url"]).size
             for message in server.requests[0]["messages"] if isinstance(message["content"], list)]
    assert sizes == [(8, 8), (32, 16)]


def test_no_more_conversations_at_once_than_the_limit() -> None:
    lock, state = threading.Lock(), {"now": 0, "most": 0}

    def turn(goal, number, request):
        with lock:
            state["now"] += 1
            state["most"] = max(state["most"], state["now"])
        time.sleep(0.05)
        with lock:
            state["now"] -= 1
        return f"{goal}\nstop"

    goals = [f"goal {number}" for number in range(12)]
    with ScriptedServer(answers(turn)) as server:
        asked = controller(server.url, limit=3)
        with asked.client:
            assert asked.reply([chat_messages(goal, []) for goal in goals]) == [f"{goal}\nstop" for goal in goals]
            assert asked.reply([]) == []
    assert state["most"] == 3


def draw(samples, seeds):
    return [Image.new("RGB", (8, 8), (sample.step, 0, 0)) for sample in samples]


def loop(turn, goals, *, retries=2, **options):
    with ScriptedServer(answers(turn)) as server:
        asked = controller(server.url, **options)
        with asked.client:
            results = run_closed_loop(asked, draw, [(goal, goal) for goal in goals], retries=retries, workers=4,
                                      budget=Budget(max_rounds=4))  # fmt: skip
    return results, server.requests


def test_a_goal_whose_controller_fails_ends_with_its_canvas_and_the_others_go_on() -> None:
    def turn(goal, number, request):
        if number == 0:
            return "draw\ngenerate <IMG_GEN_1>"
        if goal == "dies":
            return 400  # say, a conversation longer than the model's window
        return "change\nedit <IMG_GEN_2>" if number == 1 else "done\nstop"

    results, _ = loop(turn, ["dies", "lives"])
    assert [len(r.trajectory.images) for r in results] == [1, 2]
    assert results[0].stop_reason == "controller: HTTP 400: it broke" and results[1].stop_reason == "stop"


def test_a_server_that_dies_half_way_ends_every_goal_with_the_reason() -> None:
    results, _ = loop(lambda goal, number, request: 503 if number else "draw\ngenerate <IMG_GEN_1>", "abc")
    assert all(r.image is not None for r in results)
    assert {r.stop_reason for r in results} == {"controller: HTTP 503: it broke (attempt 1)"}


def test_no_server_at_all_is_a_reason_without_the_key() -> None:
    asked = controller("http://127.0.0.1:9/v1")
    with asked.client:
        (result,) = run_closed_loop(asked, draw, [("a", "a circle")])
    assert result.trajectory is None and result.stop_reason.startswith("controller: no connection")


@pytest.mark.parametrize("act", [hangs, trickles(http(200, completion("and then " * 1000)), 0.05)])
def test_a_server_that_never_ends_its_reply_is_left(act) -> None:
    with ScriptedServer(act) as server:
        asked = controller(server.url, attempt_s=0.3, deadline_s=0.5)
        began = time.monotonic()
        with asked.client:
            results = run_closed_loop(asked, draw, [(name, name) for name in "abc"])
    assert {r.stop_reason for r in results} == {"controller: no reply within 0.3 s (attempt 1)"}
    assert time.monotonic() - began < 10, "in parallel, and not asked again"


def test_further_attempts_have_seeds_of_their_own() -> None:
    def turn(goal, number, request):
        return "mumble" if "seed" not in request or request["seed"] % 2 else "fine\nstop"

    results, requests = loop(turn, [f"goal {number}" for number in range(6)], retries=8)
    again = [request for request in requests if "seed" in request]
    assert {r.stop_reason for r in results} == {"stop"}
    assert len({request["seed"] for request in again}) == len(again) >= 6
    assert all(0 <= request["seed"] < 2**31 and request["temperature"] == 1.0 for request in again)
    once_more, _ = loop(turn, ["goal 0"], retries=8)
    assert once_more[0].stop_reason == "stop"


def test_a_reply_cut_at_the_longest_length_says_so() -> None:
    with ScriptedServer(says("and then and then", finish="length")) as server:
        asked = controller(server.url, max_tokens=8)
        with asked.client:
            (reply,) = asked.reply([chat_messages("a circle", [])])
            assert reply == NoReply("reply: cut at max_tokens=8", again=True)
            (result,) = run_closed_loop(asked, draw, [("a", "a circle")], retries=1)
    assert result.stop_reason == "malformed: reply: cut at max_tokens=8" and len(server.requests) == 3


@pytest.mark.slow
@pytest.mark.skipif(not SERVING, reason="pip install -e '.[serve]'")
def test_a_real_server_sees_every_image_in_its_place(real_server) -> None:  # noqa: F811
    """The model has random weights: what it writes says nothing, but depends on all that it sees."""
    swapped = [Step(step.reasoning, step.action, {id(RED): BLUE, id(BLUE): RED}.get(id(step.image))) for step in STEPS]
    with ChatClient(real_server) as client:
        asked, said = ChatController(client), []
        for steps in (STEPS, swapped, STEPS, STEPS[:2]):
            said.append(client.ask(asked.messages(chat_messages("a circle", steps)), str).text)
        assert said[0] == said[2] and len(set(said)) == 3
        replies = asked.reply([chat_messages("a circle", STEPS)] * 2, seed=2**40 + 3)
        assert replies == [NoReply("reply: cut at max_tokens=8", again=True)] * 2 and client.counts["failed"] == 0
