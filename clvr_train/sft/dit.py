"""Full-parameter SFT of the diffusion transformer on truncated trajectories: the loss of a batch (CLVR 3.2, A.6)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from clvr_train.method.flow import flow_matching_loss, interpolate, sample_times
from clvr_train.method.trajectory import Sample
from clvr_train.models.conditioning import Conditioner, by_bucket, predict_velocity
from clvr_train.runtime.engine import Engine
from clvr_train.runtime.seeding import generator


@dataclass(frozen=True)
class LossOutputs:
    """What a loss gives back: `loss`, a scalar whose gradients were already added up, numbers worth logging, and the
    losses of this rank's micro-batches (sums over their samples).
    """

    loss: float
    metrics: dict[str, float]
    parts: tuple[float, ...] = ()


def backward_flow_matching(
    conditioner: Conditioner,
    samples: Sequence[Sample],
    seeds: Sequence[tuple],
    *,
    engine: Engine | None = None,
    shift: str = "flux_linear",
    fixed_mu: float = 0.8,
    text_dropout: float = 0.1,
    micro_batch: int = 32,
) -> LossOutputs:
    """Adds the gradients of the batch's mean flow-matching loss, a micro-batch at a time.

    Time, noise and text dropout of a sample are functions of its seed alone. References stay when the text is
    dropped, so that guidance has an unconditional branch of the form in which sampling asks for it. Micro-batches hold
    samples of one bucket (the forward shares its position ids over the batch); their losses are weighted by their share
    of the batch of all ranks. A rank with fewer micro-batches than another draws blanks, which weigh nothing.

    Args:
        samples: this rank's; if there are none on all ranks there are no gradients, and the loss is not a number.
        seeds: the position of every sample, e.g. (run seed, epoch, trajectory id, step).
        engine: what adds up the gradients; None: the transformer's own, in one process.
        shift, fixed_mu: see `method.flow.sample_times`. text_dropout: probability of the empty text.
    """
    klein = conditioner.klein
    engine = engine or Engine(klein.transformer, lr=0.0, total_steps=1)
    num_samples = sum(engine.world.gather(len(samples)))
    parts: list[Tensor] = []
    micro_batches = by_bucket(conditioner, samples, micro_batch)
    for indices in engine.turns(micro_batches):
        chosen = [samples[i] for i in indices] if indices else [_blank(conditioner)]
        places = [seeds[i] for i in indices] if indices else [("blank",)]
        num_tokens = math.prod(conditioner.grid(chosen[0]))
        draws = [_draw(conditioner, place, num_tokens, shift, fixed_mu, text_dropout) for place in places]
        t = torch.cat([d[0] for d in draws]).to(klein.device)
        e = torch.stack([d[1] for d in draws]).to(klein.device)
        x0 = torch.stack([conditioner.target(sample) for sample in chosen])
        cond = conditioner.batch(chosen, drop_text=[d[2] for d in draws])
        v = predict_velocity(engine.module, interpolate(x0, e, t), t, cond)
        losses = flow_matching_loss(v, x0, e)
        if indices:
            engine.backward(losses.sum() / num_samples)
            parts.append(losses.detach())
        else:
            engine.backward(0 * losses.sum())
    counts = [min(len(samples[indices[0]].references), 3) for indices in micro_batches]
    values = [losses.tolist() for losses in parts]  # not before: each waits for the device
    return _summary(engine.world.gather([counts, values]), micro_batch, tuple(map(sum, values)))


def _summary(ranks: list, micro_batch: int, own: tuple[float, ...]) -> LossOutputs:
    """Of every rank's micro-batches, with their counts of references and their samples' losses."""
    counted = [(count, losses) for counts, parts in ranks for count, losses in zip(counts, parts, strict=True)]
    if not counted:
        return LossOutputs(math.nan, {})
    per_count: dict[str, list[float]] = {}
    for count, losses in counted:
        per_count.setdefault(f"loss_{count}_references", []).extend(losses)
    metrics = {name: sum(values) / len(values) for name, values in per_count.items()}
    metrics["short_share"] = sum(len(losses) < micro_batch for _, losses in counted) / len(counted)
    if len(ranks) > 1:
        metrics["blank_share"] = 1 - len(counted) / (len(ranks) * max(len(parts) for _, parts in ranks))
    every = [loss for _, losses in counted for loss in losses]
    return LossOutputs(sum(every) / len(every), metrics, own)


def _blank(conditioner: Conditioner) -> Sample:
    """A sample without text that is as good as any where only a forward is needed."""
    height, width = conditioner.sizes[0]
    return Sample("blank", 1, "", (), (), Image.new("RGB", (width, height)))


def _draw(
    conditioner: Conditioner, seed: tuple, num_tokens: int, shift: str, fixed_mu: float, text_dropout: float
) -> tuple:
    """Time (1,), noise (N, C) and whether the text is dropped, for one sample of N tokens."""
    source = generator("sft", *seed)
    t = sample_times(1, num_tokens, shift, source, fixed_mu)
    noise = torch.randn(num_tokens, conditioner.klein.transformer.config.in_channels, generator=source)
    return t, noise, torch.rand(1, generator=source).item() < text_dropout
