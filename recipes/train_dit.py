"""Full-parameter SFT of the diffusion transformer on truncated trajectories (CLVR 3.2, A.6).

Writes runs/<run>/{config.yaml, metrics.jsonl, samples/, checkpoints/, model/}; `model/` is a diffusers folder. On
several GPUs: torchrun --standalone --nproc_per_node N recipes/train_dit.py ... engine=zero2. To resume, run the same
command again; the number of GPUs may be another.
"""

import json
import logging
import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from itertools import count
from pathlib import Path

from omegaconf import DictConfig
from tqdm import tqdm

from clvr_train.data.buckets import sizes_of_area
from clvr_train.data.loader import Drawn
from clvr_train.data.refusals import Refusals
from clvr_train.method.trajectory import Sample
from clvr_train.models.klein import save_klein, transformer_from
from clvr_train.models.utilisation import Utilisation
from clvr_train.runtime.checkpoint import Saver
from clvr_train.runtime.clock import Clock, memory
from clvr_train.runtime.distributed import World, start
from clvr_train.runtime.engine import Engine
from clvr_train.runtime.metrics import Metrics
from clvr_train.runtime.process import Deferral
from clvr_train.sft.dit import LossOutputs, backward_flow_matching
from recipes._build import (
    CACHE_KEYS,
    build_conditioner,
    build_engine,
    build_klein,
    is_finished,
    trained_transformer,
)
from recipes._data import encode_ahead, full_batches, number_of_steps, read_batches, read_sources, sample_order
from recipes._recipe import recipe, run_folder
from recipes._validation import VALIDATION_KEYS, Validation

logger = logging.getLogger(__name__)
MAY_CHANGE = ("train.lr", "train.steps", "train.epochs", "train.log_every", "train.save_every", "data.workers")
MAY_CHANGE += ("replay", *CACHE_KEYS, *VALIDATION_KEYS)
MAY_CHANGE += ("engine.name", "engine.offload", "engine.checkpointing", "engine.compile", "engine.timeout_s")


@recipe("train_dit")
def main(cfg: DictConfig) -> None:
    alone = cfg.engine.name == "single"
    with start(cfg.model.device, timeout_s=cfg.engine.timeout_s, collectives=not alone) as world:
        train(cfg, world)


def train(cfg: DictConfig, world: World) -> None:
    run = run_folder(cfg, MAY_CHANGE, world)
    if is_finished(run):
        return
    klein = build_klein(cfg.model, expect="base", precision=cfg.engine.precision, device=world.device)
    sources, refused = read_sources(cfg.data)
    side_px = round(math.sqrt(math.prod(cfg.model.size_px)))
    sizes = sizes_of_area(side_px, klein.token_px) if cfg.data.aspects else ()
    conditioner = build_conditioner(klein, cfg.model, cfg.cache, sizes)
    encode_ahead(sources, conditioner, world)
    logger.info(
        "%d samples; %d texts cut to the window of %d tokens (%d tokens lost)",
        sum(len(samples) for samples, _ in sources), conditioner.texts_cut, klein.window, conditioner.tokens_cut,
    )  # fmt: skip
    draw = sample_order(sources, cfg.data, cfg.train.batch, cfg.seed).batch
    if cfg.train.full_batches:
        draw = full_batches(sources, conditioner, cfg)
    steps = number_of_steps(cfg, sources)
    validation = Validation(cfg, conditioner, world, run)
    transformer = trained_transformer(klein, cfg.engine)
    averaging = {"ema_decay": cfg.train.ema_decay, "ema_every": cfg.train.ema_every}
    failed = run / "nonfinite"
    dump = None if cfg.replay else failed
    engine = build_engine(transformer, world, cfg.engine, cfg.train, steps, dump=dump, **averaging)

    def backward(batch: list[tuple[Drawn, Sample]]) -> LossOutputs:
        return backward_flow_matching(
            conditioner,
            [sample for _, sample in batch],
            [(cfg.seed, epoch, *sample.key) for (epoch, _), sample in batch],
            engine=engine,
            shift=cfg.train.shift,
            fixed_mu=cfg.train.fixed_mu,
            text_dropout=cfg.train.text_dropout,
            micro_batch=cfg.train.micro_batch,
        )

    with Saver(failed if cfg.replay else run / "checkpoints") as saver, Deferral(world) as sigterm:
        resume = engine.steps if engine.resume(saver) else None
        drawn = (world.share(draw(number)) for number in count(engine.batches))
        refusals = Refusals("data", cfg.data.max_refused)
        batches = read_batches(sources, drawn, conditioner.sizes, cfg.data.workers, refusals)
        if cfg.replay:
            replay(engine, batches, backward, failed)
            return
        clock, use = Clock(), Utilisation(conditioner, cfg.engine.precision)
        bar = tqdm(desc="train_dit", initial=engine.steps, total=steps, disable=not world.first)
        with Metrics(run, resume, wandb=cfg.logger.wandb) if world.first else nullcontext() as metrics, bar:
            while engine.steps < steps:
                world.phase = f"step {engine.steps + 1}: reading"
                with clock.phase("data"):
                    batch = next(batches)
                with clock.phase("forward_backward"):
                    out = backward(batch)
                with clock.phase("update"):
                    values = engine.step(account(batch, out))
                if metrics:
                    use.add([sample for _, sample in batch])
                if engine.skipped_in_a_row:
                    continue  # nothing has changed
                bar.update()
                last = engine.steps == steps
                with clock.phase("validation"):
                    validated = validation.at(engine, last, metrics)
                if last or validated or engine.steps % cfg.train.log_every == 0:
                    values |= {"refused": refused + sum(world.gather(refusals.refused)), **validated}
                    if metrics:
                        seconds = clock.take()
                        trained = seconds["seconds_total"] - seconds["seconds_validation"]
                        values |= position(engine, batch) | seconds | use.take(trained) | memory(world.device)
                        metrics.log(engine.steps, loss=out.loss, **out.metrics, **values)
                ending = sigterm.asked()
                if ending or last or engine.steps % cfg.train.save_every == 0:
                    engine.save(saver, engine.steps)
                if ending:
                    saver.wait()
                    sigterm.deliver()
        refusals.finish()
    for name, average in (("model_ema", True), ("model", False))[cfg.train.ema_decay is None :]:
        weights = engine.full_weights(average)
        if world.first:
            tuned = transformer_from(transformer.config, weights)
            save_klein(klein.folder, tuned, run / name, precision=cfg.train.save_precision)


def position(engine: Engine, batch: list[tuple[Drawn, Sample]]) -> dict[str, float]:
    """How far the data has been read: batches drawn, and the latest epoch that a sample of this one is of."""
    return {"data_batch": engine.batches, "data_epoch": max((epoch for (epoch, _), _ in batch), default=0)}


def account(batch: list[tuple[Drawn, Sample]], out: LossOutputs) -> dict:
    """What is kept of a batch whose gradient is not finite: its samples, each with its epoch, and its losses."""
    samples = [[epoch, *sample.key] for (epoch, _), sample in batch]
    return {"samples": samples, "losses": [str(loss) for loss in out.parts]}


def replay(engine: Engine, batches: Iterator[list], backward: Callable[[list], LossOutputs], failed: Path) -> None:
    """Repeats the batches that have ended the run, with the weights that they met, until one is finite."""
    if not (failed / "batches.json").exists():
        raise ValueError(f"replay=true: {failed} is not there; no run of this name has ended for want of finite values")
    steps = engine.steps
    while engine.steps == steps:
        batch = next(batches)
        kept = account(batch, backward(batch))
        logger.warning("rank %d, batch %d: %s", engine.world.rank, engine.batches, json.dumps(kept))
        engine.step()
    logger.warning("the gradient of batch %d is finite now", engine.batches - 1)


if __name__ == "__main__":
    main()
