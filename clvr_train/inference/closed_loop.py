"""Closed-loop inference: the controller reasons and looks, the drawing model draws (CLVR 3.3, A.8).

All goals advance together, a round at a time: one batch of replies, then one batch of images. Whatever the controller
writes, every goal ends: images, verify rounds in a row and attempts at a well-formed turn are all bounded.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from PIL.Image import Image

from clvr_train.method.protocol import ProtocolError, chat_messages, parse_turn
from clvr_train.method.trajectory import DRAWING_ACTIONS, Sample, Step, Trajectory
from clvr_train.runtime.seeding import generator

Draw = Callable[[Sequence[Sample], Sequence[tuple]], list[Image]]


class Replies(Protocol):
    """What the loop asks of a controller (`models.qwen_vl.Controller`)."""

    def reply(self, conversations: Sequence[list[dict]], seed: int | None = None) -> list[str]: ...


@dataclass(frozen=True)
class Result:
    """What became of a goal.

    `trajectory` is what training reads too; its last image is the result. It is `None` if nothing was drawn.
    `stop_reason` is `stop`, `max_rounds`, `max_verify` or `malformed: ...`. `nfe` counts network evaluations of
    the drawing model, `seconds` the goal's share of the batches it was in.
    """

    trajectory: Trajectory | None
    stop_reason: str
    nfe: int
    seconds: float


@dataclass
class _Run:
    id: str
    goal: str
    steps: list[Step] = field(default_factory=list)
    images: list[Image] = field(default_factory=list)
    stop_reason: str = ""
    seconds: float = 0.0

    def verifies(self) -> int:
        """Verify rounds since the last image."""
        count = 0
        while count < len(self.steps) and self.steps[-1 - count].action == "verify":
            count += 1
        return count

    def result(self, nfe_per_image: int) -> Result:
        trajectory = Trajectory(self.id, self.goal, tuple(self.steps)) if self.images else None
        return Result(trajectory, self.stop_reason, nfe_per_image * len(self.images), self.seconds)


def run_closed_loop(
    controller: Replies,
    draw: Draw,
    goals: Sequence[tuple[str, str]],
    *,
    max_rounds: int = 8,
    max_verify: int = 2,
    retries: int = 2,
    seed: int = 0,
    nfe_per_image: int = 1,
    on_done: Callable[[int], None] | None = None,
) -> list[Result]:
    """Runs every goal until its controller stops or a bound is met.

    The noise of the k-th image and the retries of a turn depend on (seed, goal id, position) only, and so not on
    which other goals are in the batch.

    Args:
        draw: images of samples from seeds, `models.sampler.Sampler.draw`.
        goals: (id, text) pairs.
        max_rounds: most images of a goal. max_verify: most verify rounds in a row.
        retries: further attempts, sampled, at a turn that breaks the protocol; then the canvas stands as it is.
        on_done: called after each round with the number of goals that ended in it.

    Raises:
        ValueError: if `max_rounds` is below 1 or an id comes twice.
    """
    if max_rounds < 1:
        raise ValueError(f"max_rounds={max_rounds}: must be at least 1")
    if len({name for name, _ in goals}) != len(goals):
        raise ValueError("goals: an id comes twice")
    runs = [_Run(name, text) for name, text in goals]
    while active := [run for run in runs if not run.stop_reason]:
        started = time.monotonic()
        drawing = _turns(controller, active, max_verify, retries, seed)
        _draw(draw, drawing, max_rounds, seed)
        share = (time.monotonic() - started) / len(active)
        for run in active:
            run.seconds += share
        if on_done is not None:
            on_done(sum(bool(run.stop_reason) for run in active))
    return [run.result(nfe_per_image) for run in runs]


def _turns(
    controller: Replies, active: list[_Run], max_verify: int, retries: int, seed: int
) -> list[tuple[_Run, str, str]]:
    """One turn of each run; those that draw come back with their reasoning and action, the others are done here."""
    chats = [chat_messages(run.goal, run.steps) for run in active]
    drawing = []
    for run, chat, text in zip(active, chats, controller.reply(chats), strict=True):
        try:
            reasoning, action = _parse(controller, run, chat, text, retries, seed)
        except ProtocolError as error:
            run.stop_reason = f"malformed: {error}"
            continue
        if action in DRAWING_ACTIONS:
            drawing.append((run, reasoning, action))
        elif action == "verify" and run.verifies() == max_verify:
            run.stop_reason = "max_verify"
        else:
            run.steps.append(Step(reasoning, action))
            run.stop_reason = "stop" if action == "stop" else ""
    return drawing


def _parse(
    controller: Replies, run: _Run, chat: list[dict], text: str, retries: int, seed: int
) -> tuple[str, str]:
    for attempt in range(1, retries + 1):
        try:
            return parse_turn(text, len(run.images) + 1)
        except ProtocolError:
            # Greedy decoding would write the same again. Retries are rare, so one by one: then they depend on the
            # goal alone and not on its neighbours in a batch.
            position = ("controller", seed, run.id, len(run.steps), attempt)
            text = controller.reply([chat], seed=generator(*position).initial_seed())[0]
    return parse_turn(text, len(run.images) + 1)


def _draw(draw: Draw, drawing: list[tuple[_Run, str, str]], max_rounds: int, seed: int) -> None:
    samples, seeds = [], []
    for run, reasoning, _ in drawing:
        number = len(run.images) + 1
        reasonings = (*(step.reasoning for step in run.steps), reasoning)
        samples.append(Sample(run.id, number, run.goal, reasonings, tuple(run.images)))
        seeds.append(("evaluate", seed, run.id, number))  # the first image has the noise of single-step evaluation
    images = draw(samples, seeds) if samples else []
    for (run, reasoning, action), image in zip(drawing, images, strict=True):
        run.steps.append(Step(reasoning, action, image))
        run.images.append(image)
        if len(run.images) == max_rounds:
            run.stop_reason = "max_rounds"
