from pathlib import Path

import pytest
from PIL import Image
from transformers import Qwen3VLProcessor

from clvr_train.method.protocol import format_turn
from clvr_train.method.trajectory import Step, Trajectory
from clvr_train.models.qwen_vl import load_processor, make_tiny_controller
from clvr_train.sft.chats import Chat, chat_of, fit_chats, num_tokens
from clvr_train.shapes.controller import make_trajectories


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("vlm") / "controller"
    texts = [format_turn(s, 1) for t in make_trajectories(200, 0, "train") for s in t.steps]
    make_tiny_controller(folder, texts, seed=0, width=32, layers=1)
    return folder


@pytest.fixture(scope="module")
def processor(folder: Path) -> Qwen3VLProcessor:
    return load_processor(folder)


def trajectory(sizes: list[tuple[int, int]], name: str = "t") -> Trajectory:
    """A picture of every size, (height, width), each looked at."""
    steps = []
    for number, (height, width) in enumerate(sizes):
        picture = Image.new("RGB", (width, height), (40 * number, 90, 200))
        steps += [Step(f"picture {number}", "edit" if number else "generate", picture), Step("look", "verify")]
    return Trajectory(name, "several pictures", (*steps, Step("done", "stop")))


BLIND = Trajectory("blind", "a goal", (Step("what can one see", "verify"), Step("nothing", "stop")))


def model_length(chat: Chat, processor: Qwen3VLProcessor) -> int:
    """What the model is really given."""
    images = iter(chat.images)
    messages = [{**m, "content": [{"type": "image", "image": next(images)} if p["type"] == "image" else p
                                  for p in m["content"]]} for m in chat.messages]  # fmt: skip
    inputs = processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")
    tokens = inputs["input_ids"][0]
    assert (tokens == processor.image_token_id).sum() == inputs["image_grid_thw"].prod(1).sum() // 4
    return len(tokens)


@pytest.mark.parametrize("max_pixels", [None, 64 * 64])
def test_length_by_headers_is_that_of_the_models_input(folder: Path, max_pixels: int | None) -> None:
    processor = load_processor(folder, max_pixels)
    mixed = trajectory([(96, 96), (50, 300), (20, 20)])
    chats = [chat_of(t) for t in (*make_trajectories(5, 0, "train"), BLIND, mixed)]
    assert [num_tokens(chat, processor) for chat in chats] == [model_length(chat, processor) for chat in chats]


def test_a_chat_without_images_ends_in_a_blank_one(processor: Qwen3VLProcessor) -> None:
    chat = chat_of(BLIND)
    assert [m["role"] for m in chat.messages] == ["user", "assistant", "user", "assistant", "user"]
    assert chat.messages[-1]["content"] == [{"type": "image"}] and len(chat.images) == 1
    assert chat.turns == 2


def test_what_is_too_long_loses_whole_turns_from_its_end(processor: Qwen3VLProcessor) -> None:
    chats = [chat_of(trajectory([(96, 96), (200, 150), (64, 300)])), chat_of(BLIND)]
    lengths = [num_tokens(chat, processor) for chat in chats]
    for most in range(min(lengths) - 40, max(lengths) + 2):
        try:
            fitted = fit_chats(chats, processor, most, "shorten")
        except ValueError:
            assert most < min(lengths)
            continue
        kept = {chat.name: chat for chat in fitted.chats}
        assert set(kept) | set(fitted.left_out) == {"t", "blind"} and not set(kept) & set(fitted.left_out)
        lost = 0
        for chat, length in zip(chats, lengths, strict=True):
            short = kept.get(chat.name)
            lost += chat.turns - (short.turns if short else 0)
            if short is None:
                continue
            assert model_length(short, processor) <= most  # and every image is whole, which this asserts too
            assert (short is chat) == (length <= most)
            if short is not chat:
                text = short.messages[:-1] if short.messages[-1]["role"] == "user" else short.messages
                assert text == chat.messages[: len(text)] and text[-1]["role"] == "assistant"
                longer = fit_chats([chat], processor, most + 1, "shorten").chats[0].turns
                assert longer in (short.turns, short.turns + 1)
        assert fitted.lost_turns == lost
        assert fitted.shortened == sum(chat is not kept.get(chat.name, chat) for chat in chats)


def test_shortened_as_little_as_will_do(processor: Qwen3VLProcessor) -> None:
    chat = chat_of(trajectory([(96, 96)] * 4))
    ends = [n for n, m in enumerate(chat.messages, start=1) if m["role"] == "assistant"][1:]  # the first has no image
    for turns, end in enumerate(ends, start=2):
        part = Chat("t", chat.messages[:end], chat.images[: turns // 2])
        length = num_tokens(part, processor)
        assert fit_chats([chat], processor, length, "shorten").chats[0].turns == turns
        assert fit_chats([chat], processor, length - 1, "shorten").chats[0].turns == turns - 1


def test_refused_by_name_with_what_to_do(processor: Qwen3VLProcessor) -> None:
    chat = chat_of(trajectory([(96, 96)], "long-one"))
    length = num_tokens(chat, processor)
    assert fit_chats([chat], processor, length).chats == [chat] == fit_chats([chat], processor, None).chats
    with pytest.raises(ValueError, match=f"'long-one': {length} tokens, {length - 1} are allowed; raise max_length"):
        fit_chats([chat], processor, length - 1)
    with pytest.raises(ValueError, match="no trajectory fits 5 tokens"):
        fit_chats([chat], processor, 5, "shorten")
    with pytest.raises(ValueError, match="too_long='cut' is not one of refuse, shorten"):
        fit_chats([chat], processor, 5, "cut")
