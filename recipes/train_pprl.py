"""Proxy Prompt RL: DiffusionNFT on a LoRA over the SFT weights, groups by (trajectory, step) (CLVR 3.2, A.6).

`reward=proxy` judges by the teacher's proxy prompts, `reward=simple` by the raw reasoning (the ablation); other groups
of `conf/reward/` name other judges. Writes
runs/<run>/{config.yaml, metrics.jsonl, rollouts.jsonl, samples/, ledger/, checkpoints/, lora/, model/}, and where the
sentinel has something to say sentinel.jsonl and healthy/; `model/` is the diffusers folder with the LoRA folded in. On
several GPUs: torchrun --standalone --nproc_per_node N recipes/train_pprl.py ... engine=ddp. `replay=runs/<other>`
trains from the rollouts of another run, with `rejudge=true` judged again. To resume, run the same command again; the
number of GPUs may be another.
"""

import logging
import math
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from torch.nn import Module
from tqdm import tqdm

from clvr_train.method.flow import inference_times
from clvr_train.method.nft import blend_, old_decay
from clvr_train.models.adapters import (
    AVERAGE,
    OLD,
    add_policies,
    fold,
    in_float32,
    parameters,
    plain_copy,
    save_lora,
)
from clvr_train.models.blocks import set_checkpointing
from clvr_train.models.klein import save_klein
from clvr_train.models.sampler import Sampler
from clvr_train.pprl.record import RolloutRecord, load_policies, policy_tensors, rollout_rows
from clvr_train.pprl.reward_stats import reward_statistics
from clvr_train.pprl.rollout import gather_scores, rollout_metrics, set_advantages
from clvr_train.pprl.update import NFTOptions, backward_nft, training_items
from clvr_train.runtime.checkpoint import Saver
from clvr_train.runtime.clock import Clock, memory
from clvr_train.runtime.distributed import World, start
from clvr_train.runtime.engine import Engine
from clvr_train.runtime.metrics import Metrics
from clvr_train.runtime.process import Deferral
from recipes._build import CACHE_KEYS, build_conditioner, build_engine, build_klein, is_finished
from recipes._guard import Guard
from recipes._recipe import recipe, run_folder
from recipes._rollouts import Rollouts
from recipes._services import REWARD_KEYS, Reward, build_reward, judge_latency

logger = logging.getLogger(__name__)
MAY_CHANGE = ("pprl.save_every", "pprl.grid_every", "ledger.max_gb", *CACHE_KEYS, *REWARD_KEYS)
MAY_CHANGE += ("engine.name", "engine.checkpointing", "engine.timeout_s")


@recipe("train_pprl")
def main(cfg: DictConfig) -> None:
    alone = cfg.engine.name == "single"
    with start(cfg.model.device, timeout_s=cfg.engine.timeout_s, collectives=not alone) as world, ExitStack() as stack:
        run = run_folder(cfg, MAY_CHANGE, world)
        if not is_finished(run):
            reward = build_reward(cfg.reward, cfg.pprl.weight_global, cfg.pprl.weight_edit, stack)
            train(cfg, run, reward, world)


def train(cfg: DictConfig, run: Path, reward: Reward, world: World) -> None:
    check_engine(cfg.engine)
    klein = build_klein(cfg.model, expect="base", precision=cfg.engine.precision, device=world.device)
    transformer = klein.transformer.train()
    add_policies(transformer, rank=cfg.lora.rank, alpha=cfg.lora.alpha, seed=cfg.seed)
    set_checkpointing(transformer, cfg.engine.checkpointing)
    conditioner = build_conditioner(klein, cfg.model, cfg.cache)
    sampler = Sampler(conditioner, **chosen(cfg.rollout, "steps", "solver", "cfg", "batch", "batched_cfg"))
    rollouts = Rollouts(cfg, run, reward, sampler, world)
    options = NFTOptions(**chosen(cfg.pprl, *NFTOptions.__dataclass_fields__))
    mixing = chosen(cfg.pprl, "std", "adv_clip_max", "min_valid") | {"mix": cfg.reward.mix}
    timing = chosen(cfg.pprl, "num_times", "time_range", "stratified", "anchor_share")
    times = inference_times(math.prod(klein.grid(conditioner.size_px)), sampler.steps)[:-1].tolist()
    set_advantages([], **mixing)  # what these refuse is refused before anything is drawn
    training_items([], times, run_seed=cfg.seed, epoch=0, **timing)
    engine = build_policy_engine(transformer, world, cfg)

    with ExitStack() as stack:
        sigterm = stack.enter_context(Deferral(world))
        guard = Guard(cfg, run, rollouts, engine, stack)
        saver = stack.enter_context(Saver(run / "checkpoints"))
        saved = engine.resume(saver)
        if saved is not None:
            load_policies(transformer, saved[1])
            guard.load(saved[1])
        resume = saved[0] if saved else None
        metrics = record = None
        clock = Clock()
        if world.first:
            metrics = stack.enter_context(Metrics(run, resume, wandb=cfg.logger.wandb))
            record = stack.enter_context(RolloutRecord(run, resume))

        def save(epoch: int) -> None:
            engine.save(saver, epoch, policy_tensors(transformer) | guard.state())

        done = range(resume or 0, cfg.pprl.epochs)
        for epoch in tqdm(done, desc="train_pprl", initial=resume or 0, total=cfg.pprl.epochs, disable=not world.first):
            world.phase = f"epoch {epoch + 1}: rollouts"
            with clock.phase("rollouts"):
                groups, own = rollouts.of_epoch(epoch)
                rollouts.keep(epoch, own, len(groups))
            with clock.phase("waiting"):
                judged = rollouts.wait(own, partial(save, epoch), sigterm)
            if not judged:
                rollouts.keep(epoch, own, len(groups))
                sigterm.asked()
                sigterm.deliver()
            gather_scores(groups, own, world)
            set_advantages(groups, **mixing)
            rollouts.keep(epoch, own, len(groups))
            items = training_items(groups, times, run_seed=cfg.seed, epoch=epoch, **timing)
            counts = summed(world, reward.counts())
            values = rollout_metrics(groups) | reward_statistics(groups) | counts | judge_latency(counts)
            values["items"] = len(items)
            for part in range(cfg.pprl.steps_per_epoch):
                chunk = items[part :: cfg.pprl.steps_per_epoch]
                if chunk:
                    with clock.phase("update"):
                        values |= backward_nft(conditioner, chunk, options, cfg.pprl.micro_batch, engine)
                        values |= engine.step({"epoch": epoch})
            decay = old_decay(engine.steps, cfg.pprl.old_schedule)
            with clock.phase("sentinel"):
                values |= guard.look(epoch + 1, groups, values, decay)
            policy = engine.trained()
            blend_(parameters(transformer, OLD), policy, decay)
            blend_(parameters(transformer, AVERAGE), policy, cfg.pprl.average_decay)
            if world.first:
                grid = record.write(epoch + 1, groups, images=(epoch + 1) % cfg.pprl.grid_every == 0)
                if grid is not None and cfg.logger.wandb:
                    metrics.image(epoch + 1, "samples", grid)
                    metrics.table(epoch + 1, "rollouts", rollout_rows(groups))
                metrics.log(epoch + 1, **values, old_decay=decay, **clock.take(), **memory(world.device))
            guard.act(epoch + 1)
            ending = sigterm.asked()
            if ending or epoch + 1 == cfg.pprl.epochs or (epoch + 1) % cfg.pprl.save_every == 0:
                save(epoch + 1)
            if ending:
                saver.wait()
                sigterm.deliver()
    logger.info("%d texts were cut to the window of %d tokens", conditioner.texts_cut, klein.window)
    if world.first:
        save_lora(transformer, AVERAGE, run / "lora")
        save_klein(klein.folder, plain_copy(transformer, fold(transformer, AVERAGE)), run / "model")


def check_engine(engine: DictConfig) -> None:
    """Refuses what makes no sense for a LoRA on frozen weights, or has never been tried."""
    refused = {"name": ("zero3",), "precision": ("bf16_states",), "offload": ("optimizer",), "compile": (True,)}
    for key, values in refused.items():
        if engine[key] in values:
            raise ValueError(
                f"engine.{key}={engine[key]}: train_pprl keeps whole base weights and float32 policies on every GPU; "
                "choose engine=single, ddp, zero1 or zero2 and engine.precision=fp32 or bf16"
            )


def build_policy_engine(transformer: Module, world: World, cfg: DictConfig) -> Engine:
    """An engine for the policy. Without DeepSpeed, which wants one dtype, the policy has float32 weights of its own
    whatever the base has, and needs no others beside them.
    """
    engine = cfg.engine.copy()
    if engine.name in ("single", "ddp"):
        engine.precision = "fp32"
    total_steps = cfg.pprl.epochs * cfg.pprl.steps_per_epoch
    built = build_engine(transformer, world, engine, cfg.pprl, total_steps)
    in_float32(transformer, (OLD, AVERAGE))  # DeepSpeed has cast all
    return built


def chosen(section: DictConfig, *names: str) -> dict[str, Any]:
    """Some keys of a section as arguments."""
    return {name: section[name] for name in names}


def summed(world: World, counts: dict[str, float]) -> dict[str, float]:
    """Counts of all ranks together."""
    told = world.gather(counts)
    return {name: sum(rank[name] for rank in told) for name in counts}


if __name__ == "__main__":
    main()
