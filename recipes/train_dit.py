"""Full-parameter SFT of the diffusion transformer on truncated trajectories (CLVR 3.2, A.6).

Writes runs/<run>/{config.yaml, metrics.jsonl, checkpoints/, model/}; `model/` is a diffusers folder. To resume, run the
same command again.
"""

import logging
import math

from omegaconf import DictConfig
from tqdm import tqdm

from clvr_train.data.buckets import sizes_of_area
from clvr_train.data.refusals import Refusals
from clvr_train.models.klein import save_klein
from clvr_train.runtime.metrics import Metrics
from clvr_train.runtime.process import Deferral
from clvr_train.sft.dit import backward_flow_matching
from recipes._build import CACHE_KEYS, build_conditioner, build_engine, build_klein, is_finished
from recipes._data import encode_ahead, full_batches, read_batches, read_sources, sample_order
from recipes._recipe import recipe, run_folder

logger = logging.getLogger(__name__)
MAY_CHANGE = ("train.lr", "train.steps", "train.log_every", "train.save_every", "data.workers", *CACHE_KEYS)


@recipe("train_dit")
def main(cfg: DictConfig) -> None:
    run = run_folder(cfg, may_change=MAY_CHANGE)
    if is_finished(run):
        return
    klein = build_klein(cfg.model, expect="base")
    sources, refused = read_sources(cfg.data)
    side_px = round(math.sqrt(math.prod(cfg.model.size_px)))
    sizes = sizes_of_area(side_px, klein.token_px) if cfg.data.aspects else ()
    conditioner = build_conditioner(klein, cfg.model, cfg.cache, sizes)
    encode_ahead(sources, conditioner)
    logger.info(
        "%d samples; %d texts cut to the window of %d tokens (%d tokens lost)",
        sum(len(samples) for samples, _ in sources), conditioner.texts_cut, klein.window, conditioner.tokens_cut,
    )  # fmt: skip
    transformer = klein.transformer.requires_grad_(True).train()
    engine = build_engine(transformer.parameters(), cfg.train, cfg.train.steps)
    saved = engine.resume(run / "checkpoints")
    if saved is not None:
        transformer.load_state_dict(saved[1])
    draw = sample_order(sources, cfg.data, cfg.train.batch, cfg.seed).batch
    if cfg.train.full_batches:
        draw = full_batches(sources, conditioner, cfg)
    resume = engine.steps if saved else None
    with Metrics(run, resume, wandb=cfg.logger.wandb) as metrics, Deferral() as sigterm:
        drawn = map(draw, range(engine.steps, cfg.train.steps))
        refusals = Refusals("data", cfg.data.max_refused)
        batches = read_batches(sources, drawn, conditioner.sizes, cfg.data.workers, refusals)
        for batch in tqdm(batches, desc="train_dit", initial=engine.steps, total=cfg.train.steps):
            out = backward_flow_matching(
                conditioner,
                [sample for _, sample in batch],
                [(cfg.seed, epoch, *sample.key) for (epoch, _), sample in batch],
                shift=cfg.train.shift,
                fixed_mu=cfg.train.fixed_mu,
                text_dropout=cfg.train.text_dropout,
                micro_batch=cfg.train.micro_batch,
            )
            values = engine.step()
            if engine.steps % cfg.train.log_every == 0 or engine.steps == cfg.train.steps:
                metrics.log(engine.steps, loss=out.loss, refused=refused + refusals.refused, **out.metrics, **values)
            if sigterm.pending or (engine.steps % cfg.train.save_every == 0 and engine.steps < cfg.train.steps):
                engine.save(run / "checkpoints", engine.steps, transformer.state_dict())
            sigterm.deliver()
    save_klein(klein.folder, transformer, run / "model", precision=cfg.train.save_precision)


if __name__ == "__main__":
    main()
