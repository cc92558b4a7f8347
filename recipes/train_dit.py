"""Full-parameter SFT of the diffusion transformer on truncated trajectories (CLVR 3.2, A.6).

Writes runs/<run>/{config.yaml, metrics.jsonl, checkpoints/, model/}; `model/` is a diffusers folder. To resume, run the
same command again.
"""

import logging

from omegaconf import DictConfig
from tqdm import tqdm

from clvr_train.data.order import Order
from clvr_train.models.klein import save_klein
from clvr_train.runtime.engine import Engine
from clvr_train.runtime.metrics import Metrics
from clvr_train.sft.dit import backward_flow_matching
from recipes._build import (
    build_conditioner,
    build_klein,
    caption_samples,
    is_finished,
    read_direct_samples,
    read_samples,
)
from recipes._recipe import recipe, run_folder

logger = logging.getLogger(__name__)


@recipe("train_dit")
def main(cfg: DictConfig) -> None:
    run = run_folder(cfg, may_change=("train.lr", "train.steps", "train.log_every", "train.save_every"))
    if is_finished(run):
        return
    klein = build_klein(cfg.model, expect="base")
    if cfg.data.captions:
        samples = caption_samples(cfg.data.captions, cfg.data.seed, cfg.data.kinds)
    else:
        samples = read_samples(cfg.data.folder, cfg.data.limit, cfg.data.max_refused)
        if cfg.data.direct:
            samples += read_direct_samples(cfg.data.folder, cfg.data.limit, cfg.data.max_refused)
    conditioner = build_conditioner(klein, cfg.model)
    conditioner.prime(samples)
    logger.info(
        "%d samples; %d texts cut to the window of %d tokens (%d tokens lost)",
        len(samples), conditioner.texts_cut, klein.window, conditioner.tokens_cut,
    )  # fmt: skip
    transformer = klein.transformer.requires_grad_(True).train()
    engine = Engine(
        transformer.parameters(),
        lr=cfg.train.lr,
        total_steps=cfg.train.steps,
        schedule=cfg.train.schedule,
        warmup_steps=cfg.train.warmup_steps,
        weight_decay=cfg.train.weight_decay,
        clip=cfg.train.clip,
    )
    saved = engine.resume(run / "checkpoints")
    if saved is not None:
        transformer.load_state_dict(saved[1])
    order = Order(len(samples), cfg.train.batch, cfg.seed)
    with Metrics(run, resume_step=engine.steps if saved else None, wandb=cfg.logger.wandb) as metrics:
        todo = range(engine.steps, cfg.train.steps)
        for step in tqdm(todo, desc="train_dit", initial=engine.steps, total=cfg.train.steps):
            drawn = order.batch(step)
            batch = [samples[index] for _, index in drawn]
            seeds = [(cfg.seed, epoch, *sample.key) for (epoch, _), sample in zip(drawn, batch, strict=True)]
            out = backward_flow_matching(
                conditioner,
                batch,
                seeds,
                shift=cfg.train.shift,
                fixed_mu=cfg.train.fixed_mu,
                text_dropout=cfg.train.text_dropout,
                micro_batch=cfg.train.micro_batch,
            )
            values = engine.step()
            if engine.steps % cfg.train.log_every == 0 or engine.steps == cfg.train.steps:
                metrics.log(engine.steps, loss=out.loss, **out.metrics, **values)
            if engine.steps % cfg.train.save_every == 0 and engine.steps < cfg.train.steps:
                engine.save(run / "checkpoints", engine.steps, transformer.state_dict())
    save_klein(klein.folder, transformer, run / "model", precision=cfg.train.save_precision)


if __name__ == "__main__":
    main()
