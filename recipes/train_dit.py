"""Full-parameter SFT of the diffusion transformer on truncated trajectories (CLVR 3.2, A.6).

Writes runs/<run>/{config.yaml, metrics.jsonl, checkpoints/, model/}; `model/` is a diffusers folder. To resume, run the
same command again.
"""

import logging
from collections.abc import Iterable, Iterator, Sequence
from functools import partial

from omegaconf import DictConfig
from tqdm import tqdm

from clvr_train.data.captions import fit_target
from clvr_train.data.loader import Drawn, read_ahead
from clvr_train.data.mixing import Mix, step_class, step_weights
from clvr_train.data.order import Order
from clvr_train.method.trajectory import Sample
from clvr_train.models.klein import save_klein
from clvr_train.runtime.engine import Engine
from clvr_train.runtime.metrics import Metrics
from clvr_train.sft.dit import backward_flow_matching
from recipes._build import (
    build_conditioner,
    build_klein,
    caption_samples,
    is_finished,
    read_corpus,
    read_direct_samples,
    read_samples,
)
from recipes._recipe import recipe, run_folder

logger = logging.getLogger(__name__)
MAY_CHANGE = ("train.lr", "train.steps", "train.log_every", "train.save_every")
MAY_CHANGE += ("data.workers", "cache.folder", "cache.texts", "cache.memory_gb")  # play no part in the result


def read_data(data: DictConfig) -> Sequence[Sample]:
    """The samples of the `data` keys: a list, or a corpus that is read when it is indexed."""
    if data.captions:
        return caption_samples(data.captions, data.seed, data.kinds)
    if data.format != "trajectories":
        if data.direct:
            raise ValueError(f"data.direct=true: captions (data.format={data.format}) have no trajectories")
        return read_corpus(data)
    samples = read_samples(data.folder, data.limit, data.max_refused)
    if data.direct:
        samples += read_direct_samples(data.folder, data.limit, data.max_refused)
    return samples


def read_batches(samples: Sequence[Sample], batches: Iterable[list[Drawn]], cfg: DictConfig) -> Iterator[list]:
    """The drawn samples of every batch; images of a corpus are opened ahead, and bad records left out."""
    if isinstance(samples, list):
        yield from ([(drawn, samples[drawn[1]]) for drawn in batch] for batch in batches)
        return
    fit = partial(fit_target, size_px=tuple(cfg.model.size_px))
    read = read_ahead(samples, batches, fit, workers=cfg.data.workers, max_refused=cfg.data.max_refused)
    for batch in read:
        if not batch:
            raise ValueError("every sample of a batch was refused: see the warnings above")
        yield batch


def sample_order(samples: Sequence[Sample], t2i_share: float | None, batch: int, seed: int) -> Order | Mix:
    """The order of the samples: all once an epoch, or text to image and editing in set shares (CLVR A.6)."""
    if t2i_share is None:
        return Order(len(samples), batch, seed)
    if not isinstance(samples, list):
        raise ValueError(f"data.t2i_share={t2i_share}: a corpus of captions is all text to image")
    members: dict[int, list[int]] = {}
    for index, sample in enumerate(samples):
        members.setdefault(step_class(sample), []).append(index)
    return Mix(members, step_weights(members, t2i_share), batch, seed)


@recipe("train_dit")
def main(cfg: DictConfig) -> None:
    run = run_folder(cfg, may_change=MAY_CHANGE)
    if is_finished(run):
        return
    klein = build_klein(cfg.model, expect="base")
    samples = read_data(cfg.data)
    conditioner = build_conditioner(klein, cfg.model, cfg.cache)
    if isinstance(samples, list):
        conditioner.prime(samples, progress=partial(tqdm, desc="encode"))
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
    order = sample_order(samples, cfg.data.t2i_share, cfg.train.batch, cfg.seed)
    with Metrics(run, resume_step=engine.steps if saved else None, wandb=cfg.logger.wandb) as metrics:
        batches = read_batches(samples, map(order.batch, range(engine.steps, cfg.train.steps)), cfg)
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
                metrics.log(engine.steps, loss=out.loss, **out.metrics, **values)
            if engine.steps % cfg.train.save_every == 0 and engine.steps < cfg.train.steps:
                engine.save(run / "checkpoints", engine.steps, transformer.state_dict())
    save_klein(klein.folder, transformer, run / "model", precision=cfg.train.save_precision)


if __name__ == "__main__":
    main()
