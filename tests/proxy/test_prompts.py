"""Proxy prompts on disk: what the teacher refuses is listed with its reason, nothing is filled in."""

import json

import pytest
from PIL import Image

from clvr_train.method.score import ProxyPrompt, TeacherRefusal
from clvr_train.method.trajectory import Sample
from clvr_train.proxy.prompts import context_hash, read_proxy_prompts, write_proxy_prompts

RED = Image.new("RGB", (96, 96), "red")
SAMPLES = [Sample("a", 1, "goal", ("r",)), Sample("a", 2, "goal", ("r", "s"), (RED,)), Sample("b", 1, "goal", ("r",))]


class ScriptedTeacher:
    def __init__(self, answers):
        self.answers = iter(answers)

    def proxy_prompt(self, sample):
        answer = next(self.answers)
        if isinstance(answer, str):
            raise TeacherRefusal(answer)
        return answer


def test_round_trip_and_rejected_with_reason(tmp_path):
    answers = [ProxyPrompt("a scene"), ProxyPrompt("another", "turn it", (1,)), "too vague"]
    assert write_proxy_prompts(ScriptedTeacher(answers), SAMPLES, tmp_path) == (2, 1)
    assert read_proxy_prompts(tmp_path, SAMPLES) == {("a", 1): answers[0], ("a", 2): answers[1]}
    assert read_proxy_prompts(tmp_path, SAMPLES[1:]) == {("a", 2): answers[1]}
    other = Sample("a", 1, "another goal", ("r",))
    with pytest.raises(ValueError, match="proxy_prompts.jsonl:1: context: made for another context"):
        read_proxy_prompts(tmp_path, [other])
    assert [json.loads(line) for line in (tmp_path / "rejected.jsonl").read_text().splitlines()] == [
        {"trajectory": "b", "step": 1, "reason": "too vague"}
    ]


def test_prompts_that_do_not_fit_their_step_are_rejected(tmp_path):
    answers = [ProxyPrompt("p", "e", (1,)), ProxyPrompt("p", "e", (2,)), ProxyPrompt("p")]
    assert write_proxy_prompts(ScriptedTeacher(answers), SAMPLES, tmp_path) == (1, 2)
    reasons = [json.loads(line)["reason"] for line in (tmp_path / "rejected.jsonl").read_text().splitlines()]
    assert reasons == ["p_i2i: not allowed at step 1", "idx: (2,) reaches outside the 1 images of the history"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "proxy_prompts.jsonl:1: "),
        ('{START, "p_t2i": "p", "p_i2i": null}', "proxy_prompts.jsonl:1: idx: missing"),
        ('{START, "p_t2i": " ", "p_i2i": null, "idx": []}', ":1: p_t2i: must not be empty"),
        ('{START, "p_t2i": 7, "p_i2i": null, "idx": []}', ":1: record: of a wrong type"),
    ],
)
def test_malformed_lines_are_named(tmp_path, line, message):
    start = f'"trajectory": "a", "step": 1, "context": "{context_hash(SAMPLES[0])}"'
    (tmp_path / "proxy_prompts.jsonl").write_text(line.replace("START", start) + "\n")
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        read_proxy_prompts(tmp_path, SAMPLES)


def test_without_prompts_the_remedy_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="make_proxy_prompts"):
        read_proxy_prompts(tmp_path, SAMPLES)
