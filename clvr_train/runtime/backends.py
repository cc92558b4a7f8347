"""What an engine steps with: torch alone, in one process or with DistributedDataParallel."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, Parameter
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_

from clvr_train.runtime.distributed import World
from clvr_train.runtime.optimizers import make_optimizer, moments, set_moments

CHUNK = 1 << 28  # elements whose float32 gradients exist at a time (1 GiB)


@contextmanager
def same_buffers(module: Module) -> Iterator[None]:
    """Within the block a change of the module's dtype leaves its buffers alone.

    Such are the frequencies of rotary embeddings: of bfloat16, they would turn distant tokens to other angles.
    """
    kept = [(part, *buffer) for part in module.modules() for buffer in part.named_buffers(recurse=False)]
    yield
    for part, name, buffer in kept:
        setattr(part, name, buffer.to(getattr(part, name).device))


class TorchBackend:
    """Weights, gradients and optimiser are whole on every rank; with precision bf16 it keeps float32 master weights.

    Args:
        clip: largest norm of the gradient. options: `lr`, `betas`, `weight_decay` of the optimiser.
    """

    def __init__(
        self,
        module: Module,
        world: World,
        *,
        precision: str,
        optimizer: str,
        clip: float,
        options: Mapping[str, Any],
    ) -> None:
        self.parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self._masters = dict(self.parameters)  # what the optimiser steps on
        if precision == "bf16":
            self._masters = {name: Parameter(p.detach().float()) for name, p in self.parameters.items()}
        if precision != "fp32":
            with same_buffers(module):
                module.to(torch.bfloat16)
        self.module, self._world_size, self._clip = module, world.size, clip
        if world.size > 1:
            devices = [world.device] if world.device.type == "cuda" else None
            self.module = DistributedDataParallel(module, devices, gradient_as_bucket_view=True)
        self._optimizer = make_optimizer(optimizer, self._masters.values(), **options)

    def expect(self, last: bool) -> None:
        """Before a forward: whether its backward is the last of this step, which sums gradients over the ranks."""
        if isinstance(self.module, DistributedDataParallel):
            self.module.require_backward_grad_sync = last

    def backward(self, loss: Tensor) -> None:
        """Adds the gradients of this rank's part of the loss."""
        (loss * self._world_size).backward()  # DistributedDataParallel takes the mean over the ranks

    def step(self, lr: float) -> float:
        """Steps unless the norm of the gradient, which is returned, is not finite; gradients are gone in any case."""
        trained = [p for p in self.parameters.values() if p.grad is not None]
        if not trained:
            return 0.0
        norm = torch.linalg.vector_norm(
            torch.stack([torch.linalg.vector_norm(p.grad, dtype=torch.float32) for p in trained])
        )
        if math.isfinite(norm.item()):
            for group in self._optimizer.param_groups:
                group["lr"] = lr
            self._update(norm)
        for parameter in self.parameters.values():
            parameter.grad = None
        return norm.item()

    def _update(self, norm: Tensor) -> None:
        for chunk in self._chunks():
            for name in chunk:
                parameter, master = self.parameters[name], self._masters[name]
                if parameter is not master and parameter.grad is not None:
                    master.grad, parameter.grad = parameter.grad.float(), None
            clip_grads_with_norm_([self._masters[name] for name in chunk], self._clip, norm)
            self._optimizer.step()  # of those that have a gradient
            for name in chunk:
                self._masters[name].grad = None
                self._show(name)

    def _chunks(self) -> Iterator[list[str]]:
        """Names of parameters that are stepped together: all, unless their gradients have to be copied for it."""
        if all(self._masters[name] is parameter for name, parameter in self.parameters.items()):
            yield list(self.parameters)
            return
        chunk: list[str] = []
        size = 0
        for name, parameter in self.parameters.items():
            if chunk and size + parameter.numel() > CHUNK:
                yield chunk
                chunk, size = [], 0
            chunk.append(name)
            size += parameter.numel()
        yield chunk

    @torch.no_grad()
    def _show(self, name: str) -> None:
        """Brings the weight that the forward uses up to its master."""
        if self.parameters[name] is not self._masters[name]:
            self.parameters[name].copy_(self._masters[name])

    def weight(self, name: str) -> Tensor:
        """A trained weight, whole, of the precision in which it is trained; all ranks ask for the same."""
        return self._masters[name].detach()

    def frozen(self, parameter: Parameter) -> Tensor:
        """A weight that is not trained, whole."""
        return parameter.detach()

    def moments(self, name: str) -> dict[str, Tensor]:
        """What the optimiser keeps of a weight, whole; all ranks ask for the same. Empty before the first step."""
        return moments(self._optimizer, self._masters[name])

    @torch.no_grad()
    def restore(self, name: str, weight: Tensor, saved: Mapping[str, Tensor]) -> None:
        """Takes over a weight and what an optimiser has kept of it."""
        self._masters[name].copy_(weight)
        self._show(name)
        set_moments(self._optimizer, self._masters[name], saved)
