"""DiffusionNFT: the policy loss, its r in [0, 1], and the slow `old` policy.

Source: DiffusionNFT (arXiv 2509.16117) and its official code, github.com/NVlabs/DiffusionNFT at 24af5554,
scripts/train_nft_sd3.py. With `v_old` the policy that drew the rollouts,

    v+ = beta_nft v + (1 - beta_nft) v_old,      v- = (1 + beta_nft) v_old - beta_nft v,
    loss = adv_clip_max / beta_nft * (r |v+ - target|^2 + (1 - r) |v- - target|^2).

`weighting="adaptive"` is the official code's form: both errors in x0 space, each divided by its own mean absolute
value (detached, float64, at least 1e-5). `weighting="none"` is the paper's form in v space. With delta = v - v_old,
u = v_old - target and A = adv_clip_max (2 r - 1), the latter equals

    adv_clip_max / beta_nft |u|^2 + 2 A <delta, u> + adv_clip_max beta_nft |delta|^2,

so `beta_nft` is only the strength of a trust region and the printed value says nothing about progress.
Kept from the official code: the factors, the clip, the weights. Left out: fp16 autocast of the KL term (float32 here).
"""

import torch
from torch import Tensor

from clvr_train.method.flow import squared_error, x0_from_velocity

WEIGHTINGS = ("adaptive", "none")
OLD_SCHEDULES = ("on_policy", "ramp", "late")


def advantage_to_r(advantage: Tensor, adv_clip_max: float) -> Tensor:
    """Optimality probability `r = clip(A / (2 adv_clip_max) + 1/2)` of advantages clipped to +-adv_clip_max."""
    return (advantage.clamp(-adv_clip_max, adv_clip_max) / (2 * adv_clip_max) + 0.5).clamp(0, 1)


def _branch_error(v: Tensor, x_t: Tensor, x0: Tensor, t: Tensor, weighting: str) -> Tensor:
    """Error of one branch a sample, shape (batch,)."""
    if weighting == "none":
        target = (x_t - x0) / t.reshape(-1, *(1,) * (x_t.ndim - 1))
        return squared_error(v, target)
    error = x0_from_velocity(x_t, v, t) - x0
    weight = error.detach().double().abs().flatten(1).mean(1).clamp_min(1e-5)
    return error.square().flatten(1).mean(1) / weight


def nft_loss(
    v: Tensor,
    v_old: Tensor,
    x0: Tensor,
    x_t: Tensor,
    t: Tensor,
    r: Tensor,
    *,
    beta_nft: float,
    adv_clip_max: float = 5.0,
    weighting: str = "adaptive",
) -> Tensor:
    """The policy loss of every sample, shape (batch,); gradient flows through `v` alone.

    Args:
        v, v_old: velocities of the policy and of the sampling policy at `x_t`, (batch, tokens, channels).
        x0: the rollouts. x_t: the points on the lines from them to noise, of the same shape.
        t: times, (batch,), above 0. r: optimality, (batch,), in [0, 1].

    Raises:
        ValueError: for `beta_nft <= 0`, an unknown weighting, or r outside [0, 1].
    """
    if beta_nft <= 0:
        raise ValueError(f"beta_nft={beta_nft}: must be above 0")
    if weighting not in WEIGHTINGS:
        raise ValueError(f"weighting={weighting!r} is not one of {', '.join(WEIGHTINGS)}")
    if not bool(((r >= 0) & (r <= 1)).all()):
        raise ValueError(f"r must lie in [0, 1], got {r.min().item():.3g} .. {r.max().item():.3g}")
    v_old = v_old.detach()
    plus = _branch_error(beta_nft * v + (1 - beta_nft) * v_old, x_t, x0, t, weighting)
    minus = _branch_error((1 + beta_nft) * v_old - beta_nft * v, x_t, x0, t, weighting)
    return adv_clip_max / beta_nft * (r * plus + (1 - r) * minus)


def kl_loss(v: Tensor, v_ref: Tensor) -> Tensor:
    """Distance to the SFT policy in velocity space, `mean (v - v_ref)^2` a sample: shape (batch,)."""
    return squared_error(v, v_ref.detach())


def old_decay(optimizer_step: int, schedule: str) -> float:
    """How much of `old` stays at its update after a number of optimiser steps (official `return_decay`).

    `on_policy` (type 0): 0. `ramp` (type 1): `min(0.001 s, 0.5)`.
    `late` (type 2): 0 up to step 75, then `min(0.0075 (s - 75), 0.999)`.
    """
    if schedule == "on_policy":
        return 0.0
    if schedule == "ramp":
        return min(0.001 * optimizer_step, 0.5)
    if schedule == "late":
        return min(max(0.0075 * (optimizer_step - 75), 0.0), 0.999)
    raise ValueError(f"old_schedule={schedule!r} is not one of {', '.join(OLD_SCHEDULES)}")


def blend_(old: list[Tensor], policy: list[Tensor], decay: float) -> None:
    """`old <- decay old + (1 - decay) policy`, in place, tensor by tensor."""
    with torch.no_grad():
        for slow, fast in zip(old, policy, strict=True):
            slow.lerp_(fast, 1 - decay)
