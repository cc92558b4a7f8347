"""Rectified flow between data `x0` (t = 0) and noise `e` (t = 1), and the time grids of FLUX.2.

Convention of the whole project: `x_t = (1 - t) x0 + t e`, velocity `v = e - x0`, t in [0, 1] (CLVR A.6).
Tensors are (batch, tokens, channels); t is (batch,).
"""

import math

import torch
from torch import Tensor

SOLVERS = ("euler", "heun")


def _per_sample(t: Tensor, like: Tensor) -> Tensor:
    """(batch,) -> (batch, 1, ...), so that t never broadcasts over the wrong axis."""
    if t.shape != like.shape[:1]:
        raise ValueError(f"t has shape {tuple(t.shape)}, expected ({like.shape[0]},): one time a sample")
    return t.reshape(-1, *(1,) * (like.ndim - 1))


def interpolate(x0: Tensor, e: Tensor, t: Tensor) -> Tensor:
    """`x_t`, the point at time t on the straight line from `x0` to `e`."""
    if x0.shape != e.shape:
        raise ValueError(f"x0 {tuple(x0.shape)} and noise {tuple(e.shape)} differ in shape")
    t = _per_sample(t, x0)
    return (1 - t) * x0 + t * e


def velocity_target(x0: Tensor, e: Tensor) -> Tensor:
    """`v = e - x0`, what the transformer regresses."""
    return e - x0


def x0_from_velocity(x_t: Tensor, v: Tensor, t: Tensor) -> Tensor:
    """The data point that a velocity at `x_t` points to: `x_t - t v`."""
    return x_t - _per_sample(t, x_t) * v


def guided(v_cond: Tensor, v_uncond: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance, `v_uncond + scale (v_cond - v_uncond)` (order of operations as in diffusers)."""
    return v_uncond + scale * (v_cond - v_uncond)


def shift_time(t: Tensor, mu: float) -> Tensor:
    """Exponential time shift `e^mu / (e^mu + 1/t - 1)`: mu > 0 moves t towards noise; 0 and 1 stay."""
    odds = math.exp(mu) * t
    return odds / (odds + (1 - t))


def linear_mu(num_tokens: int) -> float:
    """Shift of FLUX training: linear in the target's tokens, 0.5 at 256 and 1.15 at 4096 (scheduler_config of
    FLUX.2).
    """
    return 0.5 + (1.15 - 0.5) * (num_tokens - 256) / (4096 - 256)


def empirical_mu(num_tokens: int, steps: int) -> float:
    """Shift of FLUX.2 inference (`compute_empirical_mu` of diffusers 0.42.1, pipeline_flux2_klein.py)."""
    at_200 = 0.00016927 * num_tokens + 0.45666666
    if num_tokens > 4300:
        return at_200
    at_10 = 8.73809524e-05 * num_tokens + 1.89833333
    slope = (at_200 - at_10) / 190
    return slope * steps + at_200 - 200 * slope


def inference_times(num_tokens: int, steps: int) -> Tensor:
    """The Euler grid from 1 to 0: shape (steps + 1,), float32, as `FlowMatchEulerDiscreteScheduler` makes it for
    Klein.
    """
    if steps < 1:
        raise ValueError(f"steps={steps}: at least one step is needed")
    t = torch.linspace(1, 1 / steps, steps, dtype=torch.float64)
    t = shift_time(t, empirical_mu(num_tokens, steps))
    return torch.cat([t, torch.zeros(1, dtype=torch.float64)]).float()


def num_velocities(steps: int, solver: str) -> int:
    """How many velocities a solver takes from t = 1 to 0: `euler` one a step, `heun` two."""
    if solver not in SOLVERS:
        raise ValueError(f"solver={solver!r} is not one of {', '.join(SOLVERS)}")
    return steps * (1 + SOLVERS.index(solver))


def sample_times(num: int, num_tokens: int, shift: str, generator: torch.Generator, fixed_mu: float = 0.8) -> Tensor:
    """Training times: logit-normal u, then the shift `flux_linear`, `fixed` (mu = `fixed_mu`) or `none`. Shape (num,).
    """
    shifts = {"flux_linear": linear_mu(num_tokens), "fixed": fixed_mu, "none": 0.0}
    if shift not in shifts:
        raise ValueError(f"shift={shift!r} is not one of {', '.join(shifts)}")
    return shift_time(torch.sigmoid(torch.randn(num, generator=generator)), shifts[shift])


def squared_error(v: Tensor, target: Tensor) -> Tensor:
    """Mean squared error, one value a sample, in float32 or better: shape (batch,)."""
    dtype = torch.promote_types(v.dtype, torch.float32)
    return (v.to(dtype) - target.to(dtype)).square().flatten(1).mean(1)


def flow_matching_loss(v: Tensor, x0: Tensor, e: Tensor) -> Tensor:
    """`squared_error` to the velocity target."""
    return squared_error(v, velocity_target(x0, e))
