"""Recipes with a teacher and judges behind servers: what is asked once, what waits, what never reaches a file."""

import json
import os
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest

from recipes import make_proxy_prompts, train_pprl
from tests.recipes.conftest import TINY, command
from tests.services.server import ScriptedServer, completion, http, says, sends

KEY = "sk-dummy-74c1"
LINES = "Alignment Score (1-5): {}\nCoherence Score (1-5): 3\nStyle Score (1-5): {}"


def number(request):
    """Something of 1 .. 4 that depends on the images."""
    images = [part["image_url"]["url"] for part in request["messages"][0]["content"] if part["type"] == "image_url"]
    return 1 + sum(map(len, images)) % 31 / 10


def judges(connection, request):
    """Both judges in one: three lines or an object, as they are asked."""
    text = request["messages"][0]["content"][-1]["text"]
    value = number(request)
    pair = json.dumps({"reasoning": "so", "score": [value * 5, 12]})
    said = LINES.format(value, 5 - value) if "Alignment" in text else pair
    connection.sendall(http(200, completion(said)))


def writes(connection, request, refuses=False):
    """A teacher that answers every context."""
    parts = request["messages"][0]["content"]
    images = sum(part["type"] == "image_url" for part in parts)
    answer = {"scene": "A red circle.", "edit": "Make it red." if images else None}
    answer["references"] = list(range(1, images + 1))
    goal = parts[0]["text"].split("Goal: ")[1].split("\n")[0]
    said = "I would rather not." if refuses and len(goal) % 3 == 0 else json.dumps(answer)
    connection.sendall(http(200, completion(said)))


def writes_some(connection, request):
    """A teacher that refuses about every third context."""
    writes(connection, request, refuses=True)


def teacher(server):
    return ["teacher=openai", "teacher.chat.model=m", f"teacher.chat.url={server.url}", "teacher.chat.backoff_s=0.01",
            "teacher.chat.retries=1", "teacher.retries=1", "teacher.chat.price_in=1000"]  # fmt: skip


def copied(world, folder):
    """The world's trajectories in a folder of one's own, without their prompts."""
    (folder / "data").mkdir()
    shutil.copy(world / "runs" / "data" / "trajectories.jsonl", folder / "data")
    shutil.copytree(world / "runs" / "data" / "images", folder / "data" / "images")
    return folder / "data"


def test_a_teacher_behind_a_server_is_asked_once_for_every_context(world, run_recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("TEACHER_KEY", KEY)
    data = copied(world, tmp_path)
    with ScriptedServer(writes_some) as server:
        words = [f"data.folder={data}", *teacher(server), "teacher.chat.key_env=TEACHER_KEY"]
        done = run_recipe(tmp_path, "make_proxy_prompts", *words)
        rows = [json.loads(line) for line in (data / "proxy_prompts.jsonl").read_text().splitlines()]
        rejected = [json.loads(line) for line in (data / "rejected.jsonl").read_text().splitlines()]
        assert rows and rejected and len(server.requests) == len(rows) + 2 * len(rejected)
        assert f"{len(rows)} proxy prompts, {len(rejected)} contexts rejected" in done.stderr
        assert f"{10 * len(server.requests)} tokens in, {2 * len(server.requests)} out" in done.stderr
        assert f"{len(server.requests) / 100:.2f} USD" in done.stderr
        assert all("reply: Expecting value" in row["reason"] for row in rejected)
        assert all((row["p_i2i"] is None) == (row["step"] == 1) for row in rows)
        asked = len(server.requests)
        again = run_recipe(tmp_path, "make_proxy_prompts", *words)
        assert len(server.requests) == asked and "0 requests" in again.stderr
    told = [done.stderr, done.stdout, *(path.read_text(errors="ignore") for path in data.glob("*.*") if path.is_file())]
    assert not any(KEY in text for text in told)


def test_a_teacher_that_goes_away_loses_nothing(world, run_recipe, tmp_path):
    data = copied(world, tmp_path)
    with ScriptedServer(*[writes] * 5, sends(http(500, "down"))) as server:
        words = [f"data.folder={data}", *teacher(server), "teacher.chat.limit=1", "teacher.chat.breaker=2"]
        ended = run_recipe(tmp_path, "make_proxy_prompts", *words, check=False)
        assert ended.returncode == 1 and ended.stderr.count("error: ") == 1
        assert "steps are not answered (HTTP 500: down (attempt 2))" in ended.stderr
        assert not (data / "proxy_prompts.jsonl").exists()
        before = len(server.requests)
        server.script = [writes]
        run_recipe(tmp_path, "make_proxy_prompts", *words)
        asked = [request["messages"] for request in server.requests]
        assert not any(messages in asked[:5] for messages in asked[before:])
    assert (data / "proxy_prompts.jsonl").exists() and not (data / "proxy_prompts.partial.jsonl").exists()


@pytest.fixture
def refusal(world, monkeypatch, capsys):
    """refusal(main, *words) -> what a recipe says that ends with status 1."""
    monkeypatch.chdir(world)

    def run(main, *words):
        with pytest.raises(SystemExit) as end:
            main(list(words))
        assert end.value.code == 1
        return capsys.readouterr().err

    return run


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["teacher=gpt"], "unknown teacher 'gpt'"),
        (["teacher=openai"], "make_proxy_prompts needs teacher.chat.model=..."),
        (["teacher=openai", "teacher.chat.model=m", "teacher.chat.key_env=NO_KEY"], "key_env=NO_KEY: the environment"),
        (["teacher=openai", "teacher.chat.model=m", "teacher.chat.url=http://joe:pw@h/v1"], "url of h: without name"),
    ],
)
def test_a_teacher_that_cannot_be_built_is_named(world, refusal, overrides, message):
    said = refusal(make_proxy_prompts.main, "data.folder=runs/data", *overrides)
    assert message in said and "joe" not in said


def pprl(server, run, *more):
    return [f"run={run}", "data.folder=runs/data", "model.folder=base", *TINY, "pprl.epochs=2", "rollout.groups=4",
            "rollout.group_size=3", "rollout.steps=2", "rollout.cfg=1.0", "pprl.save_every=1", "reward=unified_reward",
            f"reward.unified_reward.url={server.url}", f"reward.unified_reward_edit.url={server.url}",
            "reward.chat.backoff_s=0.01", "reward.chat.retries=0", "reward.wait_s=0.2", "sentinel.probe=0",
            *more]  # fmt: skip


def weights(folder, run):
    return (folder / "runs" / run / "model" / "transformer" / "diffusion_pytorch_model.safetensors").read_bytes()


def rows(folder, run, name):
    return [json.loads(line) for line in (folder / "runs" / run / name).read_text().splitlines()]


def test_judges_behind_servers_train_and_an_outage_at_any_time_changes_nothing(world, run_recipe):
    """A run without an outage, and one whose judge is away in the second epoch, is ended there and started again."""
    with ScriptedServer(judges) as server:
        run_recipe(world, "train_pprl", *pprl(server, "whole", "reward.chat.cache=null"))
        total = len(server.requests)
    metrics = rows(world, "whole", "metrics.jsonl")
    assert metrics[-1]["judge_requests"] == total and metrics[-1]["missing_scores"] == 0
    parts = rows(world, "whole", "rollouts.jsonl")[0]["parts"]
    assert {"alignment", "coherence", "style"} <= {name.removeprefix("global_") for name in parts}

    down = sends(http(500, "down"))
    with ScriptedServer(*[judges] * (total // 2), down) as server:
        server.health = 500
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        words = command("train_pprl", *pprl(server, "outage", "reward.chat.cache=runs/replies"))
        with subprocess.Popen(words, cwd=world, env=environment, stderr=subprocess.PIPE, text=True) as process:
            said = ""
            while "waiting for the judges" not in said:
                line = process.stderr.readline()
                assert line, said
                said += line
            time.sleep(0.5)
            process.send_signal(signal.SIGTERM)
            said += process.stderr.read()
        assert process.returncode == 143, said
        server.health, asked = 200, len(server.requests)
        server.script = [judges]
        run_recipe(world, "train_pprl", *pprl(server, "outage", "reward.chat.cache=runs/replies"))
        assert len(server.requests) - asked <= total - total // 2
    assert weights(world, "outage") == weights(world, "whole")
    assert rows(world, "outage", "rollouts.jsonl") == rows(world, "whole", "rollouts.jsonl")


def test_a_judge_that_comes_back_lets_the_run_go_on(world, run_recipe):
    with ScriptedServer(judges) as server:
        server.script = [sends(http(500, "down"))]
        server.health = 500

        def mend():
            while len(server.requests) < 4:
                time.sleep(0.05)
            time.sleep(1.0)
            server.script, server.health = [judges], 200

        threading.Thread(target=mend, daemon=True).start()
        done = run_recipe(world, "train_pprl", *pprl(server, "back", "reward.chat.breaker=4", "reward.chat.cache=null"))
    assert "1 of the scores are missing" in done.stderr
    assert weights(world, "back") and rows(world, "back", "metrics.jsonl")[-1]["missing_scores"] == 0


def test_a_judge_that_talks_nonsense_ends_the_run_with_its_reason(world, run_recipe):
    with ScriptedServer(says("score 11")) as server:
        done = run_recipe(world, "train_pprl", *pprl(server, "nonsense", "reward.chat.cache=null"), check=False)
    assert done.returncode == 1 and done.stderr.count("error: ") == 1
    assert "although the judges answer: reply: not the three lines" in done.stderr
    assert not (world / "runs" / "nonsense" / "model").exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["reward=gpt"], "unknown reward 'gpt'"),
        (["reward=clip"], "train_pprl needs reward.clip.folder=..."),
        (["reward=clip", "reward.clip.folder=base"], "reward.of_edits: no judge has a weight above 0"),
        (["reward=clip", "reward.clip.folder=base", "pprl.weight_edit=0"], "base: no folder of a CLIP model"),
        (["reward.prompts=x"], "reward.prompts='x' is not one of proxy, simple"),
        (["reward.of_images.shapes=-1"], "reward.of_images.shapes=-1: a weight of at least 0 is needed"),
        (["reward.mix=sum"], "mix='sum' is not one of weighted, normalised"),
        (["reward=unified_reward", "reward.unified_reward.template=no.txt"], "no.txt"),
    ],
)
def test_a_reward_that_cannot_be_built_is_named(world, refusal, overrides, message):
    words = ["run=no_judge", "data.folder=runs/data", "model.folder=base", *TINY, "pprl.epochs=1", "rollout.groups=1",
             "rollout.group_size=2", "rollout.steps=2"]  # fmt: skip
    assert message in refusal(train_pprl.main, *words, *overrides)
    assert not list(Path(world / "runs" / "no_judge").glob("model"))
