"""AdamW in three ways of keeping its moments: as torch does, in bfloat16, and in 8 bits."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from clvr_train.runtime.seeding import seed

OPTIMIZERS = ("adamw", "adamw_bf16", "adamw8bit")
MOMENTS = ("exp_avg", "exp_avg_sq")
BLOCK_8BIT = 256  # values that share a scale
CHUNK = 1 << 26  # elements that AdamWBf16 has in float32 at a time, several times over (2 GB)


def make_optimizer(
    name: str,
    parameters: Iterable[Parameter],
    *,
    lr: float,
    betas: tuple[float, float],
    weight_decay: float,
    dtype: torch.dtype | None = None,
) -> Optimizer:
    """AdamW over parameters of one dtype. With bfloat16 weights the moments of `adamw` are bfloat16 too.

    Args:
        dtype: of the weights that it steps on, if it will be given others than the parameters (ZeRO's float32 ones).

    Raises:
        ValueError: no such optimizer, or bitsandbytes is not installed.
    """
    parameters = list(parameters)
    options: dict[str, Any] = {"lr": lr, "betas": tuple(betas), "weight_decay": weight_decay}
    if name == "adamw8bit":
        try:
            import bitsandbytes  # imported only where it is wanted: it takes seconds and is optional
        except ImportError as error:
            raise ValueError(f"engine.optimizer=adamw8bit: bitsandbytes is not installed ({error})") from error
        return bitsandbytes.optim.AdamW8bit(parameters, **options)
    if name == "adamw_bf16" or (name == "adamw" and (dtype or parameters[0].dtype) == torch.bfloat16):
        return AdamWBf16(parameters, **options)
    if name == "adamw":
        return torch.optim.AdamW(parameters, **options, fused=parameters[0].device.type == "cuda")
    raise ValueError(f"engine.optimizer={name!r} is not one of {', '.join(OPTIMIZERS)}")


class AdamWBf16(Optimizer):
    """AdamW with bfloat16 moments, computed in float32; what is stored in bfloat16 is rounded at random.

    To the nearest, a second moment would never shrink (0.1 % less is below half a step of bfloat16), nor would a weight
    follow a small learning rate; at random both do so on average. The draws depend on the step and on the tensor's
    place, so that a resumed run makes the same.
    """

    def __init__(
        self, parameters: Iterable[Parameter], *, lr: float, betas: tuple[float, float], weight_decay: float
    ) -> None:
        super().__init__(parameters, {"lr": lr, "betas": betas, "weight_decay": weight_decay, "eps": 1e-8})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # no closure is ever given
        for group in self.param_groups:
            for place, parameter in enumerate(group["params"]):
                if parameter.grad is not None:
                    self._update(parameter, place, group)

    def _update(self, parameter: Tensor, place: int, group: dict) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.tensor(0.0)
            for name in MOMENTS:
                state[name] = torch.zeros_like(parameter, dtype=torch.bfloat16)
        state["step"] += 1
        step, (beta1, beta2) = int(state["step"]), group["betas"]
        source = torch.Generator(parameter.device).manual_seed(seed("adamw_bf16", step, place))
        kept = parameter, *(state[name] for name in MOMENTS)
        for weight, mean, square, gradient in zip(*map(_chunks, (*kept, parameter.grad)), strict=True):
            rate, decay = group["lr"], group["weight_decay"]
            gradient = gradient.float()
            new_mean = mean.float().lerp_(gradient, 1 - beta1)
            new_square = square.float().mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
            scale = (new_square / (1 - beta2**step)).sqrt_().add_(group["eps"])
            new_weight = weight.float() * (1 - rate * decay)
            new_weight.addcdiv_(new_mean, scale, value=-rate / (1 - beta1**step))
            for old, new in ((mean, new_mean), (square, new_square), (weight, new_weight)):
                old.copy_(rounded(new, source) if old.dtype == torch.bfloat16 else new)


def _chunks(tensor: Tensor) -> Sequence[Tensor]:
    """Views of about CHUNK elements: under ZeRO a tensor is this rank's part of the whole model."""
    return (tensor,) if tensor.numel() <= CHUNK else tensor.split(max(1, CHUNK * len(tensor) // tensor.numel()))


def rounded(value: Tensor, source: torch.Generator) -> Tensor:
    """float32 to bfloat16, up or down with the probabilities that keep the mean."""
    noise = torch.randint(0, 1 << 16, value.shape, generator=source, dtype=torch.int32, device=value.device)
    return ((value.view(torch.int32) + noise) & -(1 << 16)).view(torch.float32).to(torch.bfloat16)


def moments(optimizer: Optimizer, parameter: Tensor) -> dict[str, Tensor]:
    """What the optimiser keeps of a parameter: `exp_avg`, `exp_avg_sq` and `step`; moments of 8 bits as float32, with
    their scales as `exp_avg_scale` and `exp_avg_sq_scale`.
    """
    state = optimizer.state.get(parameter)
    if not state:
        return {}
    if "state1" not in state:
        return {name: state[name] for name in (*MOMENTS, "step")}
    named = {"step": torch.tensor(float(state["step"]))}
    for name, number in zip(MOMENTS, "12", strict=True):
        named[name] = state[f"state{number}"]
        if named[name].dtype == torch.uint8:
            scale = named[f"{name}_scale"] = state[f"absmax{number}"]
            values = state[f"qmap{number}"][named[name].flatten().long()]
            named[name] = (_blocks(values) * scale[:, None]).flatten()[: values.numel()].view_as(parameter)
    return named


def set_moments(optimizer: Optimizer, parameter: Tensor, saved: Mapping[str, Tensor]) -> None:
    """The inverse of `moments`; without `saved` as before the first step."""
    optimizer.state.pop(parameter, None)
    if not saved:
        return
    if not isinstance(optimizer, torch.optim.AdamW | AdamWBf16):
        _set_8bit(optimizer, parameter, saved)
        return
    fused = optimizer.param_groups[0].get("fused")
    dtype = torch.bfloat16 if isinstance(optimizer, AdamWBf16) else parameter.dtype
    kept = {name: torch.empty_like(parameter, dtype=dtype).copy_(saved[name]) for name in MOMENTS}
    step = saved["step"].to(parameter.device if fused else "cpu", torch.float32).clone()
    optimizer.state[parameter] = {"step": step, **kept}


def _set_8bit(optimizer: Optimizer, parameter: Tensor, saved: Mapping[str, Tensor]) -> None:
    group = optimizer.param_groups[0]
    place = next(i for i, other in enumerate(group["params"]) if other is parameter)
    optimizer.init_state(group, parameter, 0, place)  # type: ignore[attr-defined]  # of bitsandbytes
    state = optimizer.state[parameter]
    state["step"] = int(saved["step"])
    for name, number in zip(MOMENTS, "12", strict=True):
        value, kept = saved[name].to(parameter.device, torch.float32), state[f"state{number}"]
        if kept.dtype == torch.uint8:
            blocks = _blocks(value.flatten())
            # Not always the largest value: of the code for -1 there is none, only of that for 1.
            scale = saved.get(f"{name}_scale", blocks.abs().amax(1)).to(parameter.device)
            code = state[f"qmap{number}"]
            borders = (code[1:] + code[:-1]) / 2
            nearest = torch.bucketize(blocks / scale.clamp(min=1e-38)[:, None], borders)
            kept.copy_(nearest.flatten()[: value.numel()].view_as(kept))
            state[f"absmax{number}"].copy_(scale)
        else:
            kept.copy_(value)


def _blocks(values: Tensor) -> Tensor:
    """Rows of values that share a scale, the last filled up with 0."""
    return torch.nn.functional.pad(values, (0, -values.numel() % BLOCK_8BIT)).view(-1, BLOCK_8BIT)
