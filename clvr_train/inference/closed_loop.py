"""Closed-loop inference: the controller reasons and looks, the drawing model draws (CLVR 3.3, A.8).

All goals advance together, a round at a time: one batch of replies, then one batch of images. Whatever the controller
writes, every goal ends: images, verify rounds in a row and attempts at a well-formed turn are all bounded, and the
user's thinking budget bounds the rest.
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
class Budget:
    """How much a goal may take; what ends it by a bound leaves its last image as the result.

    `max_rounds`: images. `max_verify`: verify rounds in a row. `max_seconds`: of wall time since the start; looked at
    between rounds, and not before the first image. `max_nfe`: network evaluations of the drawing model.
    `verify_every`: after so many images the next turn counts as a verify, whatever its action: its reasoning stays, and
    the controller is asked again, which lets it look twice; None: it looks when it wants to.

    Raises:
        ValueError: for a bound below 1, or seconds below 0.
    """

    max_rounds: int = 8
    max_verify: int = 2
    max_seconds: float | None = None
    max_nfe: int | None = None
    verify_every: int | None = None

    def __post_init__(self) -> None:
        for name in ("max_rounds", "max_nfe", "verify_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value}: must be at least 1")
        if self.max_seconds is not None and self.max_seconds < 0:
            raise ValueError(f"max_seconds={self.max_seconds}: must be at least 0")


@dataclass(frozen=True)
class Result:
    """What became of a goal.

    `trajectory` is what training reads too; its last image is the result. It is `None` if nothing was drawn.
    `stop_reason` is `stop`, `malformed: ...` or the name of the bound that was met. `nfe` counts network evaluations of
    the drawing model, `turn_seconds` for every round the goal's share of the batches it was in.
    """

    trajectory: Trajectory | None
    stop_reason: str
    nfe: int
    turn_seconds: tuple[float, ...]

    @property
    def seconds(self) -> float:
        return sum(self.turn_seconds)


@dataclass
class _Run:
    id: str
    goal: str
    steps: list[Step] = field(default_factory=list)
    images: list[Image] = field(default_factory=list)
    stop_reason: str = ""
    turn_seconds: list[float] = field(default_factory=list)

    def verifies(self) -> int:
        """Verify rounds since the last image."""
        count = 0
        while count < len(self.steps) and self.steps[-1 - count].action == "verify":
            count += 1
        return count

    def result(self, nfe_per_image: int) -> Result:
        trajectory = Trajectory(self.id, self.goal, tuple(self.steps)) if self.images else None
        return Result(trajectory, self.stop_reason, nfe_per_image * len(self.images), tuple(self.turn_seconds))

    def has_to_verify(self, every: int | None) -> bool:
        """Whether an image was just drawn of which every so many-th is looked at twice."""
        drawn = bool(self.steps) and self.steps[-1].draws
        return every is not None and drawn and len(self.images) % every == 0


def run_closed_loop(
    controller: Replies,
    draw: Draw,
    goals: Sequence[tuple[str, str]],
    *,
    budget: Budget | None = None,
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
        retries: further attempts, sampled, at a turn that breaks the protocol; then the canvas stands as it is.
        on_done: called after each round with the number of goals that ended in it.

    Raises:
        ValueError: if an id comes twice, or no image can be drawn within `budget.max_nfe`.
    """
    budget = budget or Budget()
    if budget.max_nfe is not None and budget.max_nfe < nfe_per_image:
        raise ValueError(f"max_nfe={budget.max_nfe}: an image takes {nfe_per_image} network evaluations")
    if len({name for name, _ in goals}) != len(goals):
        raise ValueError("goals: an id comes twice")
    runs = [_Run(name, text) for name, text in goals]
    began = time.monotonic()
    while active := [run for run in runs if not run.stop_reason]:
        started = time.monotonic()
        drawing = _turns(controller, active, budget, retries, seed)
        _draw(draw, drawing, seed)
        share = (time.monotonic() - started) / len(active)
        for run in active:
            run.turn_seconds.append(share)
            if run.images and not run.stop_reason:
                run.stop_reason = _spent(run, budget, nfe_per_image, time.monotonic() - began)
        if on_done is not None:
            on_done(sum(bool(run.stop_reason) for run in active))
    return [run.result(nfe_per_image) for run in runs]


def _spent(run: _Run, budget: Budget, nfe_per_image: int, seconds: float) -> str:
    """The bound that leaves the goal no further round, or nothing."""
    if len(run.images) == budget.max_rounds:
        return "max_rounds"
    if budget.max_nfe is not None and nfe_per_image * (len(run.images) + 1) > budget.max_nfe:
        return "max_nfe"
    return "max_seconds" if budget.max_seconds is not None and seconds > budget.max_seconds else ""


def _turns(
    controller: Replies, active: list[_Run], budget: Budget, retries: int, seed: int
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
        if run.has_to_verify(budget.verify_every):
            action = "verify"
        if action in DRAWING_ACTIONS:
            drawing.append((run, reasoning, action))
        elif action == "verify" and run.verifies() == budget.max_verify:
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


def _draw(draw: Draw, drawing: list[tuple[_Run, str, str]], seed: int) -> None:
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
