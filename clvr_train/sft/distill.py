"""Guidance and step distillation: a student whose few unguided steps follow the teacher's many guided ones.

It stands in for the distilled checkpoints that FLUX.2 Klein is published with: the shapes world has to make its own.
For each of the student's steps the target is the mean guided velocity of the teacher over that step,
`v* = (x(t_i) - x(t_{i+1})) / (t_i - t_{i+1})`, at points of the teacher's own path from noise (progressive
distillation over a whole segment, Salimans & Ho 2022, with guidance baked in as in Meng et al. 2023).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from clvr_train.method.flow import flow_matching_loss, guided, inference_times
from clvr_train.method.trajectory import Sample
from clvr_train.models.conditioning import Conditioner, Conditioning, by_bucket, predict_velocity
from clvr_train.runtime.seeding import generator


@torch.no_grad()
def teacher_path(
    teacher: torch.nn.Module, noise: Tensor, cond: Conditioning, without: Conditioning, times: Tensor, cfg: float,
    substeps: int
) -> list[Tensor]:
    """The teacher's points at `times`, from noise (B, N, C) at times[0] = 1; `substeps` guided Euler steps between
    two.
    """
    path = [noise]
    for start, end in zip(times[:-1].tolist(), times[1:].tolist(), strict=True):
        x = path[-1]
        fine = torch.linspace(start, end, substeps + 1)
        for now, after in zip(fine[:-1].tolist(), fine[1:].tolist(), strict=True):
            t = torch.full((x.shape[0],), now, device=x.device)
            v = guided(predict_velocity(teacher, x, t, cond), predict_velocity(teacher, x, t, without), cfg)
            x = x + (after - now) * v
        path.append(x)
    return path


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
    """Adds the gradients of the student's mean loss over the batch and all its steps; returns that loss.

    The student is the conditioner's transformer.
    """
    student, device = conditioner.klein.transformer, conditioner.klein.device
    total = 0.0
    for indices in by_bucket(conditioner, samples, micro_batch):
        cond = conditioner.batch([samples[i] for i in indices])
        shape = (cond.num_target, student.config.in_channels)
        noise = torch.stack([torch.randn(shape, generator=generator("distill", *seeds[i])) for i in indices]).to(device)
        times = inference_times(cond.num_target, steps).to(device)
        path = teacher_path(teacher, noise, cond, conditioner.without_text(cond), times, cfg, substeps)
        for i in range(steps):
            span = (times[i] - times[i + 1]).item()
            t = times[i].expand(len(indices))
            v = predict_velocity(student, path[i], t, cond)
            losses = flow_matching_loss(v, path[i + 1] / span, path[i] / span)
            (losses.sum() / (len(samples) * steps)).backward()
            total += losses.detach().sum().item()
    return total / (len(samples) * steps)
