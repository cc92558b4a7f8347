"""Full-parameter SFT of the diffusion transformer on truncated trajectories: the loss of a batch (CLVR 3.2, A.6)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from clvr_train.method.flow import flow_matching_loss, interpolate, sample_times
from clvr_train.method.trajectory import Sample
from clvr_train.models.conditioning import Conditioner, by_bucket, predict_velocity
from clvr_train.runtime.seeding import generator


@dataclass(frozen=True)
class LossOutputs:
    """What a loss gives back: `loss`, a scalar whose gradients were already added up, and numbers worth logging."""

    loss: float
    metrics: dict[str, float]


def backward_flow_matching(
    conditioner: Conditioner,
    samples: Sequence[Sample],
    seeds: Sequence[tuple],
    *,
    shift: str = "flux_linear",
    fixed_mu: float = 0.8,
    text_dropout: float = 0.1,
    micro_batch: int = 32,
) -> LossOutputs:
    """Adds the gradients of the batch's mean flow-matching loss, a micro-batch at a time.

    Time, noise and text dropout of a sample are functions of its seed alone. References stay when the text is
    dropped, so that guidance has an unconditional branch of the form in which sampling asks for it. Micro-batches hold
    samples of one bucket (the forward shares its position ids over the batch); their losses are weighted by their share
    of the batch.

    Args:
        samples: none gives no gradients and a loss that is not a number.
        seeds: the position of every sample, e.g. (run seed, epoch, trajectory id, step).
        shift, fixed_mu: see `method.flow.sample_times`. text_dropout: probability of the empty text.
    """
    if not samples:
        return LossOutputs(math.nan, {})
    transformer = conditioner.klein.transformer
    device = conditioner.klein.device
    total, per_reference_count = 0.0, {}
    micro_batches = by_bucket(conditioner, samples, micro_batch)
    for indices in micro_batches:
        chosen = [samples[i] for i in indices]
        num_tokens = math.prod(conditioner.grid(chosen[0]))
        draws = [_draw(conditioner, seeds[i], num_tokens, shift, fixed_mu, text_dropout) for i in indices]
        t = torch.cat([d[0] for d in draws]).to(device)
        e = torch.stack([d[1] for d in draws]).to(device)
        x0 = torch.stack([conditioner.target(sample) for sample in chosen])
        cond = conditioner.batch(chosen, drop_text=[d[2] for d in draws])
        v = predict_velocity(transformer, interpolate(x0, e, t), t, cond)
        losses = flow_matching_loss(v, x0, e)
        (losses.sum() / len(samples)).backward()
        total += losses.detach().sum().item()
        count = f"loss_{min(len(chosen[0].references), 3)}_references"
        per_reference_count.setdefault(count, []).extend(losses.detach().tolist())
    metrics = {name: sum(values) / len(values) for name, values in per_reference_count.items()}
    metrics["short_share"] = sum(len(indices) < micro_batch for indices in micro_batches) / len(micro_batches)
    return LossOutputs(total / len(samples), metrics)


def _draw(
    conditioner: Conditioner, seed: tuple, num_tokens: int, shift: str, fixed_mu: float, text_dropout: float
) -> tuple:
    """Time (1,), noise (N, C) and whether the text is dropped, for one sample of N tokens."""
    source = generator("sft", *seed)
    t = sample_times(1, num_tokens, shift, source, fixed_mu)
    noise = torch.randn(num_tokens, conditioner.klein.transformer.config.in_channels, generator=source)
    return t, noise, torch.rand(1, generator=source).item() < text_dropout
