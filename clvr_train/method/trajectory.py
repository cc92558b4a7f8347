"""The nouns of closed-loop visual reasoning: trajectory, step, truncated sample (CLVR 3.1, A.3, A.6).

An image is an opaque value here: decoded, or a pointer (a path, a `StoredImage`) that `data.images.open_image` opens.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from PIL.Image import Image


@dataclass(frozen=True)
class StoredImage:
    """A pointer to an encoded image inside another file: a member of a tar shard, a cell of a parquet file.

    `name` stands for it in messages, as `<file>:<record>:<field>`. `read` gives the encoded bytes; it is a
    `functools.partial` of a module-level function and of little that pickles, so that a worker can be given it.
    `head`, where the container has one, gives the first so many bytes alone.
    """

    name: str
    read: Callable[[], bytes]
    head: Callable[[int], bytes] | None = None


ImageLike = Path | Image | StoredImage

DRAWING_ACTIONS = ("generate", "edit")
ACTIONS = (*DRAWING_ACTIONS, "verify", "stop")


@dataclass(frozen=True)
class Step:
    """One round of the controller: its reasoning `r_k`, its action, and the image `I_k` if the action draws."""

    reasoning: str
    action: str
    image: ImageLike | None = None

    @property
    def draws(self) -> bool:
        return self.action in DRAWING_ACTIONS


@dataclass(frozen=True)
class Trajectory:
    """A goal `P` and the rounds that followed it.

    Raises:
        ValueError: naming the field, when an id, goal or reasoning is empty, an action is unknown, an image is
            missing or superfluous, the first image is not generated, or a round follows `stop`.
    """

    id: str
    goal: str
    steps: tuple[Step, ...]

    def __post_init__(self) -> None:
        for field in ("id", "goal"):
            if not getattr(self, field).strip():
                raise ValueError(f"{field}: must not be empty")
        if not self.steps:
            raise ValueError("steps: must not be empty")
        drawn = 0
        for number, step in enumerate(self.steps, start=1):
            where = f"steps[{number}]"
            if not step.reasoning.strip():
                raise ValueError(f"{where}.reasoning: must not be empty")
            if step.action not in ACTIONS:
                raise ValueError(f"{where}.action: {step.action!r} is not one of {', '.join(ACTIONS)}")
            if step.draws != (step.image is not None):
                raise ValueError(f"{where}.image: {step.action!r} {'needs' if step.draws else 'takes no'} image")
            if step.action == "edit" and drawn == 0:
                raise ValueError(f"{where}.action: 'edit' before any image")
            if step.action == "stop" and number != len(self.steps):
                raise ValueError(f"{where}.action: a round follows 'stop'")
            drawn += step.draws

    @property
    def images(self) -> tuple[ImageLike, ...]:
        """`I_1 .. I_T`, in the order in which they were drawn."""
        return tuple(step.image for step in self.steps if step.image is not None)


@dataclass(frozen=True)
class Sample:
    """A trajectory truncated at its k-th image: the context `C_k` and, in training, the target `I_k` (CLVR 3.2).

    `step` is k, counted from 1. `reasonings` are all texts up to the round that draws, `references` are `I_1 ..
    I_{k-1}`.
    """

    trajectory_id: str
    step: int
    goal: str
    reasonings: tuple[str, ...]
    references: tuple[ImageLike, ...] = ()
    target: ImageLike | None = None

    @property
    def key(self) -> tuple[str, int]:
        """What groups rollouts: never the text, which may repeat over trajectories."""
        return self.trajectory_id, self.step
