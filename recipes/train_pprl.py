"""Proxy Prompt RL: DiffusionNFT on a LoRA over the SFT weights, groups by (trajectory, step) (CLVR 3.2, A.6).

`reward=proxy` judges by the teacher's proxy prompts, `reward=simple` by the raw reasoning (the ablation); other groups
of `conf/reward/` name other judges. Writes
runs/<run>/{config.yaml, metrics.jsonl, rollouts.jsonl, samples/, checkpoints/, lora/, model/}; `model/` is the
diffusers folder with the LoRA folded in. To resume, run the same command again.
"""

import logging
from contextlib import ExitStack
from pathlib import Path

from omegaconf import DictConfig
from tqdm import tqdm

from clvr_train.data.refusals import Refusals
from clvr_train.method.nft import blend_, old_decay
from clvr_train.method.score import ProxyPrompt
from clvr_train.method.trajectory import Sample
from clvr_train.models.adapters import AVERAGE, OLD, POLICY, add_policies, fold, parameters, plain_copy, save_lora
from clvr_train.models.klein import save_klein
from clvr_train.models.sampler import Sampler
from clvr_train.pprl.record import RolloutRecord, load_policies, policy_tensors
from clvr_train.pprl.rollout import roll_out, rollout_metrics, set_advantages
from clvr_train.pprl.tasks import Task, TaskMix, judgeable
from clvr_train.pprl.update import NFTOptions, backward_nft, training_items
from clvr_train.pprl.waiting import wait_for_scores
from clvr_train.proxy.prompts import read_proxy_prompts
from clvr_train.rewards.combine import Judge, simple_prompt, trajectory_reward
from clvr_train.runtime.checkpoint import Saver
from clvr_train.runtime.distributed import World
from clvr_train.runtime.metrics import Metrics
from clvr_train.runtime.process import Deferral
from recipes._build import CACHE_KEYS, build_conditioner, build_engine, build_klein, is_finished
from recipes._data import direct_samples, read_folder, read_prompts, truncated
from recipes._recipe import recipe, run_folder
from recipes._services import REWARD_KEYS, Reward, build_reward

logger = logging.getLogger(__name__)


def build_tasks(cfg: DictConfig, judge: Judge) -> list[Task]:
    """The contexts to draw from with the prompts of `reward`; with `reward.screen` those are left out whose prompt the
    judge cannot read.
    """
    tasks = []
    goals = []  # without a history: each is its own prompt
    if cfg.data.folder is not None or cfg.data.direct or cfg.data.prompts.folder is None:
        trajectories = read_folder(cfg.data.folder, Refusals(cfg.data.folder, cfg.data.max_refused))
        tasks += _trajectory_tasks(cfg, truncated(trajectories, cfg.data.folder))
        goals += direct_samples(trajectories) if cfg.data.direct else []
    if cfg.data.prompts.folder is not None:
        goals += read_prompts(cfg.data.prompts, cfg.data.max_refused)
    tasks += [Task(sample, ProxyPrompt(sample.goal)) for sample in goals]
    if not cfg.reward.screen:
        logger.info("%d steps with a prompt", len(tasks))
        return tasks
    readable = judgeable(tasks, lambda generation, task: trajectory_reward(judge, generation, task.prompt))
    logger.info("%d steps with a prompt, %d that the judge can read", len(tasks), len(readable))
    return readable


def _trajectory_tasks(cfg: DictConfig, samples: list[Sample]) -> list[Task]:
    if cfg.reward.prompts == "simple":
        return [Task(sample, simple_prompt(sample)) for sample in samples]
    if cfg.reward.prompts == "proxy":
        prompts = read_proxy_prompts(cfg.data.folder, samples)
        logger.info("%d of %d steps have a proxy prompt", len(prompts), len(samples))
        return [Task(sample, prompts[sample.key]) for sample in samples if sample.key in prompts]
    raise ValueError(f"reward.prompts={cfg.reward.prompts!r} is not one of proxy, simple")


@recipe("train_pprl")
def main(cfg: DictConfig) -> None:
    run = run_folder(cfg, may_change=("pprl.save_every", "pprl.grid_every", *CACHE_KEYS, *REWARD_KEYS))
    if is_finished(run):
        return
    with ExitStack() as stack:
        train(cfg, run, build_reward(cfg.reward, cfg.pprl.weight_global, cfg.pprl.weight_edit, stack))


def train(cfg: DictConfig, run: Path, reward: Reward) -> None:
    mix = TaskMix(build_tasks(cfg, reward.judge), t2i_share=cfg.pprl.t2i_share, seed=cfg.seed)
    klein = build_klein(cfg.model, expect="base")
    transformer = klein.transformer
    add_policies(transformer, rank=cfg.lora.rank, alpha=cfg.lora.alpha, seed=cfg.seed)
    conditioner = build_conditioner(klein, cfg.model, cfg.cache)
    sampler = Sampler(conditioner, steps=cfg.rollout.steps, cfg=cfg.rollout.cfg, batch=cfg.rollout.batch)
    options = NFTOptions(**{name: cfg.pprl[name] for name in NFTOptions.__dataclass_fields__})
    total_steps = cfg.pprl.epochs * cfg.pprl.steps_per_epoch
    engine = build_engine(transformer, World(device=klein.device), cfg.engine, cfg.pprl, total_steps)

    with ExitStack() as stack:
        sigterm = stack.enter_context(Deferral())
        saver = stack.enter_context(Saver(run / "checkpoints"))
        saved = engine.resume(saver)
        if saved is not None:
            load_policies(transformer, saved[1])
        resume = saved[0] if saved else None
        first = resume or 0
        metrics = stack.enter_context(Metrics(run, resume, wandb=cfg.logger.wandb))
        record = stack.enter_context(RolloutRecord(run, resume))
        for epoch in tqdm(range(first, cfg.pprl.epochs), desc="train_pprl", initial=first, total=cfg.pprl.epochs):
            nfe_before = sampler.nfe
            tasks = mix.groups(epoch, cfg.rollout.groups)
            groups = roll_out(
                sampler,
                tasks,
                reward,
                group_size=cfg.rollout.group_size,
                run_seed=cfg.seed,
                epoch=epoch,
                workers=reward.workers,
            )
            scored = wait_for_scores(
                groups,
                reward,
                max_missing=cfg.reward.max_missing,
                healthy=reward.healthy,
                save=lambda epoch=epoch: (engine.save(saver, epoch, policy_tensors(transformer)), saver.wait()),
                ended=lambda: sigterm.pending,
                wait_s=cfg.reward.wait_s,
                workers=reward.workers,
            )
            if not scored:
                sigterm.deliver()
            set_advantages(
                groups,
                std=cfg.pprl.std,
                adv_clip_max=cfg.pprl.adv_clip_max,
                min_valid=cfg.pprl.min_valid,
                mix=cfg.reward.mix,
            )
            items = training_items(
                groups,
                steps=cfg.rollout.steps,
                num_times=cfg.pprl.num_times,
                time_range=tuple(cfg.pprl.time_range),
                run_seed=cfg.seed,
                epoch=epoch,
                anchor_share=cfg.pprl.anchor_share,
            )
            values = rollout_metrics(groups) | reward.counts() | {"nfe": sampler.nfe - nfe_before, "items": len(items)}
            for part in range(cfg.pprl.steps_per_epoch):
                chunk = items[part :: cfg.pprl.steps_per_epoch]
                if chunk:
                    values |= backward_nft(conditioner, chunk, options, cfg.pprl.micro_batch)
                    values |= engine.step()
            decay = old_decay(engine.steps, cfg.pprl.old_schedule)
            blend_(parameters(transformer, OLD), parameters(transformer, POLICY), decay)
            blend_(parameters(transformer, AVERAGE), parameters(transformer, POLICY), cfg.pprl.average_decay)
            metrics.log(epoch + 1, **values, old_decay=decay)
            record.write(epoch + 1, groups, images=(epoch + 1) % cfg.pprl.grid_every == 0)
            ending = sigterm.asked()
            if ending or ((epoch + 1) % cfg.pprl.save_every == 0 and epoch + 1 < cfg.pprl.epochs):
                engine.save(saver, epoch + 1, policy_tensors(transformer))
            if ending:
                saver.wait()
                sigterm.deliver()
    logger.info("%d texts were cut to the window of %d tokens", conditioner.texts_cut, klein.window)
    save_lora(transformer, AVERAGE, run / "lora")
    save_klein(klein.folder, plain_copy(transformer, fold(transformer, AVERAGE)), run / "model")


if __name__ == "__main__":
    main()
