"""What the controller writes in a round and what it is shown: one text protocol for training and closed loop.

The assistant turn of a round is the reasoning `r_k`, then one line with the action: `generate <IMG_GEN_n>`,
`edit <IMG_GEN_n>`, `verify` or `stop`; n counts the images of the trajectory from 1 (CLVR A.3).
The goal is the first user turn. An image comes back as the *next user turn*, because Qwen3-VL's chat template
renders no image in assistant turns; after `verify` the user says `continue`.
"""

import re
from collections.abc import Sequence

from clvr_train.method.trajectory import ACTIONS, DRAWING_ACTIONS, Step

IMAGE_TURN = "<image>"
CONTINUE_TURN = "continue"
# What others write where a film or a sound stands; a trajectory holds images only.
MEDIA_MARKERS = ("<video>", "<audio>")
_ACTION_LINE = re.compile(r"([a-z]+)(?: <IMG_GEN_([^<>\s]*)>)?")
_MARKER = re.compile(r"<IMG_GEN_([0-9]{1,9})>")


class ProtocolError(ValueError):
    """A text is not a turn of the protocol; the message says in which way, `rule` in a short code."""

    def __init__(self, message: str, rule: str = "protocol") -> None:
        super().__init__(message)
        self.rule = rule


def format_turn(step: Step, number: int) -> str:
    """The assistant turn of `step`; `number` is the n of `<IMG_GEN_n>` if the step draws.

    Raises:
        ProtocolError: if the reasoning holds an image marker, or begins or ends in white space, which parsing
            would lose.
    """
    _check_reasoning(step.reasoning, number + (not step.draws))
    if step.reasoning != step.reasoning.strip():
        raise ProtocolError("the reasoning begins or ends in white space", "outer_space")
    action = f"{step.action} <IMG_GEN_{number}>" if step.draws else step.action
    return f"{step.reasoning}\n{action}"


def parse_turn(text: str, next_image: int) -> tuple[str, str]:
    """Reasoning and action of an assistant turn, the inverse of `format_turn`.

    Args:
        text: what the controller wrote, without chat markup.
        next_image: the number that the next image must have, from 1.

    Raises:
        ProtocolError: naming what is wrong: no action line, an unknown action, no reasoning, a missing,
            superfluous or wrong image number, an edit before any image.
    """
    reasoning, _, line = text.strip().rpartition("\n")
    match = _ACTION_LINE.fullmatch(line.strip())
    if match is None or match[1] not in ACTIONS:
        line = line.strip()[:60]
        raise ProtocolError(f"the last line {line!r} is no action ({', '.join(ACTIONS)})", "unknown_action")
    reasoning, action, number = reasoning.strip(), match[1], match[2]
    if not reasoning:
        raise ProtocolError("there is no reasoning before the action", "empty_reasoning")
    _check_reasoning(reasoning, next_image)
    draws = action in DRAWING_ACTIONS
    if draws != (number is not None):
        raise ProtocolError(f"{action!r} {'needs' if draws else 'takes no'} <IMG_GEN_n>", "image_number")
    if draws and number != str(next_image):
        raise ProtocolError(f"<IMG_GEN_{number[:20]}> where <IMG_GEN_{next_image}> comes next", "image_number")
    if action == "edit" and next_image == 1:
        raise ProtocolError("'edit' before any image", "unknown_image")
    return reasoning, action


def _check_reasoning(reasoning: str, next_image: int) -> None:
    for number in _MARKER.findall(reasoning):
        if not 0 < int(number) < next_image:
            raise ProtocolError(f"the reasoning names <IMG_GEN_{number}>, which is not drawn yet", "unknown_image")
    if IMAGE_TURN in reasoning or "<IMG_GEN_" in reasoning:
        raise ProtocolError("an image marker stands inside the reasoning", "image_marker")
    for marker in MEDIA_MARKERS:
        if marker in reasoning:
            raise ProtocolError(f"{marker} stands inside the reasoning; there are only images", "no_place")


def chat_messages(goal: str, steps: Sequence[Step]) -> list[dict]:
    """The rounds so far as chat messages with structured parts, in true order.

    Text parts are `{"type": "text", "text": ...}` and images `{"type": "image", "image": ImageLike}`. The
    last message is a user turn (what the controller answers next) unless the last step is `stop`, which nothing
    follows. Chat markup inside the texts is defused: `<|` becomes `< |`.
    """
    messages = [_text("user", goal)]
    number = 0
    for step in steps:
        number += step.draws
        messages.append(_text("assistant", format_turn(step, number)))
        if step.image is not None:
            messages.append({"role": "user", "content": [{"type": "image", "image": step.image}]})
        elif step.action == "verify":
            messages.append(_text("user", CONTINUE_TURN))
    return messages


def _text(role: str, text: str) -> dict:
    # A goal that says `<|image_pad|>` or `<|im_start|>assistant` would otherwise become those tokens.
    return {"role": role, "content": [{"type": "text", "text": text.replace("<|", "< |")}]}
