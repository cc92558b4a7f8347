"""The chat client against a server that misbehaves in every way known, over real sockets."""

import json
import logging
import os
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import CancelledError, ThreadPoolExecutor

import pytest
from PIL import Image

from clvr_train.services.chat import ChatClient, user_turn
from clvr_train.services.options import ChatOptions, retry_after_s
from tests.services.server import ScriptedServer, completion, hangs, http, says, sends, trickles

HELLO = [user_turn("hello")]
FAST = {"backoff_s": 0.01, "attempt_s": 5.0, "deadline_s": 10.0, "retries": 3, "breaker": 100}


def client(server, **options):
    url = server.url if isinstance(server, ScriptedServer) else server
    return ChatClient(ChatOptions(url=url, model="m", **(FAST | options)))


def ask(*script, parse=str, **options):
    """The answer to one request, the requests that it took, and the seconds."""
    with ScriptedServer(*script) as server, client(server, **options) as chat:
        start = time.monotonic()
        answer = chat.ask(HELLO, parse)
        return answer, len(server.requests), time.monotonic() - start


def test_a_reply_and_what_was_sent():
    image = Image.new("RGB", (8, 8), "red")
    with ScriptedServer(says("fine")) as server, client(server, max_tokens=7, price_in=1e5, price_out=2e5) as chat:
        answer = chat.ask([user_turn(image, "what is it?")], str.upper)
        assert (answer.value, answer.text, answer.reason) == ("FINE", "fine", "")
        assert chat.counts["tokens_in"], chat.counts["tokens_out"] == (10, 2)
        assert chat.counts["cost_usd"] == pytest.approx(1.4)
        body = server.requests[0]
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("m", 0, 7)
    picture, text = body["messages"][0]["content"]
    assert picture["image_url"]["url"].startswith("data:image/jpeg;base64,/9j/") and text["text"] == "what is it?"


@pytest.mark.parametrize("status", [408, 429, 500, 503])
def test_what_may_pass_is_tried_again(status):
    answer, requests, _ = ask(*[sends(http(status, "busy"))] * 3, says("fine"))
    assert answer.value == "fine" and requests == 4


@pytest.mark.parametrize("status", [301, 400, 401, 404, 422])
def test_other_statuses_are_final(status):
    answer, requests, _ = ask(sends(http(status, "no\nsuch <b>model</b>", "Location: /elsewhere\r\n")), says("fine"))
    assert answer.value is None and answer.away == (status not in (400, 422)) and requests == 1
    assert answer.reason == f"HTTP {status}: no such <b>model</b>"


def test_a_connection_that_breaks_is_tried_again():
    cut = http(200, completion("fine"))[:-20]
    answer, requests, _ = ask(lambda connection, _: None, sends(cut), says("fine"))
    assert answer.value == "fine" and requests == 3


def test_a_refused_connection_fails_with_its_attempts():
    with ScriptedServer(says("never")) as server:
        url = server.url
    with client(url, retries=2) as chat:
        answer = chat.ask(HELLO, str)
        assert answer.value is None and answer.reason.startswith("no connection: ConnectError")
        assert answer.reason.endswith("(attempt 3)") and chat.counts["attempts"] == 3
        assert not chat.healthy()


BROKEN = {
    "html": "<html>bad gateway</html>",
    "truncated": completion("fine")[:-10],
    "nan": completion("fine").replace("10", "NaN"),
    "no choices": '{"choices": []}',
    "wrong fields": '{"result": "fine"}',
    "list": "[]",
    "null message": '{"choices": [{"message": null}]}',
    "deep": "[" * 100_000,
    "binary": b"\xff\xfe\x00",
    "twice": completion("fine")[:-1] + ', "choices": []}',
}


@pytest.mark.parametrize("body", BROKEN.values(), ids=BROKEN)
def test_a_body_that_is_no_completion_is_a_failure_and_not_tried_again(body):
    answer, requests, _ = ask(sends(http(200, body)), says("fine"))
    assert answer.value is None and answer.away and requests == 1
    assert answer.reason.startswith("no chat completion (") and len(answer.reason) <= 200


@pytest.mark.parametrize(
    ("act", "reason"),
    [
        (says("half of", finish="length"), "reply: cut at max_tokens=1024"),
        (says(None, refusal="I cannot"), "reply: refused: I cannot"),
        (says(None), "reply: no text"),
        (says("\ud800"), "reply: not Unicode text"),
        (says(None, refusal="no \ud800"), "reply: refused: no ?"),
        (says("seven"), "reply: invalid literal for int() with base 10: 'seven'"),
    ],
)
def test_a_bad_reply_is_told_from_a_server_that_is_away(act, reason):
    answer, requests, _ = ask(act, parse=int)
    assert (answer.value, answer.away, answer.reason, requests) == (None, False, reason, 1)


def test_a_body_of_ten_megabytes_is_not_read():
    answer, requests, seconds = ask(sends(http(200, completion("x" * 10_000_000))))
    assert answer.reason == "a reply of more than 1000000 bytes" and requests == 1 and seconds < 5


SLOW = {
    "hang": hangs,
    "body": trickles(http(200, completion("fine")), 0.02),
    "headers": trickles(b"HTTP/1.1 200 X\r\n" + b"X-A: b\r\n" * 500, 0.02),
}


@pytest.mark.parametrize("act", SLOW.values(), ids=SLOW)
def test_an_attempt_ends_at_its_time_however_it_trickles(act):
    answer, requests, seconds = ask(act, says("fine"), attempt_s=0.3)
    assert answer.value == "fine" and requests == 2 and 0.3 <= seconds < 1.5


@pytest.mark.parametrize("act", [*SLOW.values(), sends(http(500, "no"), wait_s=0.2)], ids=[*SLOW, "500"])
def test_a_request_ends_at_its_deadline_with_all_attempts(act):
    answer, requests, seconds = ask(act, attempt_s=0.4, deadline_s=1.0, retries=1000)
    assert answer.value is None and answer.away and requests > 1 and 0.5 < seconds < 2


def test_a_server_that_asks_for_patience_gets_it_from_all_requests():
    with ScriptedServer(sends(http(429, "slow", "Retry-After: 1\r\n")), says("fine")) as server:
        with client(server) as chat:
            start = time.monotonic()
            assert chat.ask(HELLO, str).value == "fine"
            assert time.monotonic() - start >= 1.0
        with client(server) as chat:
            server.script, server.requests = [sends(http(429, "slow", "Retry-After: 1\r\n")), says("fine")], []
            first = threading.Thread(target=chat.ask, args=(HELLO, str))
            first.start()
            while not server.requests:
                time.sleep(0.01)
            time.sleep(0.1)
            start = time.monotonic()
            assert chat.ask(HELLO, str).value == "fine"
            assert time.monotonic() - start >= 0.7
            first.join()


def test_patience_beyond_the_deadline_is_a_failure_at_once():
    script = [sends(http(429, "tomorrow", f"Retry-After: {9 * 10**400}\r\n")), says("fine")]
    with ScriptedServer(*script) as server, client(server) as chat:
        start = time.monotonic()
        assert chat.ask(HELLO, str).reason == "HTTP 429: tomorrow (attempt 1)"
        assert chat.ask(HELLO, str).reason.startswith("not asked: the server wants") and len(server.requests) == 1
        assert chat.healthy() and chat.ask(HELLO, str).value == "fine"
        assert time.monotonic() - start < 2


@pytest.mark.parametrize(
    ("header", "seconds"),
    [("3", 3.0), ("0", 0.0), ("Wed, 21 Oct 2015 07:28:00 GMT", 0.0), ("soon", None), ("-1", None), ("٣", None),
     ("nan", None), (None, None)],
)  # fmt: skip
def test_retry_after(header, seconds):
    assert retry_after_s(header) == seconds


def test_no_more_requests_than_the_limit_are_under_way():
    now, most, lock = 0, 0, threading.Lock()

    def act(connection, request):
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        time.sleep(0.05)
        with lock:
            now -= 1
        says("fine")(connection, request)

    with ScriptedServer(act) as server, client(server, limit=3) as chat, ThreadPoolExecutor(12) as pool:
        assert {a.value for a in pool.map(lambda _: chat.ask(HELLO, str), range(12))} == {"fine"}
    assert most == 3


SLEEPER = """
    import asyncio, json
    body = json.dumps({"choices": [{"message": {"content": "fine"}, "finish_reason": "stop"}]}).encode()
    async def serve(reader, writer):
        try:
            while head := await reader.readuntil(b"\\r\\n\\r\\n"):
                lines = head.decode().lower().split("\\r\\n")
                size = next(int(line[15:]) for line in lines if line.startswith("content-length"))
                await reader.readexactly(size)
                await asyncio.sleep(0.1)
                writer.write(b"HTTP/1.1 200 OK\\r\\nContent-Length: %d\\r\\n\\r\\n" % len(body) + body)
        except asyncio.IncompleteReadError:
            writer.close()
    async def main():
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        print(server.sockets[0].getsockname()[1], flush=True)
        await server.serve_forever()
    asyncio.run(main())
"""


# Starts a client and times its first requests, in a process of its own: seconds, and seconds of the processor.
FIRST = """
    import sys, time
    from concurrent.futures import ThreadPoolExecutor
    from clvr_train.services.chat import ChatClient, user_turn
    from clvr_train.services.options import ChatOptions
    with ChatClient(ChatOptions(url=sys.argv[1], model="m", limit=32)) as chat, ThreadPoolExecutor(32) as pool:
        start, busy = time.monotonic(), time.process_time()
        answers = list(pool.map(lambda n: chat.ask([user_turn(str(n))], str), range(64)))
        print(time.monotonic() - start, time.process_time() - busy)
    assert {answer.value for answer in answers} == {"fine"}
"""


def test_64_requests_of_100_ms_at_limit_32_take_at_most_350_ms():
    """Two rounds of 100 ms and what the processor does, which is at most 150 ms on any machine, however busy: so 0.35 s
    where one is free. There the clock is looked at too, and half of the processes have to keep to it.
    """
    command = [sys.executable, "-c", textwrap.dedent(SLEEPER)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            url = f"http://127.0.0.1:{server.stdout.readline().strip()}/v1"
            first = [sys.executable, "-c", textwrap.dedent(FIRST), url]
            runs = [subprocess.run(first, capture_output=True, text=True, check=True).stdout.split() for _ in range(5)]
        finally:
            server.terminate()
    seconds, busy = (sorted(map(float, values)) for values in zip(*runs, strict=True))
    assert busy[0] <= 0.15, busy
    if os.getloadavg()[0] < os.cpu_count() - 0.5:
        assert seconds[2] <= 0.35, seconds


def test_the_cache_keeps_what_was_accepted_and_nothing_else(tmp_path):
    image, other = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")
    cache = {"cache": str(tmp_path / "cache")}
    with ScriptedServer(says("seven"), says("7"), says("8")) as server:
        with client(server, **cache) as chat:
            assert chat.ask([user_turn(image)], int).reason.startswith("reply: ")
            assert chat.ask([user_turn(image)], int).value == 7
        with client(server, **cache) as chat:
            assert chat.ask([user_turn(image)], int).value == 7
            assert chat.counts["cached"] == 1 and chat.counts["attempts"] == 0
            assert chat.ask([user_turn(other)], int).value == 8
        (kept,) = [path for path in (tmp_path / "cache").rglob("*.json") if '"7"' in path.read_text()]
        for damage in ("", '{"text": ', '{"text": 5}', "[1]", '{"text": "seven"}'):
            kept.write_text(damage)
            server.script.append(says("7"))
            with client(server, **cache) as chat:
                assert chat.ask([user_turn(image)], int).value in (7, 8) and chat.counts["attempts"] == 1
    assert not list((tmp_path / "cache").rglob("*.tmp"))


def test_another_model_or_server_is_asked_anew(tmp_path):
    with ScriptedServer(says("1")) as server, ScriptedServer(says("2")) as second:
        for url, model in ((server.url, "a"), (server.url, "b"), (second.url, "a")):
            with ChatClient(ChatOptions(url=url, model=model, cache=str(tmp_path))) as chat:
                chat.ask(HELLO, str)
        assert len(server.requests) == 2 and len(second.requests) == 1


def test_the_circuit_opens_lets_one_try_and_closes():
    down = ScriptedServer(sends(http(500, "down")))
    with down as server, client(down, retries=0, breaker=3, cooldown_s=0.5) as chat:
        reasons = [chat.ask(HELLO, str).reason for _ in range(6)]
        assert reasons[:3] == ["HTTP 500: down (attempt 1)"] * 3 and len(server.requests) == 3
        assert set(reasons[3:]) == {"not asked: 3 requests in a row failed (HTTP 500: down (attempt 1))"}
        time.sleep(0.6)
        assert chat.ask(HELLO, str).reason.startswith("HTTP 500") and len(server.requests) == 4
        assert chat.ask(HELLO, str).reason.startswith("not asked") and len(server.requests) == 4
        server.script = [says("fine")]
        assert chat.healthy()  # looks without waiting for the cool-down
        assert [chat.ask(HELLO, str).value for _ in range(3)] == ["fine"] * 3


@pytest.mark.parametrize("act", [says("seven"), sends(http(400, "too long"))])
def test_bad_replies_and_bad_requests_do_not_open_the_circuit(act):
    with ScriptedServer(act) as server, client(server, breaker=2) as chat:
        for _ in range(5):
            chat.ask(HELLO, int)
        assert len(server.requests) == 5


def test_a_key_comes_from_the_environment_and_is_never_told(monkeypatch, caplog, tmp_path):
    key = "sk-dummy-5f2b"
    monkeypatch.setenv("JUDGE_KEY", key)
    caplog.set_level(logging.DEBUG)
    echo = sends(http(401, f'{{"error": "Incorrect API key provided: {key}"}}'))
    options = {"key_env": "JUDGE_KEY", "cache": str(tmp_path), "retries": 0}
    with ScriptedServer(echo, says("fine")) as server, client(server, **options) as chat:
        refused = chat.ask(HELLO, str)
        assert refused.reason == 'HTTP 401: {"error": "Incorrect API key provided: ***"}'
        assert chat.ask(HELLO, str).value == "fine"
        assert f"authorization: bearer {key}" in [line.lower() for line in server.heads[0]]
        told = [repr(chat.options), repr(chat.counts), repr(refused), caplog.text]
    told += [path.read_text() for path in tmp_path.rglob("*.json")]
    assert not any(key in text for text in told)


def test_proxies_of_the_environment_are_not_used(monkeypatch):
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    assert ask(says("fine"))[0].value == "fine"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"url": "localhost:8080"}, "url: http://host:port/v1 or https://... is needed"),
        ({"url": "http://joe:sesame@h/v1"}, "url of h: without name, password and query; a key comes from key_env"),
        ({"url": "http://h/v1?key=sesame"}, "url of h: without name, password and query; a key comes from key_env"),
        ({"key_env": "NOT_SET"}, "key_env=NOT_SET: the environment variable is not set"),
        ({"key_env": "ODD"}, "key_env=ODD: its value cannot be sent as a key"),
        ({"limit": 0}, "limit=0, breaker=16: at least 1; retries: at least 0"),
    ],
)
def test_options_that_cannot_work_are_named_without_secrets(options, message, monkeypatch):
    monkeypatch.setenv("ODD", "sesame\nopen")
    with pytest.raises(ValueError) as error:
        ChatClient(ChatOptions(**({"url": "http://h/v1", "model": "m"} | options)))
    assert str(error.value) == message and "sesame" not in str(error.value)


def test_a_full_disk_costs_the_entry_and_not_the_reply(tmp_path, caplog):
    with ScriptedServer(says("fine")) as server, client(server, cache=str(tmp_path / "cache")) as chat:
        (tmp_path / "cache").rmdir()
        (tmp_path / "cache").write_text("no folder any more")
        assert chat.ask(HELLO, str).value == "fine"
    assert "a reply was not kept" in caplog.text


def test_messages_are_plain_json():
    assert json.loads(json.dumps(user_turn("a", Image.new("L", (4, 4)))))["role"] == "user"


def test_closing_ends_what_is_under_way():
    with ScriptedServer(hangs) as server, ThreadPoolExecutor(1) as pool:
        chat = client(server, attempt_s=60, deadline_s=60)
        waiting = pool.submit(chat.ask, HELLO, str)
        while not server.requests:
            time.sleep(0.01)
        start = time.monotonic()
        chat.close()
        with pytest.raises(CancelledError):
            waiting.result()
        assert time.monotonic() - start < 2


def test_the_seconds_of_requests_that_the_cache_did_not_answer(tmp_path):
    def late(connection, body):
        time.sleep(0.2)
        says("fine")(connection, body)

    with ScriptedServer(late) as server, client(server, cache=str(tmp_path)) as chat:
        assert chat.ask(HELLO, str).value == "fine"
        taken = chat.counts["seconds"]
        assert 0.2 <= taken < 5.0
        assert chat.ask(HELLO, str).value == "fine" and chat.counts["cached"] == 1
        assert chat.counts["seconds"] == taken
        refused = chat.ask([user_turn("other")], float)
        assert refused.value is None and chat.counts["seconds"] > taken
