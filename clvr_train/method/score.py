"""What judges and teachers answer. A failed judge gives a *missing* score, never a number."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from PIL.Image import Image

from clvr_train.method.trajectory import Sample


@dataclass(frozen=True)
class Score:
    """A reward in [0, 1], or a missing one with the reason. `parts` holds the dimensions it was made of.

    `weights` names the parts of which the value is the weighted mean (they sum to 1), if it is one. `transcript` is
    what the judge has answered, if in words.
    """

    value: float | None
    reason: str = ""
    parts: dict[str, float] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)
    transcript: str = ""

    def __post_init__(self) -> None:
        if self.value is not None and not 0.0 <= self.value <= 1.0:
            raise ValueError(f"score {self.value} is outside [0, 1]; a judge that failed must return value=None")
        if self.value is None and not self.reason:
            raise ValueError("a missing score needs a reason")

    @property
    def missing(self) -> bool:
        return self.value is None

    @property
    def dimensions(self) -> dict[str, tuple[float, float]]:
        """What the value is the weighted mean of, as name -> (value, weight); the value itself if of nothing."""
        if self.value is None:
            return {}
        return {name: (self.parts[name], weight) for name, weight in self.weights.items()} or {"": (self.value, 1.0)}


def weighted_mean(scores: Mapping[str, tuple[Score, float]]) -> Score:
    """The mean of scores by weights, with its parts under the scores' names; missing if one of them is.

    One score alone stays as it is. A score that is itself a weighted mean comes apart into its own dimensions.

    Raises:
        ValueError: a weight is negative, or none is above 0.
    """
    total = sum(weight for _, weight in scores.values())
    if not total > 0 or any(weight < 0 for _, weight in scores.values()):
        raise ValueError(f"weights {', '.join(f'{name}={w}' for name, (_, w) in scores.items())}: all >= 0, one above")
    missing = next((score for score, _ in scores.values() if score.missing), None)
    if missing is not None or len(scores) == 1:
        return missing or next(iter(scores.values()))[0]
    parts = {name: score.value for name, (score, _) in scores.items() if score.value is not None}  # it is of none
    value = sum(scores[name][1] * part for name, part in parts.items()) / total
    weights: dict[str, float] = {}
    said = [f"{name}: {score.transcript}" for name, (score, _) in scores.items() if score.transcript]
    for name, (score, weight) in scores.items():
        if len(score.parts) > 1:  # a single part is the value again
            parts |= {f"{name}_{part}": value for part, value in score.parts.items()}
        inner = {f"{name}_{part}": share for part, share in score.weights.items()} or {name: 1.0}
        weights |= {part: share * weight / total for part, share in inner.items()}
    return Score(value, parts=parts, weights=weights, transcript="\n".join(said))


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
