"""Closed-loop inference: the controller reasons and looks, the drawing model draws (CLVR 3.3, A.8).

Goals advance together, a round at a time, whichever round each of them is in: one batch of replies, then one batch of
images. Whatever the controller writes or fails to write, every goal ends: images, verify rounds in a row and attempts
at a well-formed turn are all bounded, and the user's thinking budget bounds the rest.
"""

import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Protocol

from PIL.Image import Image

from clvr_train.method.protocol import ProtocolError, chat_messages, parse_turn
from clvr_train.method.trajectory import DRAWING_ACTIONS, Sample, Step, Trajectory
from clvr_train.runtime.seeding import generator

Draw = Callable[[Sequence[Sample], Sequence[tuple]], list[Image]]


@dataclass(frozen=True)
class NoReply:
    """Why a conversation got no reply. `again`: another attempt, sampled, may fare better."""

    reason: str
    again: bool = False


class Replies(Protocol):
    """What the loop asks of a controller (`models.qwen_vl.Controller`, `inference.chat_controller.ChatController`).

    A reply is greedy, or drawn with `seed` if it is given.
    """

    def reply(self, conversations: Sequence[list[dict]], seed: int | None = None) -> Sequence[str | NoReply]: ...


@dataclass(frozen=True)
class Budget:
    """How much a goal may take; what ends it by a bound leaves its last image as the result.

    `max_rounds`: images. `max_verify`: verify rounds in a row. `max_seconds`: of wall time since the goal's first round
    began; looked at before every drawing and after every round, but not before the first image. `max_nfe`: network
    evaluations of the drawing model.
    `verify_every`: after so many images the next turn counts as a verify, whatever its action: its reasoning stays, and
    the controller is asked again, which lets it look twice; None: it looks when it wants to.

    Raises:
        ValueError: for a bound that is no whole number of at least 1 (`max_verify`: 0), or no seconds of at least 0.
    """

    max_rounds: int = 8
    max_verify: int = 2
    max_seconds: float | None = None
    max_nfe: int | None = None
    verify_every: int | None = None

    def __post_init__(self) -> None:
        for name, least in (("max_rounds", 1), ("max_verify", 0), ("max_nfe", 1), ("verify_every", 1)):
            value = getattr(self, name)
            if value is None and name in ("max_nfe", "verify_every"):
                continue
            if not isinstance(value, int):
                raise ValueError(f"{name}={value}: must be a whole number")
            if value < least:
                raise ValueError(f"{name}={value}: must be at least {least}")
        if self.max_seconds is not None and not self.max_seconds >= 0:
            raise ValueError(f"max_seconds={self.max_seconds}: must be at least 0")


@dataclass(frozen=True)
class Result:
    """What became of a goal.

    `trajectory` is what training reads too; its last image is the result. It is `None` if nothing was drawn.
    `stop_reason` is `stop`, the name of the bound that was met, `malformed: ...`, or `controller: ...` if that gave no
    reply. `nfe` counts network evaluations of the drawing model, `turn_seconds` for every round the goal's share of the
    batches it was in.
    """

    trajectory: Trajectory | None
    stop_reason: str
    nfe: int
    turn_seconds: tuple[float, ...]

    @property
    def seconds(self) -> float:
        return sum(self.turn_seconds)

    @property
    def image(self) -> Image | None:
        """The last canvas, which is the best one so far."""
        return self.trajectory.images[-1] if self.trajectory else None

    def facts(self) -> dict:
        """What it took and why it ended, for files; seconds to the millisecond."""
        turn_seconds = [round(seconds, 3) for seconds in self.turn_seconds]
        return {
            "stop_reason": self.stop_reason,
            "images": len(self.trajectory.images) if self.trajectory else 0,
            "nfe": self.nfe,
            "seconds": round(sum(turn_seconds), 3),
            "turn_seconds": turn_seconds,
        }


@dataclass(eq=False)
class Run:
    """A goal under way; `stop_reason` is empty until it ends."""

    id: str
    goal: str
    budget: Budget
    steps: list[Step] = field(default_factory=list)
    images: list[Image] = field(default_factory=list)
    stop_reason: str = ""
    turn_seconds: list[float] = field(default_factory=list)
    began: float = field(default_factory=time.monotonic)

    def verifies(self) -> int:
        """Verify rounds since the last image."""
        count = 0
        while count < len(self.steps) and self.steps[-1 - count].action == "verify":
            count += 1
        return count

    def result(self, nfe_per_image: int) -> Result:
        """What there is of it so far."""
        trajectory = Trajectory(self.id, self.goal, tuple(self.steps)) if self.images else None
        return Result(trajectory, self.stop_reason, nfe_per_image * len(self.images), tuple(self.turn_seconds))

    def has_to_verify(self) -> bool:
        """Whether an image was just drawn of which every so many-th is looked at twice."""
        every, drawn = self.budget.verify_every, bool(self.steps) and self.steps[-1].draws
        return every is not None and drawn and len(self.images) % every == 0

    def is_late(self) -> bool:
        limit = self.budget.max_seconds
        return bool(self.images) and limit is not None and time.monotonic() - self.began > limit

    def spent(self, nfe_per_image: int) -> str:
        """The bound that leaves the goal no further round, or nothing."""
        if len(self.images) == self.budget.max_rounds:
            return "max_rounds"
        if self.budget.max_nfe is not None and nfe_per_image * (len(self.images) + 1) > self.budget.max_nfe:
            return "max_nfe"
        return "max_seconds" if self.is_late() else ""


def check_budget(budget: Budget, nfe_per_image: int) -> None:
    """Raises ValueError if the budget leaves no image."""
    if budget.max_nfe is not None and budget.max_nfe < nfe_per_image:
        raise ValueError(f"max_nfe={budget.max_nfe}: an image takes {nfe_per_image} network evaluations")


def run_closed_loop(
    controller: Replies,
    draw: Draw,
    goals: Sequence[tuple[str, str]],
    *,
    budget: Budget | None = None,
    retries: int = 2,
    seed: int = 0,
    nfe_per_image: int = 1,
    active: int | None = None,
    workers: int = 1,
    on_done: Callable[[int], None] | None = None,
    on_result: Callable[[str, Result], None] | None = None,
) -> list[Result]:
    """Runs every goal until its controller stops or a bound is met; results in the order of the goals.

    Args:
        draw: images of samples from seeds, `models.sampler.Sampler.draw`.
        goals: (id, text) pairs.
        active: most goals under way at once; where one ends the next joins the others, in whichever round they are.
            None: all.
        retries, seed, workers: see `advance`.
        on_done: called after each round with the number of goals that ended in it; on_result: with the id and the
            result of every goal, as it ends.

    Raises:
        ValueError: if an id comes twice, or no image can be drawn within `budget.max_nfe`.
    """
    budget = budget or Budget()
    check_budget(budget, nfe_per_image)
    if active is not None and active < 1:
        raise ValueError(f"active={active}: must be at least 1")
    if len({name for name, _ in goals}) != len(goals):
        raise ValueError("goals: an id comes twice")
    waiting, runs, results = deque(goals), [], {}
    while waiting or runs:
        while waiting and (active is None or len(runs) < active):
            runs.append(Run(*waiting.popleft(), budget))
        advance(controller, draw, runs, retries=retries, seed=seed, nfe_per_image=nfe_per_image, workers=workers)
        ended = {run.id: run.result(nfe_per_image) for run in runs if run.stop_reason}
        runs = [run for run in runs if not run.stop_reason]
        results |= ended
        if on_done is not None:
            on_done(len(ended))
        if on_result is not None:
            for name, result in ended.items():
                on_result(name, result)
    return [results[name] for name, _ in goals]


def advance(
    controller: Replies,
    draw: Draw,
    runs: Sequence[Run],
    *,
    retries: int = 2,
    seed: int = 0,
    nfe_per_image: int = 1,
    workers: int = 1,
) -> None:
    """One round of every run that has not ended; they may have begun at different times and differ in their budgets.

    The noise of the k-th image and the retries of a turn depend on (seed, goal id, position) only, and so not on
    which other goals are in the batch.

    Args:
        retries: further attempts, sampled, at a turn that breaks the protocol; then the canvas stands as it is.
        workers: goals whose retries are under way at once; above 1 only for a controller that many threads may ask.
    """
    active = [run for run in runs if not run.stop_reason]
    if not active:
        return
    started = time.monotonic()
    drawing = []
    for run, reasoning, action in _turns(controller, active, retries, seed, workers):
        if run.is_late():
            run.stop_reason = "max_seconds"
        else:
            drawing.append((run, reasoning, action))
    _draw(draw, drawing, seed)
    share = (time.monotonic() - started) / len(active)
    for run in active:
        run.turn_seconds.append(share)
        if run.images and not run.stop_reason:
            run.stop_reason = run.spent(nfe_per_image)


def _turns(controller: Replies, active: list[Run], retries: int, seed: int, workers: int) -> list[tuple[Run, str, str]]:
    """One turn of each run; those that draw come back with their reasoning and action, the others are done here."""
    chats = [chat_messages(run.goal, run.steps) for run in active]
    replies = controller.reply(chats)

    def turn(run: Run, chat: list[dict], reply: str | NoReply) -> tuple[str, str] | ProtocolError:
        try:
            return _parse(controller, run, chat, reply, retries, seed)
        except ProtocolError as error:
            return error

    with ThreadPoolExecutor(workers) as pool:
        turns = list(pool.map(turn, active, chats, replies))
    drawing = []
    for run, found in zip(active, turns, strict=True):
        if isinstance(found, ProtocolError):
            run.stop_reason = str(found) if found.rule == _NO_REPLY else f"malformed: {found}"
            continue
        reasoning, action = found
        action = "verify" if run.has_to_verify() else action
        if action in DRAWING_ACTIONS:
            drawing.append((run, reasoning, action))
        elif action == "verify" and run.verifies() == run.budget.max_verify:
            run.stop_reason = "max_verify"
        else:
            run.steps.append(Step(reasoning, action))
            run.stop_reason = "stop" if action == "stop" else ""
    return drawing


_NO_REPLY = "no_reply"  # the rule of the ProtocolError that no further attempt mends


def _parse(
    controller: Replies, run: Run, chat: list[dict], reply: str | NoReply, retries: int, seed: int
) -> tuple[str, str]:
    for attempt in range(1, retries + 1):
        try:
            return _read(reply, len(run.images) + 1)
        except ProtocolError as error:
            if error.rule == _NO_REPLY:
                raise
            # Greedy decoding would write the same again. Retries are rare, so one by one: then they depend on the
            # goal alone and not on its neighbours in a batch.
            position = ("controller", seed, run.id, len(run.steps), attempt)
            reply = controller.reply([chat], seed=generator(*position).initial_seed())[0]
    return _read(reply, len(run.images) + 1)


def _read(reply: str | NoReply, next_image: int) -> tuple[str, str]:
    if not isinstance(reply, NoReply):
        return parse_turn(reply, next_image)
    if reply.again:
        raise ProtocolError(reply.reason)
    raise ProtocolError(f"controller: {reply.reason}", _NO_REPLY)


def _draw(draw: Draw, drawing: list[tuple[Run, str, str]], seed: int) -> None:
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
