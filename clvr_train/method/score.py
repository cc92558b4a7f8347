"""What judges and teachers answer. A failed judge gives a *missing* score, never a number."""

from dataclasses import dataclass, field

from PIL.Image import Image

from clvr_train.method.trajectory import Sample


@dataclass(frozen=True)
class Score:
    """A reward in [0, 1], or a missing one with the reason. `parts` holds the dimensions it was made of."""

    value: float | None
    reason: str = ""
    parts: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.value is not None and not 0.0 <= self.value <= 1.0:
            raise ValueError(f"score {self.value} is outside [0, 1]; a judge that failed must return value=None")
        if self.value is None and not self.reason:
            raise ValueError("a missing score needs a reason")

    @property
    def missing(self) -> bool:
        return self.value is None


@dataclass(frozen=True)
class ProxyPrompt:
    """The judgeable form of a context `C_k` (CLVR 3.2).

    `p_t2i` describes the scene that `I_k` should show; `p_i2i` is the edit of this step and `idx` the history images
    (from 1) that it builds on: `None` and `()` at k = 1.
    """

    p_t2i: str
    p_i2i: str | None = None
    idx: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.p_t2i.strip():
            raise ValueError("p_t2i: must not be empty")
        if (self.p_i2i is None) != (not self.idx):
            raise ValueError(f"p_i2i and idx belong together, got p_i2i={self.p_i2i!r}, idx={self.idx}")


@dataclass(frozen=True)
class Generation:
    """One rollout: the context it was drawn from, the image, and the position that seeded its noise."""

    sample: Sample
    image: Image
    seed: tuple


class TeacherRefusal(ValueError):
    """The teacher cannot write a proxy prompt for this context; the message is the reason."""
