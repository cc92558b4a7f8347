"""What `train_pprl` trains on: the contexts to draw from, and the groups of rollouts of every epoch."""

import logging
import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from clvr_train.data.refusals import Refusals
from clvr_train.method.score import ProxyPrompt, TeacherRefusal
from clvr_train.method.trajectory import Sample
from clvr_train.models.adapters import OLD, adapter_weights
from clvr_train.models.sampler import Sampler
from clvr_train.pprl.ledger import Ledger, policy_hash, replayed
from clvr_train.pprl.merged import hold_back
from clvr_train.pprl.rollout import NOT_JUDGED, Group, judge_missing, new_groups, roll_out, show
from clvr_train.pprl.tasks import Task, TaskMix, judgeable
from clvr_train.pprl.waiting import wait_for_scores
from clvr_train.proxy.prompts import read_proxy_prompts
from clvr_train.rewards.combine import simple_prompt
from clvr_train.runtime.distributed import World
from clvr_train.runtime.process import Deferral
from clvr_train.shapes.controller import make_trajectories
from clvr_train.shapes.teacher import ShapesTeacher
from recipes._data import direct_samples, read_folder, read_prompts, truncated
from recipes._services import Reward

logger = logging.getLogger(__name__)


def build_tasks(cfg: DictConfig, reward: Reward, world: World) -> list[Task]:
    """The contexts to draw from with the prompts of `reward`; with `reward.screen` those are left out whose prompt the
    judge cannot read.
    """
    tasks = []
    goals = []  # without a history: each is its own prompt
    if cfg.data.trajectories and cfg.data.folder is not None:
        raise ValueError(f"data.trajectories={cfg.data.trajectories}: instead of a folder; set data.folder=null")
    if cfg.data.trajectories or cfg.data.folder is not None or cfg.data.direct or cfg.data.prompts.folder is None:
        if cfg.data.trajectories:
            trajectories = list(make_trajectories(cfg.data.trajectories, cfg.seed))
        else:
            trajectories = read_folder(cfg.data.folder, Refusals(cfg.data.folder, cfg.data.max_refused))
        tasks += _trajectory_tasks(cfg, truncated(trajectories, cfg.data.folder or "data.trajectories"))
        goals += direct_samples(trajectories) if cfg.data.direct else []
    if cfg.data.prompts.folder is not None:
        goals += read_prompts(cfg.data.prompts, cfg.data.max_refused)
    tasks += [Task(sample, ProxyPrompt(sample.goal)) for sample in goals]
    if not cfg.reward.screen:
        logger.info("%d steps with a prompt", len(tasks))
        return tasks
    readable = judgeable(tasks, reward, world, reward.workers)
    if len(readable) < len(tasks) and not all(world.gather(reward.healthy())):
        raise ValueError("reward.screen=true: a judge is away; start it, and run the same command again")
    logger.info("%d steps with a prompt, %d that the judge can read", len(tasks), len(readable))
    return readable


def _trajectory_tasks(cfg: DictConfig, samples: list[Sample]) -> list[Task]:
    if cfg.reward.prompts == "simple":
        return [Task(sample, simple_prompt(sample)) for sample in samples]
    if cfg.reward.prompts == "proxy":
        prompts = _shapes_prompts(samples) if cfg.data.trajectories else read_proxy_prompts(cfg.data.folder, samples)
        logger.info("%d of %d steps have a proxy prompt", len(prompts), len(samples))
        return [Task(sample, prompts[sample.key]) for sample in samples if sample.key in prompts]
    raise ValueError(f"reward.prompts={cfg.reward.prompts!r} is not one of proxy, simple")


def _shapes_prompts(samples: Sequence[Sample]) -> dict[tuple[str, int], ProxyPrompt]:
    """What the teacher of the shapes world writes, where it can."""
    prompts, teacher = {}, ShapesTeacher()
    for sample in samples:
        with suppress(TeacherRefusal):
            prompts[sample.key] = teacher.proxy_prompt(sample)
    return prompts


class Rollouts:
    """Where the groups of an epoch come from: drawn, or from the ledger of this run or of another (`replay`).

    `tasks` are those that are trained on, `validation` those held back for the evaluation of the merge.
    """

    def __init__(self, cfg: DictConfig, run: Path, reward: Reward, sampler: Sampler, world: World) -> None:
        self.cfg, self.reward, self.sampler, self.world = cfg, reward, sampler, world
        self._ledger = Ledger(run / "ledger", cfg.ledger.max_gb)
        if world.first:
            self._ledger.sweep()
        world.barrier()
        self._source = None if cfg.replay is None else Ledger(ledger_folder(cfg.replay), math.inf)
        if cfg.rejudge and self._source is None:
            raise ValueError("rejudge=true: needs replay=...")
        tasks = build_tasks(cfg, reward, world)
        self.tasks, self.validation = hold_back(tasks, cfg.merged.num if cfg.merged.every else 0, cfg.seed)
        if self._source is None:
            self._mix = TaskMix(self.tasks, t2i_share=cfg.pprl.t2i_share, seed=cfg.seed)
            return
        self._by_key: dict[tuple[str, int], list[Task]] = {}
        for task in tasks:
            self._by_key.setdefault(task.sample.key, []).append(task)
        self._epochs = [epoch for epoch in self._source.epochs() if self._source.whole(epoch)]
        if len(self._epochs) < len(self._source.epochs()):
            logger.warning("%s: epochs that are not whole are left out", self._source.folder)
        if len(self._epochs) < cfg.pprl.epochs:
            raise ValueError(
                f"replay={cfg.replay}: its ledger has {len(self._epochs)} whole epochs, and "
                f"pprl.epochs={cfg.pprl.epochs}"
            )

    def of_epoch(self, epoch: int) -> tuple[list[Group], list[Group]]:
        """All groups of an epoch, and this rank's share of them, which it has drawn and judged."""
        if self._source is not None:
            return self._replayed(epoch)
        rollout = self.cfg.rollout
        tasks = self._mix.groups(epoch, rollout.groups)
        groups = new_groups(tasks, group_size=rollout.group_size, run_seed=self.cfg.seed, epoch=epoch)
        own = self.world.share(groups)
        self._settings = self._drawn_with()
        left = self._ledger.resume(epoch, own, self._settings)
        kept = [group for group in own if group not in left]
        show(self.sampler, kept)
        judge_missing([g for g in kept if NOT_JUDGED in g.scores], self.reward, self.reward.workers)
        roll_out(self.sampler, left, self.reward, self.reward.workers)
        return groups, own

    def _replayed(self, epoch: int) -> tuple[list[Group], list[Group]]:
        where = f"{self._source.folder}: epoch {self._epochs[epoch]}"
        entries = self._source.entries(self._epochs[epoch])
        groups = [replayed(entry, self._by_key, where) for entry in entries]
        self._settings = entries[0]["settings"]
        wanted = {name: value for name, value in self._drawn_with().items() if name not in ("policy", "cfg")}
        for name, value in wanted.items():
            if self._settings[name] != value:
                raise ValueError(f"{where}: drawn with {name}={self._settings[name]}, and this run has {value}")
        own = self.world.share(groups)
        for group, entry in zip(own, self.world.share(entries), strict=True):
            group.x0 = self._source.tokens(entry)
            if group.x0 is None:
                raise ValueError(f"{where}: group {group.place} has no tokens any more")
        show(self.sampler, own)
        if self.cfg.rejudge:
            for group in own:
                group.scores = [NOT_JUDGED] * group.size
            judge_missing(own, self.reward, self.reward.workers)
        return groups, own

    def wait(self, own: Sequence[Group], save: Callable[[], None], sigterm: Deferral) -> bool:
        """As `pprl.waiting.wait_for_scores`: whether enough of the rollouts are judged, or the run is to end first. The
        scores of a replay are what they are.
        """
        if self._source is not None and not self.cfg.rejudge:
            return True
        clients = bool(self.reward.clients)
        return wait_for_scores(
            own,
            self.reward,
            max_missing=self.cfg.reward.max_missing,
            healthy=self.reward.healthy,
            save=save,
            ended=lambda: sigterm.pending,
            wait_s=self.cfg.reward.wait_s,
            workers=self.reward.workers,
            world=self.world,
            unusable=(lambda: self.reward.counts()["judge_unusable"]) if clients else None,
        )

    def keep(self, epoch: int, own: Sequence[Group], total: int) -> None:
        """Writes this rank's groups, of so many in all, into the ledger as they are now."""
        self._ledger.write(epoch, own, self._settings, total)
        if self.world.first:
            self._ledger.prune()

    def _drawn_with(self) -> dict[str, Any]:
        """What the rollouts of the policy as it is now depend on."""
        klein, sampler = self.sampler.conditioner.klein, self.sampler
        return {
            "policy": policy_hash(adapter_weights(klein.transformer, OLD)),
            "steps": sampler.steps,
            "solver": sampler.solver,
            "cfg": sampler.cfg,
            "size_px": list(sampler.conditioner.size_px),
            "window": klein.window,
        }


def ledger_folder(replay: str) -> Path:
    """The ledger of a run's folder, or the folder itself if it is one."""
    for folder in (Path(replay) / "ledger", Path(replay)):
        if (folder / "objects").is_dir():
            return folder
    raise FileNotFoundError(f"replay={replay}: neither a run with a ledger nor a ledger")
