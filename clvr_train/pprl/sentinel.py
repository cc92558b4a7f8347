"""The watch over PPRL: compares every epoch's signals with what was normal, warns, then stops or rolls back.

Signals come from `pprl.signals`, or from the loop under the names below. The first healthy epochs say what is normal.
A verdict depends on the signals alone, so that all ranks come to the same one.
"""

import json
import math
from collections.abc import Mapping, Sequence
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

    `held_out`: a fall below its best while the training reward is no lower than it was then: the main alarm.
    `merged_score`: a fall below its best. `agreement`: at least. `diversity`: at least this share of the baseline.
    `high_frequency`, `saturation`: at most so many times the baseline, and at least one part in so many of it.
    `velocity_ratio`: at most so far from 1. `off_policy`, `r_saturated`: at most.
    `flat` (contrast dead): below, and `sampler_step` (sampler frozen): above, not to be otherwise for `dead_for` epochs
    in a row. `held_out_missing`: at most; it warns and never acts.
    """

    held_out: float | None = 0.05
    merged_score: float | None = 0.1
    agreement: float | None = -0.25
    diversity: float | None = 0.5
    high_frequency: float | None = 2.0
    saturation: float | None = 1.5
    velocity_ratio: float | None = 0.25
    off_policy: float | None = 0.5
    r_saturated: float | None = 0.5
    flat: float | None = 0.9
    sampler_step: float | None = 1e-6
    held_out_missing: float | None = 0.5


LIMITS = tuple(field.name for field in fields(Limits))
FACTORS, MOST, LASTING, SILENT = (
    ("high_frequency", "saturation"),
    ("off_policy", "r_saturated", "held_out_missing"),
    ("flat", "sampler_step"),
    ("held_out_missing",),
)
FALLING = ("held_out", "merged_score")


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
        baseline: how many values of a signal say what is normal; until then only fixed limits hold for it.
        window: the mean of so many values is compared, since one epoch says little.
        patience: so many values in a row of one signal beyond its limit are an `act`; the ones before it warn.
        deviations: limits against the baseline are at least so many of its standard deviations away from its mean, and
            a fall is at least so many standard errors.
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
        patience: int = 3,
        deviations: float = 2.0,
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
        self._normal: dict[str, list[float]] = {}
        self._recent: dict[str, list[float]] = {}
        self._best: dict[str, list[float]] = {}  # of a score that must not fall: its best mean, the reward's mean then
        self._streak: dict[str, int] = {}
        self._healthy = True

    def observe(self, values: Mapping[str, float]) -> Verdict:
        """The verdict on an epoch. A signal that was not measured stays as it was, its warning included.

        Args:
            values: signals by name, and `reward` wherever a score that must not fall is among them; other names are
                passed over, so that it may be the whole line of the log.
        """
        values = {name: float(values[name]) for name in LIMITS if name in values} | {
            _reward_at(name): float(values["reward"]) for name in FALLING if name in values
        }
        found: dict[str, str] = {}
        for name, value in values.items():
            if math.isfinite(value):
                self._recent[name] = [*self._recent.get(name, []), value][-self.window :]
            else:
                found[name] = f"{name} is {value}"
        for name in LIMITS:
            limit = getattr(self.limits, name)
            if name in values and name not in found and limit is not None:
                message = self._beyond(name, values[name], limit)
                found |= {name: message} if message else {}
        for name, value in values.items():
            self._streak[name] = self._streak.get(name, 0) + 1 if name in found else 0
            normal = self._normal.setdefault(name, [])
            if not found and len(normal) < self.baseline:
                normal.append(value)
        return self._verdict(found)

    def _verdict(self, found: Mapping[str, str]) -> Verdict:
        first = {name: self.dead_for if name in LASTING else 1 for name in self._streak}
        warned = [name for name, streak in self._streak.items() if streak >= first[name]]
        acting = [
            name for name in warned
            if name not in SILENT and self._streak[name] >= first[name] + self.patience - 1
        ]  # fmt: skip
        self._healthy = not warned
        messages = tuple(found.get(name, f"{name}: as at its last measurement") for name in warned)
        if not acting:
            return Verdict(WARNED if warned else HEALTHY, messages)
        if self.action == "warn":
            return Verdict(ACT, messages)
        out = self.action == "roll_back" and (self.rollbacks >= self.max_rollbacks or self.kept is None)
        return Verdict(ACT, messages, "stop" if out else self.action)

    def _beyond(self, name: str, value: float, limit: float) -> str:
        """What is wrong with the newest value of a signal; empty for nothing."""
        recent = self._recent[name]
        mean = math.fsum(recent) / len(recent)
        where = f"(sentinel.limits.{name}={limit:g})"
        if name in FALLING:
            return self._fall(name, mean, limit, where)
        if name == "flat":
            return f"contrast dead: {value:.3g} of the groups are flat, at least {limit:g} {where}" * (value >= limit)
        if name == "sampler_step":
            return f"sampler frozen: sampler_step {value:.3g} is at most {limit:g} {where}" * (value <= limit)
        if name == "velocity_ratio":
            return f"{name} {value:.4g} is more than {limit:g} from 1 {where}" * (abs(value - 1) > limit)
        if name in MOST:
            return f"{name} {value:.3g} is above {limit:g} {where}" * (value > limit)
        if len(self._normal.get(name, [])) < self.baseline:
            return ""
        if name == "agreement":
            return f"{name} {mean:.3g} of the judges is below {limit:g} {where}" * (mean < limit)
        normal, deviation = _statistics(self._normal[name])
        width = self.deviations * deviation
        low = min(normal * limit if name == "diversity" else normal / limit, normal - width)
        high = max(normal * limit, normal + width) if name in FACTORS else math.inf
        side = f"below {low:.4g}" * (mean < low) or f"above {high:.4g}" * (mean > high)
        return f"{name} {mean:.4g} is {side}, baseline {normal:.4g} {where}" * bool(side)

    def _fall(self, name: str, mean: float, limit: float, where: str) -> str:
        """Whether a score has fallen below its best, and for the held-out one, whether the training reward has not."""
        normal, rewards = self._normal.get(name, []), self._recent[_reward_at(name)]
        if len(normal) < self.baseline:
            return ""
        (start, deviation), reward = _statistics(normal), math.fsum(rewards) / len(rewards)
        best = self._best.setdefault(name, [start, _statistics(self._normal[_reward_at(name)])[0]])
        if mean > best[0] and len(self._recent[name]) == self.window:
            best[:] = mean, reward
        limit = max(limit, self.deviations * deviation * math.sqrt(1 / self.baseline + 1 / self.window))
        if best[0] - mean <= limit or (name == "held_out" and reward < best[1]):
            return ""
        return (
            f"{name} {mean:.4g} is more than {limit:.3g} below its best {best[0]:.4g}, while reward has gone from "
            f"{best[1]:.4g} to {reward:.4g} {where}"
        )

    @property
    def looks_closely(self) -> bool:
        """Whether all signals are asked for in the next epoch, rare ones too: the baseline is not complete, or a
        warning is up.
        """
        return not self._healthy or any(len(normal) < self.baseline for normal in self._normal.values() or [[]])

    def keeps(self, epoch: int, every: int) -> bool:
        """Whether the state after an epoch (from 1), just observed, is to be kept as a healthy one: no warning is up,
        and there is none yet, or `every` divides the epoch.
        """
        return self._healthy and (self.kept is None or epoch % every == 0)

    def rolled_back(self) -> None:
        """To be called once the healthy checkpoint is loaded: what was recent is forgotten, the baseline stays."""
        self.rollbacks += 1
        self._recent, self._streak, self._healthy = {}, {}, True

    def state_dict(self) -> dict[str, Any]:
        """Numbers, texts, lists and dicts that JSON gives back unchanged."""
        names = ("rollbacks", "kept", "_normal", "_recent", "_best", "_streak", "_healthy")
        return json.loads(json.dumps({name.strip("_"): getattr(self, name) for name in names}))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`."""
        state = json.loads(json.dumps(state))
        self.rollbacks, self.kept, self._healthy = state["rollbacks"], state["kept"], state["healthy"]
        self._normal, self._recent, self._best = state["normal"], state["recent"], state["best"]
        self._streak = state["streak"]


def _reward_at(name: str) -> str:
    """Under which name the training rewards of the epochs are kept in which a signal was measured."""
    return f"reward_at_{name}"


def _statistics(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation (ddof 1)."""
    mean = math.fsum(values) / len(values)
    return mean, math.sqrt(math.fsum((value - mean) ** 2 for value in values) / max(1, len(values) - 1))


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
