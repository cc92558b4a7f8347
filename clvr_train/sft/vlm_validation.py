"""How well a controller follows fixed trajectories: the loss of every turn, and what it writes where they wrote a turn.

At every turn it is given the true history, so that one slip does not spoil the rounds after it.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import Qwen3VLForConditionalGeneration

from clvr_train.method.protocol import ProtocolError, chat_messages, parse_turn
from clvr_train.method.trajectory import Trajectory
from clvr_train.models.qwen_vl import Controller
from clvr_train.runtime.distributed import World
from clvr_train.sft.chats import Chat


@dataclass(frozen=True)
class Question:
    """A turn that the controller is asked for: the true history, the number of the next image, the true action."""

    messages: list[dict]
    next_image: int
    action: str


def questions(trajectory: Trajectory, turns: int) -> list[Question]:
    """The first so many turns of a trajectory."""
    result = []
    for number, step in enumerate(trajectory.steps[:turns]):
        history = trajectory.steps[:number]
        next_image = 1 + sum(earlier.draws for earlier in history)
        result.append(Question(chat_messages(trajectory.goal, history), next_image, step.action))
    return result


def judge_reply(reply: str, question: Question) -> tuple[bool, bool]:
    """Whether a reply is a turn of the protocol, and whether it is one with the true action."""
    try:
        _, action = parse_turn(reply, question.next_image)
    except ProtocolError:
        return False, False
    return True, action == question.action


def turn_numbers(labels: Tensor) -> Tensor:
    """For every token the number of the assistant's turn that it is of, from 1; 0 where there is no loss.

    Args:
        labels: (batch, length), -100 where there is no loss. Turns are never neighbours: markup stands between them.
    """
    trained = labels != -100
    before = torch.nn.functional.pad(trained, (1, 0))[:, :-1]
    return (trained & ~before).cumsum(1) * trained


@torch.no_grad()
def turn_losses(model: Qwen3VLForConditionalGeneration, inputs: dict[str, Tensor]) -> dict[int, tuple[float, int]]:
    """Summed negative log-likelihood and number of tokens of every turn of a batch, by the turn's number.

    Args:
        model: with the head that TRL's trainer has given it, which makes no logits of whole sequences.
    """
    out = model(**inputs, fused_lm_head=True, use_cache=False)
    numbers = turn_numbers(inputs["labels"])[:, 1:]
    result = {}
    for number in range(1, int(numbers.max()) + 1):
        here = numbers == number
        result[number] = (-out.log_probs[here].sum(dtype=torch.float64).item(), int(here.sum()))
    return result


def validate(
    model: Qwen3VLForConditionalGeneration,
    controller: Controller,
    cases: Sequence[tuple[Trajectory, Chat]],
    collate: Callable[[list[Chat]], dict[str, Tensor]],
    world: World,
) -> dict[str, float]:
    """`val_loss` (mean over tokens), `val_loss_turn_<k>`, `val_parsed` and `val_action` (shares of all turns).

    The ranks share the trajectories. Those with fewer repeat one and do not count it: under ZeRO-3 every rank must do
    as many forwards as the others.

    Args:
        controller: of the same model; its replies are greedy.
        cases: trajectories with what of them is short enough.
        collate: makes a batch of chats, on the model's device.
    """
    training = model.training
    model.eval()
    mine = list(cases[world.rank :: world.size])
    most = -(-len(cases) // world.size)
    sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])

    def add(name: str, value: float, number: float) -> None:
        sums[name][0] += value
        sums[name][1] += number

    for place in range(most):
        trajectory, chat = mine[place] if place < len(mine) else cases[0]
        losses = turn_losses(model, collate([chat]))
        if place < len(mine):
            for number, (loss, tokens) in losses.items():
                add("val_loss", loss, tokens)
                add(f"val_loss_turn_{number}", loss, tokens)
    asked = [question for trajectory, chat in mine for question in questions(trajectory, chat.turns)]
    spare = questions(cases[0][0], 1) * (max(world.gather(len(asked))) - len(asked))
    replies = controller.reply([question.messages for question in asked + spare])
    for question, reply in zip(asked, replies[: len(asked)], strict=True):
        parsed, right = judge_reply(reply, question)
        add("val_parsed", parsed, 1)
        add("val_action", right, 1)
    model.train(training)
    return _means(world.gather(dict(sums)))


def _means(parts: Sequence[dict[str, list[float]]]) -> dict[str, float]:
    totals: dict[str, list[float]] = {}
    for part in parts:
        for name, (value, number) in part.items():
            total = totals.setdefault(name, [0.0, 0.0])
            total[0] += value
            total[1] += number
    return {name: value / number for name, (value, number) in sorted(totals.items())}
