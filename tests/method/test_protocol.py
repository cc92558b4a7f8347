import pytest
from PIL import Image

from clvr_train.method.protocol import ProtocolError, chat_messages, format_turn, parse_turn
from clvr_train.method.trajectory import Step

IMAGE = Image.new("RGB", (8, 8))


@pytest.mark.parametrize("step, number", [
    (Step("A red circle.", "generate", IMAGE), 1),
    (Step("Two lines\nof thought.", "edit", IMAGE), 12),
    (Step("Is it there?", "verify"), 0),
    (Step("Done.", "stop"), 3),
    (Step("One more.", "edit", IMAGE), 10_000),
])
def test_parse_is_the_inverse_of_format(step: Step, number: int) -> None:
    assert parse_turn(format_turn(step, number), number) == (step.reasoning, step.action)


@pytest.mark.parametrize("text, number, message", [
    ("", 1, "no action"),
    ("Only thinking.", 1, "no action"),
    ("Thinking.\npaint <IMG_GEN_1>", 1, "no action"),
    ("Thinking.\nstop now", 1, "no action"),
    ("stop", 1, "no reasoning"),
    ("Thinking.\ngenerate", 1, "needs <IMG_GEN_n>"),
    ("Thinking.\nverify <IMG_GEN_1>", 1, "takes no <IMG_GEN_n>"),
    ("Thinking.\nedit <IMG_GEN_2>", 3, "where <IMG_GEN_3> comes next"),
    ("Thinking.\nedit <IMG_GEN_1>", 1, "before any image"),
    ("See <image>.\nstop", 1, "image marker"),
    ("See <IMG_GEN_1>.\nstop", 2, "image marker"),
    ("See <video>.\nstop", 1, "<video> stands inside the reasoning"),
])
def test_malformed_turn_is_named(text: str, number: int, message: str) -> None:
    with pytest.raises(ProtocolError, match=message):
        parse_turn(text, number)


@pytest.mark.parametrize("number", ["0", "-1", "01", "1.0", "+1", "", "n", "10000", "１", "9" * 5000])
def test_a_number_that_is_not_the_next_is_named_with_the_one_that_is(number: str) -> None:
    with pytest.raises(ProtocolError, match=r"^<IMG_GEN_.{0,20}> where <IMG_GEN_1> comes next$") as error:
        parse_turn(f"Thinking.\ngenerate <IMG_GEN_{number}>", 1)
    assert error.value.rule == "image_number"


def test_messages_keep_the_true_order() -> None:
    steps = [Step("r1", "generate", IMAGE), Step("r2", "verify"),
             Step("r3", "edit", IMAGE), Step("r4", "stop")]
    messages = chat_messages("goal", steps)
    assert [m["role"] for m in messages] == ["user", "assistant"] * 4
    parts = [m["content"][0] for m in messages]
    assert [p.get("text", p["type"]) for p in parts] == [
        "goal", "r1\ngenerate <IMG_GEN_1>", "image", "r2\nverify", "continue",
        "r3\nedit <IMG_GEN_2>", "image", "r4\nstop",
    ]


def test_prefix_of_a_trajectory_ends_with_the_turn_to_answer() -> None:
    for steps in ([], [Step("r", "generate", IMAGE)], [Step("r", "verify")]):
        assert chat_messages("goal", steps)[-1]["role"] == "user"


def test_chat_markup_in_a_text_is_defused() -> None:
    messages = chat_messages("draw <|image_pad|>", [Step("so <|im_end|>", "stop")])
    assert all("<|" not in message["content"][0]["text"] for message in messages)
