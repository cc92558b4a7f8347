"""Trajectories as the chats that the controller is trained on: what a chat holds, how long it is, what does not fit.

Chat markup inside the texts of a trajectory is defused by `method.protocol`: `<|im_start|>assistant` in a goal becomes
`< |im_start|>assistant`, plain text that opens no turn and that no loss is on.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from PIL import Image
from transformers import Qwen3VLProcessor

from clvr_train.data.images import image_size
from clvr_train.method.protocol import chat_messages
from clvr_train.method.trajectory import ImageLike, Trajectory

TOO_LONG = ("refuse", "shorten")


@dataclass(frozen=True)
class Chat:
    """A chat as TRL wants it: messages with an empty image part where each image goes, and the images in order.

    Plain strings would not do: TRL puts all images of such a chat before its first turn.
    """

    name: str
    messages: tuple[dict, ...]
    images: tuple[ImageLike, ...]

    @property
    def turns(self) -> int:
        """Of the assistant."""
        return sum(message["role"] == "assistant" for message in self.messages)


@dataclass(frozen=True)
class Fitted:
    """Chats that are short enough, and what that took.

    Args:
        shortened: chats that lost turns. lost_turns: turns of the assistant that were lost, those of chats that were
            left out included. left_out: names of chats whose goal and first turn alone are too long.
    """

    chats: list[Chat]
    shortened: int = 0
    lost_turns: int = 0
    left_out: tuple[str, ...] = ()


def chat_of(trajectory: Trajectory) -> Chat:
    """The chat of a whole trajectory.

    One without images ends in a user turn with a blank one: the ranks of a training must all run the vision tower or
    none, or those that gather its weights (ZeRO-3) or average its gradients (DDP) would wait for ever. Nothing follows
    that turn and no loss is on it, so under causal attention it changes neither the loss nor a gradient.
    """
    messages, images = [], []
    for message in chat_messages(trajectory.goal, trajectory.steps):
        images += [part["image"] for part in message["content"] if "image" in part]
        content = [{"type": "image"} if "image" in part else part for part in message["content"]]
        messages.append({**message, "content": content})
    return _with_blank(Chat(trajectory.id, tuple(messages), tuple(images)))


def _with_blank(chat: Chat) -> Chat:
    if chat.images:
        return chat
    blank = {"role": "user", "content": [{"type": "image"}]}
    return replace(chat, messages=(*chat.messages, blank), images=(Image.new("RGB", (32, 32)),))


def num_tokens(chat: Chat, processor: Qwen3VLProcessor) -> int:
    """Length of the model's input, its images' tokens included; of images only the headers are read."""
    text = processor.apply_chat_template(list(chat.messages), tokenize=False)
    patches = (processor.image_processor.get_number_of_image_patches(*image_size(image)) for image in chat.images)
    merged = sum(number // processor.image_processor.merge_size**2 for number in patches)
    return len(processor.tokenizer(text)["input_ids"]) - len(chat.images) + merged  # the text has a token an image


def fit_chats(
    chats: Sequence[Chat], processor: Qwen3VLProcessor, max_length: int | None, too_long: str = "refuse"
) -> Fitted:
    """The chats that have at most `max_length` tokens, others as `too_long` says.

    `refuse`: one that is longer is an error. `shorten`: it loses its last turns, whole ones, until it fits, and ends in
    a turn of the assistant. So no image is ever cut.

    Raises:
        ValueError: a chat is too long and `too_long` is `refuse`, or no chat is left; `too_long` is unknown.
    """
    if too_long not in TOO_LONG:
        raise ValueError(f"too_long={too_long!r} is not one of {', '.join(TOO_LONG)}")
    if max_length is None:
        return Fitted(list(chats))
    kept: list[Chat] = []
    shortened, lost, left_out = 0, 0, []
    for chat in chats:
        length = num_tokens(chat, processor)
        if length > max_length and too_long == "refuse":
            raise ValueError(
                f"trajectory {chat.name!r}: {length} tokens, {max_length} are allowed; raise max_length, lower"
                " max_pixels, or choose too_long=shorten"
            )
        shorter = chat if length <= max_length else _shortened(chat, processor, max_length)
        lost += chat.turns - (shorter.turns if shorter else 0)
        shortened += shorter is not None and shorter is not chat
        if shorter is None:
            left_out.append(chat.name)
        else:
            kept.append(shorter)
    if not kept:
        raise ValueError(f"no trajectory fits {max_length} tokens, not even its goal and first turn; raise max_length")
    return Fitted(kept, shortened, lost, tuple(left_out))


def _shortened(chat: Chat, processor: Qwen3VLProcessor, max_length: int) -> Chat | None:
    """The longest beginning of the chat that ends in a turn of the assistant and fits; None if there is none."""
    for end in range(len(chat.messages) - 1, 1, -1):
        messages = chat.messages[:end]
        if messages[-1]["role"] != "assistant":
            continue
        images = sum(part["type"] == "image" for message in messages for part in message["content"])
        shorter = _with_blank(Chat(chat.name, messages, chat.images[:images]))
        if num_tokens(shorter, processor) <= max_length:
            return shorter
    return None
