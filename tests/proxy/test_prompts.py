"""Proxy prompts on disk: what the teacher refuses is listed with its reason, nothing is filled in."""

import json

import pytest
from PIL import Image

from clvr_train.method.score import ProxyPrompt, TeacherRefusal
from clvr_train.method.trajectory import Sample
from clvr_train.proxy.prompts import TeacherAway, answer_key, context_hash, read_proxy_prompts, write_proxy_prompts

RED = Image.new("RGB", (96, 96), "red")
BLUE = Image.new("RGB", (96, 96), "blue")
SAMPLES = [Sample("a", 1, "goal", ("r",)), Sample("a", 2, "goal", ("r", "s"), (RED,)), Sample("b", 1, "goal", ("q",))]
FIRST, EDIT = ProxyPrompt("a scene"), ProxyPrompt("another", "turn\u2028it", (1,))


class ScriptedTeacher:
    def __init__(self, answers, name="scripted 1"):
        self.answers, self.name, self.asked = iter(answers), name, []

    def proxy_prompt(self, sample):
        self.asked.append(sample.key)
        answer = next(self.answers)
        if isinstance(answer, str):
            raise TeacherRefusal(answer)
        if isinstance(answer, BaseException):
            raise answer
        return answer


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_round_trip_and_rejected_with_reason(tmp_path):
    answers = [ProxyPrompt("a scene"), ProxyPrompt("another", "turn it", (1,)), "too vague"]
    assert write_proxy_prompts(ScriptedTeacher(answers), SAMPLES, tmp_path) == (2, 1)
    assert read_proxy_prompts(tmp_path, SAMPLES) == {("a", 1): answers[0], ("a", 2): answers[1]}
    assert read_proxy_prompts(tmp_path, SAMPLES[1:]) == {("a", 2): answers[1]}
    other = Sample("a", 1, "another goal", ("r",))
    with pytest.raises(ValueError, match="proxy_prompts.jsonl:1: context: made for another context"):
        read_proxy_prompts(tmp_path, [other])
    key = answer_key(SAMPLES[2], "scripted 1")
    assert lines(tmp_path / "rejected.jsonl") == [{"trajectory": "b", "step": 1, "key": key, "reason": "too vague"}]


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


@pytest.mark.parametrize("workers", [0, 3])
def test_what_has_an_answer_is_not_asked_again(tmp_path, workers):
    by_key = {("a", 1): FIRST, ("a", 2): EDIT, ("b", 1): TeacherRefusal("too vague")}

    class Teacher(ScriptedTeacher):
        def proxy_prompt(self, sample):
            self.answers = iter([by_key[sample.key]])
            return super().proxy_prompt(sample)

    def ask(samples, name="scripted 1"):
        teacher = Teacher([], name)
        result = write_proxy_prompts(teacher, samples, tmp_path, workers=workers if name == "scripted 1" else 0)
        return result, sorted(teacher.asked)

    everything = sorted(sample.key for sample in SAMPLES)
    assert ask(SAMPLES) == ((2, 1), everything)
    before = (tmp_path / "proxy_prompts.jsonl").read_bytes(), (tmp_path / "rejected.jsonl").read_bytes()
    assert ask(SAMPLES) == ((2, 1), [])
    assert before == ((tmp_path / "proxy_prompts.jsonl").read_bytes(), (tmp_path / "rejected.jsonl").read_bytes())
    assert read_proxy_prompts(tmp_path, SAMPLES) == {("a", 1): FIRST, ("a", 2): EDIT}
    repainted = [SAMPLES[0], Sample("a", 2, "goal", ("r", "s"), (BLUE,)), SAMPLES[2]]
    assert ask(repainted) == ((2, 1), [("a", 2)])
    assert ask(repainted, "scripted 2") == ((2, 1), everything)
    assert not (tmp_path / "proxy_prompts.partial.jsonl").exists()


def test_a_run_that_a_kill_or_a_dead_server_ends_goes_on_from_its_answers(tmp_path):
    (tmp_path / "proxy_prompts.jsonl").write_text("as it was\n")
    teacher = ScriptedTeacher([FIRST, TeacherAway("no connection"), "too vague"])
    with pytest.raises(OSError, match=r"1 of 3 steps are not answered \(no connection\)"):
        write_proxy_prompts(teacher, SAMPLES, tmp_path)
    assert (tmp_path / "proxy_prompts.jsonl").read_text() == "as it was\n"
    partial = tmp_path / "proxy_prompts.partial.jsonl"
    whole = partial.read_bytes()
    for cut in (whole, whole[:-10]):
        partial.write_bytes(cut)
        teacher = ScriptedTeacher([KeyboardInterrupt()])
        with pytest.raises(KeyboardInterrupt):
            write_proxy_prompts(teacher, SAMPLES, tmp_path)
        assert teacher.asked == [("a", 2)]
        teacher = ScriptedTeacher([EDIT, "too vague"])
        assert write_proxy_prompts(teacher, SAMPLES, tmp_path) == (2, 1)
        assert teacher.asked == [("a", 2)] + [("b", 1)] * (cut != whole)
        (tmp_path / "proxy_prompts.jsonl").unlink()
        (tmp_path / "rejected.jsonl").unlink()
