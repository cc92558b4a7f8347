"""What watches over `train_pprl` beside its loop: the sentinel with its signals, and the evaluation of the merge."""

import logging
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import fields
from pathlib import Path

from omegaconf import DictConfig
from torch import Tensor

from clvr_train.pprl.merged import MergedEvaluation
from clvr_train.pprl.record import load_policies, policy_tensors, save_grid
from clvr_train.pprl.rollout import Group
from clvr_train.pprl.sentinel import Limits, Sentinel, Verdict, as_tensor, from_tensor, note
from clvr_train.pprl.signals import Probe, rollout_signals, spread
from clvr_train.runtime.checkpoint import Saver
from clvr_train.runtime.engine import Engine
from recipes._rollouts import Rollouts
from recipes._services import Reward, build_reward

logger = logging.getLogger(__name__)
STATE = "sentinel"  # in a checkpoint
OPTIONS = ("action", "baseline", "window", "patience", "deviations", "dead_for", "max_rollbacks")


class Guard:
    """Looks at every epoch, and keeps the last healthy state in `<run>/healthy`, to which it rolls back."""

    def __init__(self, cfg: DictConfig, run: Path, rollouts: Rollouts, engine: Engine, stack: ExitStack) -> None:
        self.cfg, self.run, self.rollouts, self.engine = cfg, run, rollouts, engine
        self.world, self.sampler = rollouts.world, rollouts.sampler
        limits = Limits(**{field.name: cfg.sentinel.limits[field.name] for field in fields(Limits)})
        self.sentinel = Sentinel(limits=limits, **{name: cfg.sentinel[name] for name in OPTIONS})
        self._held_out = build_held_out(cfg, stack)
        self._saver = stack.enter_context(Saver(run / "healthy", keep=2))
        self._verdict = Verdict("healthy")
        self._probe = None
        if cfg.sentinel.probe:
            self._probe = Probe(self.sampler, spread(rollouts.tasks, cfg.sentinel.probe), cfg.seed, self.world)
        self._merged = None
        if cfg.merged.every:
            self._merged = MergedEvaluation(
                self.sampler.conditioner,
                Path(cfg.merged.base),
                Path(cfg.merged.distilled),
                rollouts.validation,
                self.world,
                steps=cfg.merged.steps,
                seed=cfg.seed,
                batch=cfg.rollout.batch,
                alpha_distill=cfg.merged.alpha_distill,
                alpha_align=cfg.merged.alpha_align,
            )

    def state(self) -> dict[str, Tensor]:
        """For a checkpoint."""
        return {STATE: as_tensor(self.sentinel.state_dict())}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """The inverse of `state`."""
        self.sentinel.load_state_dict(from_tensor(tensors[STATE]))

    def look(self, epoch: int, groups: Sequence[Group], values: dict[str, float], decay: float) -> dict[str, float]:
        """Signals and verdict of an epoch (from 1), after the optimiser's steps and before `old` follows by `decay`."""
        self.world.phase = f"epoch {epoch}: signals"
        signals = rollout_signals(groups, self.world)
        reward, second = self.rollouts.reward, self._held_out
        if self._probe is not None and (self.sentinel.warned or epoch % self.cfg.sentinel.every == 0):
            workers = reward.workers, second.workers if second else 0
            signals |= self._probe.velocities(decay) | self._probe.pictures(reward, second, workers)
        if self._merged is not None and epoch % self.cfg.merged.every == 0:
            evaluated = self._merged(reward, reward.workers)
            signals |= evaluated.metrics
            if self.world.first:
                save_grid(self.run / "samples" / f"merged-{epoch:05d}.png", [list(evaluated.images.values())])
        self._verdict = self.sentinel.observe(values | signals)
        for message in self._verdict.messages:
            logger.warning("epoch %d: %s", epoch, message)
        return {name: value for name, value in signals.items() if name not in values} | self._verdict.metrics()

    def act(self, epoch: int) -> None:
        """Keeps the state after an epoch, or goes back to the last one that was kept.

        Raises:
            ValueError: the run is to be stopped.
        """
        verdict, transformer = self._verdict, self.sampler.conditioner.klein.transformer
        if self.sentinel.action != "warn" and self.sentinel.keeps(epoch, self.cfg.pprl.save_every):
            self.engine.save(self._saver, epoch, policy_tensors(transformer))
            self.sentinel.kept = epoch
        if verdict.action == "roll_back":
            self._saver.wait()
            step, tensors = self.engine.resume(self._saver, self.sentinel.kept)
            load_policies(transformer, tensors)
            self.sentinel.rolled_back()
            logger.warning("epoch %d: rolled back to the state after epoch %d", epoch, step)
        if not verdict.healthy and self.world.first:
            note(self.run, epoch, verdict, self.sentinel)
        if verdict.action == "stop":
            self._saver.wait()
            kept = "there is no healthy state"
            if self.sentinel.kept is not None:
                kept = f"{self.run / 'healthy'} has the state after epoch {self.sentinel.kept}, the last healthy one"
            raise ValueError(f"epoch {epoch}: the sentinel ends the run: {'; '.join(verdict.messages)}; {kept}")


def build_held_out(cfg: DictConfig, stack: ExitStack) -> Reward | None:
    """The judges of `sentinel.held_out`, with the settings that they have in the reward; None if none has a weight."""
    if not any(cfg.sentinel.held_out.values()):
        return None
    reward = cfg.reward.copy()
    reward.of_edits = {}
    reward.of_images = {name: weight for name, weight in cfg.sentinel.held_out.items() if weight}
    return build_reward(reward, 1.0, 0.0, stack)
