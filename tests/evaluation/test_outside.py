"""Outside benchmarks end to end: a miniature checkout, pictures of a tiny model, a scripted judge or scorer, a number
worked out by hand.
"""

import json
import logging
import os
import re
import signal
import subprocess
import sys
import time

import pytest
from PIL import Image

from clvr_train.data.images import open_image
from clvr_train.evaluation import scores
from recipes import evaluate
from tests.evaluation import checkouts
from tests.recipes.conftest import command
from tests.services.server import ScriptedServer, completion, http, sends

DRAW = ["model.window=48", "steps=1", "cfg=1", "batch=4"]
DOWN = sends(http(500, "down"))


def says(answer):
    """A judge whose reply is a function of what it is asked: of all texts together."""

    def act(connection, request):
        texts = []
        for message in request["messages"]:
            parts = message["content"] if isinstance(message["content"], list) else [{"text": message["content"]}]
            texts += [part["text"] for part in parts if "text" in part]
        connection.sendall(http(200, completion(answer("\n".join(texts)))))

    return act


@pytest.fixture
def run(tmp_path, monkeypatch, tiny_folder):
    """run(name, *words) -> the folder of an evaluation by the recipe, which has ended well."""
    monkeypatch.chdir(tmp_path)

    def evaluated(name, *words):
        evaluate.main([f"run={name}", f"model.folder={tiny_folder}", *DRAW, *words])
        return tmp_path / "runs" / name

    return evaluated


@pytest.fixture
def fails(run, capsys):
    """fails(name, *words) -> the one line that the recipe says when it ends with status 1."""

    def failed(name, *words):
        with pytest.raises(SystemExit) as end:
            run(name, *words)
        assert end.value.code == 1
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1
        return lines[0]

    return failed


def judged(server, benchmark, root, *more):
    return [f"benchmark={benchmark}", f"benchmark.root={root}", f"judge.url={server.url}", "judge.backoff_s=0.01",
            "judge.retries=0", *more]  # fmt: skip


def summary(folder):
    return json.loads((folder / "evaluation.json").read_text())


def rows(folder, name="outcomes.jsonl"):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def pictures(folder):
    return {path.relative_to(folder / "images").as_posix(): path.read_bytes() for path in folder.glob("images/**/*.*g")}


GENEVAL = ["benchmark=geneval", "benchmark.samples=2", "benchmark.args=[--model-path,detector]",
           'benchmark.env=["DETECTOR=on"]']  # fmt: skip


def test_geneval_is_scored_by_its_own_script(run, tmp_path):
    """Right are the first pictures of all prompts but the bench: 2 of 6 single objects, 1 of 2 countings."""
    root = checkouts.geneval(tmp_path / "geneval")
    folder = run("g", *GENEVAL, f"benchmark.root={root}")
    found = summary(folder)
    assert found["score"] == pytest.approx((2 / 6 + 1 / 2) / 2)
    assert found["score_se"] == pytest.approx(0.5 * (2 / 6 * 4 / 6 / 6 + 0.25 / 2) ** 0.5)
    assert (found["pass_rate"], found["n"], found["num"], found["coverage"], found["judge"]) == (3 / 8, 8, 8, 1, None)
    assert found["tags"]["single_object"]["passes"] == 2 and found["tags"]["counting"]["n"] == 2
    assert found["ci95"][0] < 3 / 8 < found["ci95"][1] and found["nfe_per_goal"] == 1
    lines = (root / "prompts" / "evaluation_metadata.jsonl").read_text().splitlines()
    layout = folder / "images"
    assert sorted(path.name for path in layout.iterdir()) == ["00000", "00001", "00002", "00003"]
    for number, line in enumerate(lines):
        assert json.loads((layout / f"{number:05d}" / "metadata.jsonl").read_text()) == json.loads(line)
        assert sorted(p.name for p in (layout / f"{number:05d}" / "samples").iterdir()) == ["0000.png", "0001.png"]
    drawn = pictures(folder)
    assert drawn["00000/samples/0000.png"] != drawn["00000/samples/0001.png"]  # a seed each
    outcomes = rows(folder)
    assert [row["passed"] for row in outcomes] == [False, False, True, False, True, False, True, False]
    assert "load_models" in (folder / "scorer" / "scorer.log").read_text()


def test_a_scorer_that_fails_names_its_log_and_loses_no_picture(run, fails, tmp_path):
    root = checkouts.geneval(tmp_path / "geneval")
    words = [*GENEVAL, f"benchmark.root={root}"]
    said = fails("g", *words, "benchmark.args=[--model-path,none]")
    folder = tmp_path / "runs" / "g"
    assert "evaluate_images.py ended with status 1 (AssertionError: no detector)" in said
    assert f"{folder}/scorer/scorer.log" in said and not (folder / "evaluation.json").exists()
    before = {path: path.stat().st_mtime_ns for path in folder.glob("images/**/*.png")}
    assert "benchmark.python=/no/python: No such file" in fails("g", *words, "benchmark.python=/no/python")
    run("g", *words)
    assert len(before) == 8 and before == {path: path.stat().st_mtime_ns for path in before}


def test_geneval_pp_counts_from_one_and_says_what_must_be_there(run, tmp_path):
    """Right: the cups and the tie. The bus gets no usable answer: missing, not wrong."""
    asked = []

    def answer(text):
        asked.append(text)
        if "bus" in text:
            return "It looks fine to me."
        return "```json\n" + json.dumps({"correct": int("dogs" not in text), "reason": "so"}) + "\n```"

    root = checkouts.echo4o(tmp_path / "echo")
    with ScriptedServer(says(answer)) as server:
        folder = run("pp", *judged(server, "geneval_pp", root, "judge.model=m"))
    assert sorted(pictures(folder)) == ["1.jpg", "2.jpg", "3.jpg", "4.jpg"]
    with Image.open(folder / "images" / "1.jpg") as picture:
        assert picture.format == "JPEG"
    found = summary(folder)
    assert found["score"] == pytest.approx((1 / 2 + 1) / 2)  # of the two tags that have answers
    assert found["released_score"] == pytest.approx((1 / 2 + 0 + 1) / 3)  # its scorer calls the missing one wrong
    assert (found["n"], found["num"], found["coverage"], found["judge"]) == (3, 4, 0.75, "m")
    assert found["tags_without"] == ["size_spatial_attr"] and list(found["missing"]) == ["reply: no JSON object"]
    assert (found["wording"], found["published_judge"]) == ("clvr_train", "gpt-4.1")
    assert [row["passed"] for row in rows(folder)] == [True, False, None, True]
    bus = next(text for text in asked if "bus" in text)
    assert "- 1 larger bus, in the left part" in bus and "- 1 smaller cat, in the right part" in bus
    assert any("- 2 cups\n- no more than 2 of: cup" in text for text in asked)
    request = server.requests[0]
    assert (request["model"], request["temperature"], request["max_tokens"]) == ("m", 0, 200)
    assert request["messages"][1]["content"][1]["image_url"]["url"].startswith("data:image/jpeg;base64,")


def imagine(text):
    i = int(re.search(r"thing (\d)", text)[1])
    return (
        f"**Fantasy Fulfillment**: {10 - i}\nReason: the Identity Preservation 3 is low.\n\n"
        f"Identity Preservation: 7\nReason: so.\n\nAesthetic Quality: 5/10\nReason: so.\n"
    )


# 0.8 min(10 - i, 7) + 0.2 * 5 for i = 1 .. 6
VALUES = [6.6, 6.6, 6.6, 5.8, 5.0, 4.2]
SHIFT, HYBRID, SPATIO, MULTI = 6.6, 5.8, 5.0, 4.2


def test_imaginebench_counts_the_group_that_its_scorer_drops(run, tmp_path):
    root = checkouts.echo4o(tmp_path / "echo")
    checkouts.write_script(root / "test_scripts" / "Eval-gpt-4.1-Imagine.py", checkouts.IMAGINE_SCRIPT)
    with ScriptedServer(says(imagine)) as server:
        folder = run("i", *judged(server, "imaginebench", root))
    found = summary(folder)
    assert found["score"] == pytest.approx((3 * SHIFT + 2 * HYBRID + 2 * SPATIO + 2 * MULTI) / 9)
    assert found["released_score"] == pytest.approx((3 * SHIFT + 2 * HYBRID + 2 * SPATIO) / 7)
    assert [row["score"] for row in rows(folder)] == pytest.approx(VALUES) and "pass_rate" not in found
    assert found["mean_score"] == pytest.approx(sum(VALUES) / 6) and found["scale"] == 10
    assert found["judge"] == found["published_judge"] == "gpt-4.1-2025-04-14"
    assert found["wording"].endswith("Eval-gpt-4.1-Imagine.py") and found["tags"]["Attribute shift"]["n"] == 3
    system, user = server.requests[0]["messages"]
    assert system["content"][0]["text"] == "Words of the authors."
    assert user["content"][0]["text"].startswith("Grade it.")
    assert user["content"][1]["image_url"]["url"].startswith("data:image/png;base64,")
    assert sorted(pictures(folder)) == [f"{i}.png" for i in range(1, 7)]


def prism(text):
    """8 for the alignment, 6 for the aesthetics; track `style` gets 3 and no score for its second aesthetics."""
    aesthetic = "whatever the text says" in text
    if "style number" in text:
        return "no idea" if aesthetic and "number 1" in text else '{"justification": "x", "score": 3,}'
    return json.dumps({"justification": "x", "score": 6 if aesthetic else 8})


def test_prism_says_what_its_scorer_skips_in_silence(run, tmp_path):
    root = checkouts.prism(tmp_path / "prism")
    with ScriptedServer(says(prism)) as server:
        folder = run("p", *judged(server, "prism", root))
        assert len(server.requests) == 28 and {request["seed"] for request in server.requests} == {42}
    found = summary(folder)
    assert found["score"] == pytest.approx((12 * 8 + 12 * 6 + 3 * 3) / 27)
    assert (found["n"], found["num"], found["coverage"]) == (27, 28, 27 / 28)
    assert found["parts"]["alignment"]["mean_score"] == pytest.approx((12 * 8 + 2 * 3) / 14)
    assert found["parts"]["aesthetic"]["mean_score"] == pytest.approx((12 * 6 + 3) / 13)
    style = {"mean_score": 3, "mean_score_se": 0, "ci95": [3, 3], "n": 3, "num": 4, "coverage": 0.75}
    assert found["tags"]["style"] == style
    assert len(pictures(folder)) == 14 and "long_text/1.png" in pictures(folder)
    missing = [row for row in rows(folder) if row["score"] is None]
    assert [row["id"] for row in missing] == ["style/1"] and missing[0]["alignment"] == 3


def test_prism_in_chinese_reads_other_captions(run, fails, tmp_path):
    root = checkouts.prism(tmp_path / "prism", "zh")
    with ScriptedServer(says(prism)) as server:
        assert "captions/en/imagination.jsonl: not found" in fails("p", *judged(server, "prism", root))
        assert summary(run("p", *judged(server, "prism", root, "benchmark.language=zh")))["num"] == 28


def knows(wrong, text):
    return "Score: 0" if any(f"Prompt {i}\"" in text for i in wrong) else "**Score**: 1"


def test_wise_verified_weighs_its_categories_by_its_own_ids(run, tmp_path):
    """400 is culture's last, 401 a time, 540 a space, 750 biology, 850 physics, 950 chemistry."""
    root = checkouts.wise(tmp_path / "wise")
    with ScriptedServer(says(lambda text: knows([3, 540, 950], text))) as server:
        folder = run("w", *judged(server, "wise_verified", root))
        assert server.requests[0]["chat_template_kwargs"] == {"enable_thinking": False}
        plain = run("w2", *judged(server, "wise_verified", root, "judge.extra=false"))
        assert "chat_template_kwargs" not in server.requests[-1]
    found = summary(folder)
    assert found["score"] == pytest.approx(0.4 * 0.75 + 0.12 * (1 + 0 + 1 + 1 + 0))
    assert found["pass_rate"] == pytest.approx(6 / 9) and found["judge"] == "Qwen3.5-35B-A3B"
    assert {tag: row["n"] for tag, row in found["tags"].items()} == {
        "CULTURE": 4, "TIME": 1, "SPACE": 1, "BIOLOGY": 1, "PHYSICS": 1, "CHEMISTRY": 1}  # fmt: skip
    assert sorted(pictures(folder)) == sorted(f"{i}.png" for i in (1, 2, 3, 400, 401, 540, 750, 850, 950))
    assert summary(plain)["score"] == found["score"]


def test_wise_as_first_released_is_another_benchmark(run, tmp_path):
    """540 is a time here and 750 biology; three grades, other weights."""
    root = checkouts.wise(tmp_path / "wise")

    def answer(text):
        grade = 0 if 'Prompt 540"' in text else 2
        return f"Consistency: {grade}\nRealism: 1\nAesthetic Quality: 0"

    with ScriptedServer(says(answer)) as server:
        found = summary(run("w", *judged(server, "wise", root)))
    high, low = (0.7 * 2 + 0.2) / 2, 0.2 / 2
    assert found["benchmark"] == "wise" and found["published_judge"] == "gpt-4o-2024-05-13"
    # no prompt is a space by these ids: the other weights, 0.4 + 0.167 + 3 * 0.1
    assert found["tags_without"] == ["SPACE"]
    assert found["score"] == pytest.approx((0.4 * high + 0.167 * (high + low) / 2 + 0.3 * high) / 0.867)
    assert found["tags"]["TIME"]["n"] == 2


def test_a_judge_that_dies_half_way_is_asked_only_for_the_rest(run, fails, tmp_path):
    root = checkouts.echo4o(tmp_path / "echo")
    with ScriptedServer(says(imagine), says(imagine), says(lambda text: "?"), DOWN) as server:
        words = judged(server, "imaginebench", root, "judge.limit=1", "judge.breaker=1")
        said = fails("i", *words)
        assert "the judge is away, 3 of 6 answers are lacking (HTTP 500: down (attempt 1))" in said
        assert "run the same command again to go on" in said
        folder = tmp_path / "runs" / "i"
        kept = (folder / "verdicts.jsonl").read_text()
        assert len(kept.splitlines()) == 3 and not (folder / "evaluation.json").exists()
        drawn = {path: path.stat().st_mtime_ns for path in folder.glob("images/*.png")}
        with (folder / "verdicts.jsonl").open("a") as file:
            file.write('{"id": "4", "val')  # a kill in the middle of a line
        before = len(server.requests)
        server.script = [says(imagine)]
        run("i", *words)
        assert len(server.requests) == before + 3
        asked = [re.search(r"thing (\d)", json.dumps(request["messages"]))[1] for request in server.requests]
        assert sorted(asked[:3] + asked[before:]) == list("123456")  # each once that was answered
        assert {path: path.stat().st_mtime_ns for path in drawn} == drawn
    found = summary(folder)
    assert (found["n"], found["num"]) == (5, 6) and "0 lines 'Fantasy Fulfillment" in next(iter(found["missing"]))
    assert len(rows(folder, "outcomes.jsonl")) == 6
    run("i", *words)  # finished: nothing is asked or drawn


def test_pictures_that_are_there_are_kept_and_broken_ones_drawn_again(run, fails, tmp_path):
    root = checkouts.echo4o(tmp_path / "echo")
    with ScriptedServer(DOWN) as server:
        words = judged(server, "geneval_pp", root, "judge.limit=1", "judge.breaker=1")
        fails("pp", *words)
        folder = tmp_path / "runs" / "pp"
        whole = pictures(folder)
        (folder / "images" / "2.jpg").write_bytes(whole["2.jpg"][: len(whole["2.jpg"]) // 2])
        (folder / "images" / "3.jpg").unlink()
        (folder / "images" / "4.jpg").write_bytes(b"not an image")
        kept = (folder / "images" / "1.jpg").stat().st_mtime_ns
        fails("pp", *words)
    assert pictures(folder) == whole and (folder / "images" / "1.jpg").stat().st_mtime_ns == kept


def test_an_image_is_a_function_of_seed_prompt_and_sample(run, fails, tmp_path):
    root = checkouts.geneval(tmp_path / "geneval")
    words = [*GENEVAL, f"benchmark.root={root}"]
    one = pictures(run("a", *words))
    assert pictures(run("b", *words)) == one
    assert not set(pictures(run("c", *words, "seed=1")).values()) & set(one.values())


class Controller:
    """Draws once and stops, but writes no turn where there is a bench."""

    def reply(self, conversations, seed=None):
        return [self.answer(messages) for messages in conversations]

    def answer(self, messages):
        if "bench" in messages[0]["content"][0]["text"]:
            return "no turn"
        return "It is drawn.\nstop" if len(messages) > 1 else "I draw it.\ngenerate <IMG_GEN_1>"


def test_what_a_closed_loop_does_not_draw_counts_as_wrong(run, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "open_controller", lambda place, **options: Controller())
    root = checkouts.geneval(tmp_path / "geneval")
    folder = run("loop", *GENEVAL, f"benchmark.root={root}", "mode=closed_loop", "controller=scripted")
    found = summary(folder)
    assert (found["n"], found["not_drawn"], found["passes"], found["rounds_per_goal"]) == (8, 2, 3, 6 / 8)
    assert list((folder / "images" / "00000" / "samples").iterdir()) == []
    stops = [row["stop"] for row in rows(folder)]
    assert all("malformed" in stop for stop in stops[:2]) and stops[2:] == ["stop"] * 6


def test_two_ranks_draw_the_files_of_one(run, tmp_path, tiny_folder):
    root = checkouts.geneval(tmp_path / "geneval")
    words = [*GENEVAL, f"benchmark.root={root}"]
    alone = run("alone", *words)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    recipe = command("evaluate", "run=two", f"model.folder={tiny_folder}", *DRAW, *words)[1:]
    done = subprocess.run(
        [*torchrun, *recipe], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr[-3000:]
    two = tmp_path / "runs" / "two"
    assert pictures(two) == pictures(alone)
    shares = [len(rows(two, f"drawn-{rank}.jsonl")) for rank in (0, 1)]
    assert shares == [4, 4] and len((two / "scorer" / "scorer.log").read_text().split("$ ")) == 2  # scored once
    drop = {"seconds_per_goal", "model", "scorer"}
    assert {k: v for k, v in summary(two).items() if k not in drop} == {
        k: v for k, v in summary(alone).items() if k not in drop
    }


def test_a_kill_while_drawing_loses_what_was_not_written(run, tmp_path, tiny_folder):
    root = checkouts.geneval(tmp_path / "geneval")
    words = [*GENEVAL, "benchmark.samples=4", f"benchmark.root={root}"]
    alone = pictures(run("alone", *words, "batch=1"))
    folder = tmp_path / "runs" / "killed"
    process = subprocess.Popen(
        command("evaluate", "run=killed", f"model.folder={tiny_folder}", *DRAW, "batch=1", *words),
        cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.monotonic() + 200
    while len(list(folder.glob("images/*/samples/*.png"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = {path: path.stat().st_mtime_ns for path in folder.glob("images/*/samples/*.png")}
    assert 3 <= len(before) <= 16
    for path in before:
        open_image(path)
    run("killed", *words, "batch=1")
    assert before == {path: path.stat().st_mtime_ns for path in before}
    assert pictures(folder) == alone


def test_a_picture_that_no_system_drew_is_wrong_and_an_answer_that_no_judge_gave_is_missing():
    from clvr_train.evaluation.checkout import PART, Benchmark, Item

    items = [Item(str(i), "t", "x", f"{i}.png", {}) for i in range(4)]
    benchmark = Benchmark("b", items, True, 1, {"t": 1}, None, None)
    verdicts = {("0", PART): 1.0, ("1", PART): 1.0, ("2", PART): "why", ("3", PART): 0.0}
    facts = {str(i): {"drawn": i != 3, "rounds": 1, "nfe": 4, "seconds": 1.0, "stop": ""} for i in range(4)}
    found = scores.summarise_benchmark(benchmark, verdicts, facts)
    assert found["score"] == pytest.approx(2 / 3) and (found["n"], found["coverage"]) == (3, 0.75)
    assert found["not_drawn"] == 1 and found["missing"] == {"why": 1}
    with pytest.raises(ValueError, match=r"none of 4 answers is a score \(why\)"):
        scores.summarise_benchmark(benchmark, dict.fromkeys(verdicts, "why"), facts)


def test_another_judge_than_the_published_one_is_said(run, tmp_path, caplog):
    root = checkouts.wise(tmp_path / "wise")
    with caplog.at_level(logging.WARNING), ScriptedServer(says(lambda text: "1")) as server:
        run("w", *judged(server, "wise_verified", root, "judge.model=other"))
    assert "judge.model=other: published wise_verified scores are of Qwen3.5-35B-A3B" in caplog.text
    assert "clvr_train's own words" in caplog.text
