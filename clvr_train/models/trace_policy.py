"""What the forwards of PPRL compute and hold, from shapes alone: the update of a LoRA, rollouts, pictures of them."""

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from diffusers import Flux2Transformer2DModel
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from clvr_train.method.flow import squared_error
from clvr_train.models.adapters import add_policies, use
from clvr_train.models.blocks import blocks_of
from clvr_train.models.conditioning import predict_velocity
from clvr_train.models.trace import Trace, Tracer, fake_inputs, fake_weights

Grid = tuple[int, int]


def add_policies_to_shapes(transformer: Flux2Transformer2DModel, *, rank: int, alpha: int) -> None:
    """Adds the LoRA policies to a transformer on the meta device, of which only `policy` is trained.

    Raises:
        RuntimeError: as `models.adapters.add_policies`.
    """
    transformer.requires_grad_(False)
    with torch.device("meta"):
        add_policies(transformer, rank=rank, alpha=alpha, seed=0)


@dataclass(frozen=True)
class Update:
    """What a micro-batch of the update takes: `trace` of the policy's forward, FLOPs of its `backward` and those of a
    forward of the `reference`, which has no LoRA; one of `old` costs as much as the policy's.
    """

    trace: Trace
    backward: int
    reference: int


def trace_update(
    transformer: Flux2Transformer2DModel,
    dtype: torch.dtype,
    lora_dtype: torch.dtype,
    batch: int,
    window: int,
    target: Grid,
    references: Sequence[Grid] = (),
    branches: int = 1,
) -> Update:
    """A micro-batch of rollouts through a transformer with LoRA policies; sizes as for `models.trace`.

    `branches` is 2 where the branch without text is trained too (the anchor). Both are kept until the backward.
    """
    flops = {}

    def step(tracer: Tracer) -> None:
        x0, t, cond = fake_inputs(transformer.config, dtype, batch, window, target, references)
        x0 = x0.float()
        call = partial(tracer.call, transformer)
        losses = []
        for _ in range(branches):
            v = predict_velocity(call, torch.empty_like(x0), t, cond).float()
            losses += [squared_error(v, torch.empty_like(x0)) for _ in range(3)]  # v+, v-, the reference
        flops["forward"] = tracer.flops
        torch.stack(losses).sum().backward()

    trace = Tracer(blocks_of(transformer), dtype, lora_dtype).run(step)
    backward = trace.flops - flops["forward"]
    trace.flops = flops["forward"]
    with use(transformer, None):
        reference = forward_of(transformer, dtype, lora_dtype, batch, window, target, references).flops
    return Update(trace, backward, reference)


@dataclass(frozen=True)
class Forward:
    """FLOPs of a forward without gradients, and the most bytes that it holds at once beside weights and inputs."""

    flops: int
    peak_bytes: int


def forward_of(
    transformer: Flux2Transformer2DModel,
    dtype: torch.dtype,
    lora_dtype: torch.dtype,
    batch: int,
    window: int,
    target: Grid,
    references: Sequence[Grid] = (),
) -> Forward:
    """One network evaluation of `batch` images; sizes as for `models.trace`."""

    def step(call: Callable) -> None:
        x, t, cond = fake_inputs(transformer.config, dtype, batch, window, target, references)
        predict_velocity(partial(call, transformer), x, t, cond)

    return _measure(step, dtype, lora_dtype)


def decoding_of(vae: torch.nn.Module, dtype: torch.dtype, batch: int, target: Grid) -> Forward:
    """The pictures of `batch` rollouts of a grid of tokens."""

    def step(call: Callable) -> None:
        z = torch.empty(batch, vae.config.latent_channels, 2 * target[0], 2 * target[1], dtype=dtype)
        call(vae.decoder, z if vae.post_quant_conv is None else call(vae.post_quant_conv, z))

    return _measure(step, dtype, dtype)


def _measure(step: Callable[[Callable], None], dtype: torch.dtype, lora_dtype: torch.dtype) -> Forward:
    """Runs `step` without gradients; it runs modules through the function that it is given."""
    held = _Held()

    def call(module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        weights = fake_weights(module, dtype, lora_dtype, trained=False)
        with held:
            return functional_call(module, weights, args, kwargs)

    def traced(tracer: Tracer) -> None:
        step(call)

    with torch.no_grad():
        flops = Tracer((), dtype).run(traced).flops
    return Forward(flops, held.peak)


class _Held(TorchDispatchMode):
    """Counts the bytes of tensors that are made while it is on, and that are still there."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._users: dict[int, int] = {}  # tensors by storage

    def __torch_dispatch__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        given = {tensor.untyped_storage()._cdata for tensor in tree_leaves((args, kwargs)) if _is_tensor(tensor)}
        output = func(*args, **(kwargs or {}))
        for tensor in filter(_is_tensor, tree_leaves(output)):
            storage = tensor.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            if key in given and key not in self._users:
                continue  # a view of a weight or an input
            if not self._users.get(key):
                self.now += size
                self.peak = max(self.peak, self.now)
            self._users[key] = self._users.get(key, 0) + 1
            weakref.finalize(tensor, self._drop, key, size)
        return output

    def _drop(self, key: int, size: int) -> None:
        self._users[key] -= 1
        if not self._users[key]:
            del self._users[key]
            self.now -= size


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)

