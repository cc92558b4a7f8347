"""The teacher behind a server: what it is shown, what it may say, and what becomes of bad replies."""

import base64
import io
import json

import pytest
from PIL import Image

from clvr_train.method.score import ProxyPrompt, TeacherRefusal
from clvr_train.method.trajectory import Sample
from clvr_train.proxy.chat_teacher import ChatTeacher, read_prompt
from clvr_train.proxy.prompts import TeacherAway, write_proxy_prompts
from clvr_train.services.chat import ChatClient
from clvr_train.services.options import ChatOptions
from tests.services.server import ScriptedServer, completion, http, says, sends

IMAGES = tuple(Image.new("RGB", (96, 64), colour) for colour in ("red", "green", "blue"))
START = Sample("a", 1, "a red circle", ("draw it",))
LATER = Sample("a", 4, 'a "goal"\n{x}', ("one", "it looks wrong", "now fix <|im_end|> it"), IMAGES, IMAGES[0])
SCENE = {"scene": "A red circle on white.", "edit": None, "references": []}
EDIT = {"scene": "A red circle on white.", "edit": "Make it red.", "references": [1, 3]}


def teach(sample, *script, **options):
    """The prompt or the exception, and the requests."""
    with ScriptedServer(*script) as server, ChatClient(ChatOptions(url=server.url, model="m", retries=0)) as client:
        try:
            return ChatTeacher(client, **options).proxy_prompt(sample), server.requests
        except (TeacherRefusal, TeacherAway) as error:
            return error, server.requests


def test_the_context_is_shown_in_order_and_the_target_is_not():
    prompt, (request,) = teach(LATER, says(json.dumps(EDIT)))
    assert prompt == ProxyPrompt("A red circle on white.", "Make it red.", (1, 3))
    content = request["messages"][0]["content"]
    kinds = [part["type"] for part in content]
    assert kinds == ["text"] + ["text", "image_url"] * 3 + ["text"]
    assert [part["text"] for part in content[1:-1:2]] == ["Image 1:", "Image 2:", "Image 3:"]
    colours = []
    for part in content[2:-1:2]:
        image = Image.open(io.BytesIO(base64.b64decode(part["image_url"]["url"].split(",")[1])))
        colours.append(max(range(3), key=lambda channel, image=image: image.getpixel((50, 30))[channel]))
    assert colours == [0, 1, 2]
    text = content[0]["text"]
    assert [json.loads(line[3:]) for line in text.split("\n") if line[:1].isdigit()] == list(LATER.reasonings)
    assert '"a \\"goal\\"\\n{x}"' in text and "<|" not in text and "number 4" in text
    assert "from 1 to 3" in content[-1]["text"]


def test_the_first_step_has_neither_images_nor_an_edit():
    prompt, (request,) = teach(START, says(json.dumps(SCENE)))
    assert prompt == ProxyPrompt("A red circle on white.")
    assert all(part["type"] == "text" for part in request["messages"][0]["content"])


BAD = {
    "refusal": ("I cannot help.", "Expecting value"),
    "text before": (f"Sure! {json.dumps(EDIT)}", "Expecting value"),
    "text after": (f"{json.dumps(EDIT)} Done.", "Extra data"),
    "missing": ('{"scene": "A."}', "the fields 'scene', 'edit', 'references' are needed, got 'scene'"),
    "unknown": (json.dumps(EDIT | {"score": 11}), "the fields 'scene'"),
    "twice": ('{"scene": "A.", "scene": "B.", "edit": "C.", "references": [1]}', "a field comes twice"),
    "empty": (json.dumps(EDIT | {"scene": "  "}), "scene: a text is needed"),
    "no text": (json.dumps(EDIT | {"edit": 5}), "edit: a text is needed"),
    "null edit": (json.dumps(EDIT | {"edit": None}), "edit: a text is needed"),
    "long": (json.dumps(EDIT | {"scene": "A" * 1501}), "scene: 1501 characters, at most 1500 are allowed"),
    "language": (json.dumps(EDIT | {"edit": "把它变成红色"}), "edit: must be written in English"),
    "no letters": (json.dumps(EDIT | {"edit": "123"}), "edit: must be written in English"),
    "none": (json.dumps(EDIT | {"references": []}), "references: [] must hold some of the numbers 1 to 3"),
    "beyond": (json.dumps(EDIT | {"references": [4]}), "references: [4] must hold"),
    "zero": (json.dumps(EDIT | {"references": [0]}), "references: [0] must hold"),
    "same": (json.dumps(EDIT | {"references": [1, 1]}), "references: [1, 1] must hold"),
    "true": (json.dumps(EDIT | {"references": [True]}), "references: a list of whole numbers"),
    "fraction": (json.dumps(EDIT | {"references": [1.0]}), "references: a list of whole numbers"),
    "nan": (json.dumps(EDIT | {"references": [float("nan")]}), "NaN is no number"),
    "arabic digits": (json.dumps(EDIT).replace("[1, 3]", "[١]"), "Expecting value"),
}


@pytest.mark.parametrize(("text", "reason"), BAD.values(), ids=BAD)
def test_a_reply_that_breaks_a_rule_is_shown_again_with_the_rule_and_then_refused(text, reason):
    with pytest.raises(ValueError) as error:
        read_prompt(text, sample=LATER, language="en", max_chars=1500)
    assert str(error.value).startswith(reason)
    refusal, requests = teach(LATER, says(text), retries=1)
    assert isinstance(refusal, TeacherRefusal) and str(refusal).endswith("(after 2 replies)") and reason in str(refusal)
    assert len(requests) == 2
    first, reply, again = requests[1]["messages"]
    assert first == requests[0]["messages"][0]
    assert reply == {"role": "assistant", "content": text} and reason in again["content"][0]["text"]


def test_a_reply_that_is_mended_counts():
    prompt, requests = teach(LATER, says("Sorry"), says(None), says(f"```json\n{json.dumps(EDIT)}\n```"))
    assert prompt.idx == (1, 3) and len(requests) == 3


@pytest.mark.parametrize("wrong", [{"edit": "Make it red."}, {"references": [1]}])
def test_without_a_history_there_is_no_edit(wrong):
    refusal, _ = teach(START, says(json.dumps(SCENE | wrong)), retries=0)
    assert "edit: must be null, and references empty" in str(refusal)


def test_other_languages_by_their_letters():
    chinese = {"scene": "白色背景上的红色圆形", "edit": None, "references": []}
    assert teach(START, says(json.dumps(chinese)), language="zh")[0].p_t2i == chinese["scene"]
    sign = {"scene": 'A red sign that says "出口" on a white wall.', "edit": None, "references": []}
    assert teach(START, says(json.dumps(sign)))[0].p_t2i == sign["scene"]
    with pytest.raises(ValueError, match="language='xx' is not one of en, zh"):
        ChatTeacher(None, language="xx")


def test_a_server_that_is_away_refuses_nothing():
    away, requests = teach(START, sends(http(500, "down")))
    assert isinstance(away, TeacherAway) and str(away) == "HTTP 500: down (attempt 1)" and len(requests) == 1


def test_a_context_that_the_server_cannot_take_is_refused():
    refusal, _ = teach(START, sends(http(400, "context too long")), retries=0)
    assert isinstance(refusal, TeacherRefusal) and "HTTP 400: context too long" in str(refusal)


def test_many_at_once_and_each_its_own_answer(tmp_path):
    def answers(connection, request):
        goal = request["messages"][0]["content"][0]["text"].split("Goal: ")[1].split("\n")[0]
        connection.sendall(http(200, completion(json.dumps(SCENE | {"scene": f"Scene of {json.loads(goal)}"}))))

    samples = [Sample(f"t{n}", 1, f"goal number {n}", ("r",)) for n in range(40)]
    seen = []
    with ScriptedServer(answers) as server, ChatClient(ChatOptions(url=server.url, model="m")) as client:
        teacher = ChatTeacher(client)
        result = write_proxy_prompts(teacher, samples, tmp_path, workers=8, answered=lambda: seen.append(1))
        assert result == (40, 0) and len(seen) == 40 == len(server.requests)
        assert client.counts["tokens_in"] == 400
    rows = [json.loads(line) for line in (tmp_path / "proxy_prompts.jsonl").read_text().splitlines()]
    assert [row["p_t2i"] for row in rows] == [f"Scene of goal number {n}" for n in range(40)]
