"""The watch over PPRL: compares every epoch's signals with what is normal, warns, then stops or rolls back.

Signals come from `pprl.signals` and `pprl.merged`. A verdict depends on them alone, and they are the same on all ranks.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ACTIONS = ("warn", "stop", "roll_back")
HEALTHY, WARNED, ACT = "healthy", "warned", "act"
LEVELS = {HEALTHY: 0.0, WARNED: 1.0, ACT: 2.0}
FILE = "sentinel.jsonl"


@dataclass(frozen=True)
class Limits:
    """What is still normal of each signal; None: it is not looked at.

    `held_out`: a fall below its best while the training reward of the same pictures is no lower than it was then: the
    main alarm. `merged_score`: a fall below its best. `saturation`, `high_frequency`: at most so many times what the
    reference's pictures have, and at least one part in so many of it. `diversity`: at least this share of the baseline.
    `velocity_ratio`: at most so far from 1. `off_policy`, `r_saturated`: at most.
    `flat` (contrast dead): below, and `sampler_step` (sampler frozen): above, not to be otherwise for `dead_for` epochs
    in a row. `held_out_missing`: at most; it warns and never acts.
    """

    held_out: float | None = 0.04
    merged_score: float | None = 0.1
    saturation: float | None = 1.12
    high_frequency: float | None = 2.0
    diversity: float | None = 0.5
    velocity_ratio: float | None = 0.25
    off_policy: float | None = 0.5
    r_saturated: float | None = 0.5
    flat: float | None = 0.9
    sampler_step: float | None = 1e-6
    held_out_missing: float | None = 0.5


LIMITS = tuple(field.name for field in fields(Limits))
RATIOS, MOST, LASTING, SILENT = (
    ("saturation", "high_frequency"),
    ("off_policy", "r_saturated", "held_out_missing"),
    ("flat", "sampler_step"),
    ("held_out_missing",),
)


@dataclass(frozen=True)
class Verdict:
    """What the sentinel says of an epoch: `healthy`, `warned` or `act`, why, and what is to be done then (`stop`,
    `roll_back`; None for nothing).
    """

    state: str
    messages: tuple[str, ...] = ()
    action: str | None = None

    @property
    def healthy(self) -> bool:
        return self.state == HEALTHY

    def metrics(self) -> dict[str, float]:
        """For the log: 0, 1, 2 for healthy, warned, act."""
        return {"sentinel": LEVELS[self.state]}


class Sentinel:
    """Judges the signals of every epoch.

    Args:
        action: what is done in the end: `warn` (nothing but warnings), `stop`, or `roll_back`.
        patience: so many values in a row of one signal beyond its limit are an `act`; the ones before it warn.
        baseline, window: the diversity is normal in its first so many healthy epochs; the mean of so many of its newest
            values is compared.
        deviations: a fall of `held_out` is at least so many of its standard errors, and one of the diversity so many
            standard deviations of its baseline.
        dead_for: epochs, see `Limits`.
        max_rollbacks: one more is a stop.

    Raises:
        ValueError: an unknown action, or a number that is too small.
    """

    def __init__(
        self,
        *,
        action: str = "warn",
        limits: Limits | None = None,
        baseline: int = 5,
        window: int = 3,
        patience: int = 2,
        deviations: float = 1.5,
        dead_for: int = 5,
        max_rollbacks: int = 2,
    ) -> None:
        if action not in ACTIONS:
            raise ValueError(f"sentinel.action={action!r} is not one of {', '.join(ACTIONS)}")
        for name, value, least in (
            ("baseline", baseline, 2), ("window", window, 1), ("patience", patience, 1), ("dead_for", dead_for, 1),
        ):  # fmt: skip
            if value < least:
                raise ValueError(f"sentinel.{name}={value}: at least {least} is needed")
        self.action, self.limits = action, limits or Limits()
        self.baseline, self.window, self.patience = baseline, window, patience
        self.deviations, self.dead_for, self.max_rollbacks = deviations, dead_for, max_rollbacks
        self.rollbacks = 0
        self.kept: int | None = None  # the epoch of the last healthy checkpoint
        self._normal: list[float] = []  # diversities
        self._recent: list[float] = []
        self._best: dict[str, list[float]] = {}  # of a score that must not fall: its best, and the reward then
        self._streak: dict[str, int] = {}
        self._warned = False

    def observe(self, values: Mapping[str, float]) -> Verdict:
        """The verdict on an epoch. A signal that was not measured stays as it was, its warning included.

        Args:
            values: signals by name, of `signals.rollout_signals`, `signals.Probe` and `merged.MergedEvaluation`; other
                names are passed over, so that it may be the whole line of the log.
        """
        found: dict[str, str] = {}
        known = [name for name in LIMITS if name in values and getattr(self.limits, name) is not None]
        for name in known:
            if not math.isfinite(values[name]):
                found[name] = f"{name} is {values[name]}"
            elif message := self._beyond(name, values, getattr(self.limits, name)):
                found[name] = f"{message} (sentinel.limits.{name}={getattr(self.limits, name):g})"
        self._streak |= {name: self._streak.get(name, 0) + 1 if name in found else 0 for name in known}
        if not found and "diversity" in values and len(self._normal) < self.baseline:
            self._normal.append(float(values["diversity"]))
        return self._verdict(found)

    def _verdict(self, found: Mapping[str, str]) -> Verdict:
        first = {name: self.dead_for if name in LASTING else 1 for name in self._streak}
        warned = [name for name, streak in self._streak.items() if streak >= first[name]]
        acting = [
            name for name in warned
            if name not in SILENT and self._streak[name] >= first[name] + self.patience - 1
        ]  # fmt: skip
        self._warned = bool(warned)
        messages = tuple(found.get(name, f"{name}: as at its last measurement") for name in warned)
        if not acting:
            return Verdict(WARNED if warned else HEALTHY, messages)
        if self.action == "warn":
            return Verdict(ACT, messages)
        out = self.action == "roll_back" and (self.rollbacks >= self.max_rollbacks or self.kept is None)
        return Verdict(ACT, messages, "stop" if out else self.action)

    def _beyond(self, name: str, values: Mapping[str, float], limit: float) -> str:
        """What is wrong with a signal; empty for nothing."""
        value = float(values[name])
        if name == "held_out":
            error, reward = values.get("held_out_error", 0.0), values.get("probe_reward", 0.0)
            best = self._best.setdefault(name, [0.0, 0.0])  # changes, so 0 is the reference
            fall = self._fall(name, value, reward)
            text = f"{name} has fallen by {fall:.3g} while the reward has risen by {reward - best[1]:.3g}"
            return text * (fall > max(limit, self.deviations * error) and reward >= best[1])
        if name == "merged_score":
            fall = self._fall(name, value, 0.0)
            return f"{name} {value:.4g} is {fall:.3g} below its best" * (fall > limit)
        if name == "flat":
            return f"contrast dead: {value:.3g} of the groups are flat, at least {limit:g}" * (value >= limit)
        if name == "sampler_step":
            return f"sampler frozen: {name} {value:.3g} is at most {limit:g}" * (value <= limit)
        if name == "velocity_ratio":
            return f"{name} {value:.4g} is more than {limit:g} from 1" * (abs(value - 1) > limit)
        if name in RATIOS:
            text = f"{name} is {value:.3g} times that of the reference's pictures"
            return text * (not 1 / limit <= value <= limit)
        if name in MOST:
            return f"{name} {value:.3g} is above {limit:g}" * (value > limit)
        return self._narrow(value, limit)

    def _fall(self, name: str, value: float, reward: float) -> float:
        """How far a score is below its best, which is kept with the reward at that time."""
        best = self._best.setdefault(name, [value, reward])
        if value > best[0]:
            best[:] = value, reward
        return best[0] - value

    def _narrow(self, diversity: float, limit: float) -> str:
        """Whether groups have become alike, against the baseline."""
        self._recent = [*self._recent, diversity][-self.window :]
        if len(self._normal) < self.baseline:
            return ""
        mean, normal = (math.fsum(values) / len(values) for values in (self._recent, self._normal))
        squares = math.fsum((value - normal) ** 2 for value in self._normal)
        low = min(limit * normal, normal - self.deviations * math.sqrt(squares / (self.baseline - 1)))
        return f"diversity {mean:.3g} is below {low:.3g}, at first it was {normal:.3g}" * (mean < low)

    @property
    def warned(self) -> bool:
        """Whether a warning is up: the loop then measures all that it can in every epoch."""
        return self._warned

    def keeps(self, epoch: int, every: int) -> bool:
        """Whether the state after an epoch (from 1), just observed, is to be kept as a healthy one: no warning is up,
        and there is none yet, or `every` divides the epoch.
        """
        return not self._warned and (self.kept is None or epoch % every == 0)

    def rolled_back(self) -> None:
        """To be called once the healthy checkpoint is loaded: what was recent is forgotten, the baseline stays."""
        self.rollbacks += 1
        self._recent, self._streak, self._warned = [], {}, False

    def state_dict(self) -> dict[str, Any]:
        """Numbers, texts, lists and dicts that JSON gives back unchanged."""
        names = ("rollbacks", "kept", "_normal", "_recent", "_best", "_streak", "_warned")
        return json.loads(json.dumps({name.strip("_"): getattr(self, name) for name in names}))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`."""
        state = json.loads(json.dumps(state))
        self.rollbacks, self.kept, self._warned = state["rollbacks"], state["kept"], state["warned"]
        self._normal, self._recent, self._best = state["normal"], state["recent"], state["best"]
        self._streak = state["streak"]


def as_tensor(state: Mapping[str, Any]) -> Tensor:
    """A state of plain values as bytes of JSON, for a checkpoint that takes tensors."""
    return torch.frombuffer(bytearray(json.dumps(state).encode()), dtype=torch.uint8)


def from_tensor(tensor: Tensor) -> dict[str, Any]:
    """The inverse of `as_tensor`."""
    return json.loads(bytes(tensor.tolist()))


def note(run: Path, epoch: int, verdict: Verdict, sentinel: Sentinel) -> None:
    """Appends a verdict that is not healthy to `<run>/sentinel.jsonl`; what a resumed run does again is there again."""
    row = {"epoch": epoch, "state": verdict.state, "action": verdict.action, "rollbacks": sentinel.rollbacks}
    with (run / FILE).open("a", encoding="utf-8") as file:
        file.write(json.dumps(row | {"kept": sentinel.kept, "messages": verdict.messages}) + "\n")
