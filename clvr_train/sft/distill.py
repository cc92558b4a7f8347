"""Guidance and step distillation: a student whose few unguided steps follow the teacher's many guided ones.

It stands in for the distilled checkpoints that FLUX.2 Klein is published with: the shapes world has to make its own.
The student's time grid has as many segments as it has steps. From a point `x` at the start of a segment the teacher
integrates its guided velocity to the end, and the student regresses the mean velocity of that path,
`v* = (x(start) - x(end)) / (start - end)` (a segment-wise form of progressive distillation, Salimans & Ho 2022, with
guidance baked in as in Meng et al. 2023).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from clvr_train.method.flow import guided, inference_times, interpolate, squared_error
from clvr_train.method.trajectory import Sample
from clvr_train.models.conditioning import Conditioner, Conditioning, by_bucket, predict_velocity
from clvr_train.runtime.seeding import generator


@torch.no_grad()
def guided_velocity_over(
    teacher: torch.nn.Module,
    x: Tensor,
    start: Tensor,
    end: Tensor,
    cond: Conditioning,
    without: Conditioning,
    *,
    cfg: float,
    substeps: int,
) -> Tensor:
    """Mean guided velocity of the teacher from x (B, N, C) at times `start` (B,) to `end` (B,), in Euler substeps."""
    now, length = x, (start - end) / substeps
    for k in range(substeps):
        t = start - k * length
        v = guided(predict_velocity(teacher, now, t, cond), predict_velocity(teacher, now, t, without), cfg)
        now = now - length.view(-1, 1, 1) * v
    return (x - now) / (start - end).view(-1, 1, 1)


def backward_distillation(
    conditioner: Conditioner,
    teacher: torch.nn.Module,
    samples: Sequence[Sample],
    seeds: Sequence[tuple],
    *,
    steps: int,
    cfg: float,
    substeps: int,
    micro_batch: int,
) -> float:
    """Adds the gradients of the student's mean loss over the batch and returns that loss.

    The student is the conditioner's transformer. Segment and noise of a sample are functions of its seed; the start of
    its segment lies on the line from its target to that noise.
    """
    student, device = conditioner.klein.transformer, conditioner.klein.device
    total = 0.0
    for indices in by_bucket(conditioner, samples, micro_batch):
        chosen = [samples[i] for i in indices]
        cond = conditioner.batch(chosen)
        x0 = torch.stack([conditioner.target(sample) for sample in chosen])
        sources = [generator("distill", *seeds[i]) for i in indices]
        noise = torch.stack([torch.randn(x0.shape[1:], generator=source) for source in sources]).to(device)
        segment = torch.cat([torch.randint(steps, (1,), generator=source) for source in sources])
        times = inference_times(cond.num_target, steps)
        start, end = times[segment].to(device), times[segment + 1].to(device)
        x = interpolate(x0, noise, start)
        without = conditioner.without_text(cond)
        target = guided_velocity_over(teacher, x, start, end, cond, without, cfg=cfg, substeps=substeps)
        losses = squared_error(predict_velocity(student, x, start, cond), target)
        (losses.sum() / len(samples)).backward()
        total += losses.detach().sum().item()
    return total / len(samples)
