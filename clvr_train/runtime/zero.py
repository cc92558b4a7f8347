"""What an engine steps with when ranks share what they hold: DeepSpeed's ZeRO, imported nowhere else.

ZeRO-1 divides the optimiser's moments and float32 weights among the ranks, ZeRO-2 the gradients too, ZeRO-3 the weights
that the forward uses too. DeepSpeed's own checkpoints are not used: they hold pickles, and fit one number of ranks.
"""

import logging
import math
import os
import warnings
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, Parameter
from torch.utils.cpp_extension import get_default_build_root

from clvr_train.runtime.backends import same_buffers
from clvr_train.runtime.distributed import World
from clvr_train.runtime.optimizers import MOMENTS, make_optimizer, set_moments

logger = logging.getLogger(__name__)

STAGES = {"zero1": 1, "zero2": 2, "zero3": 3}


class ZeroBackend:
    """The interface of `TorchBackend`, by a DeepSpeed engine.

    Args:
        offload: the moments and float32 weights are in the host's memory, and are stepped on there.

    Raises:
        ValueError: DeepSpeed is not installed, or has no such combination.
    """

    def __init__(
        self,
        module: Module,
        world: World,
        *,
        name: str,
        precision: str,
        optimizer: str,
        offload: bool,
        clip: float,
        options: Mapping[str, Any],
    ) -> None:
        if optimizer == "adamw8bit":
            raise ValueError(f"engine.optimizer=adamw8bit, engine={name}: 8-bit moments need whole tensors on a rank")
        if offload and (optimizer != "adamw" or precision == "bf16_states"):
            setting = f"engine.optimizer={optimizer}" if optimizer != "adamw" else "engine.precision=bf16_states"
            raise ValueError(f"{setting}, engine.offload=optimizer: on the host there is AdamW in float32 alone")
        self._deepspeed, self._stage, self._world = _import(name, world), STAGES[name], world
        self._offload, self._begun = offload, False
        self.parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        trained = list(self.parameters.values())
        stepped = torch.bfloat16 if precision == "bf16_states" else torch.float32  # on parts that DeepSpeed makes
        own = partial(make_optimizer, optimizer, dtype=stepped)
        adam = self._deepspeed.ops.adam.DeepSpeedCPUAdam if offload else own
        config = _config(self._stage, precision, offload, clip)
        with same_buffers(module):
            if precision != "fp32":
                module.to(torch.bfloat16)
            self.module, *_ = self._deepspeed.initialize(
                model=module, optimizer=adam(trained, **options), config=config, dist_init_required=False
            )
        self._zero = self.module.optimizer  # around ours, which sees each rank's share as flat tensors

    def expect(self, last: bool) -> None:
        self.module.set_gradient_accumulation_boundary(last)

    def backward(self, loss: Tensor) -> None:
        self._begun = True
        self.module.backward(loss * self._world.size, scale_wrt_gas=False)  # DeepSpeed takes the mean over the ranks

    def step(self, lr: float) -> float:
        if not self._begun:  # all samples of the batch were refused
            return 0.0
        self._begun = False
        for group in self._zero.param_groups:
            group["lr"] = lr
        self.module.step()
        return math.nan if self._zero.overflow else float(self.module.get_global_grad_norm())

    def weight(self, name: str) -> Tensor:
        return self._deepspeed.utils.safe_get_full_fp32_param(self.parameters[name]).detach()

    def frozen(self, parameter: Parameter) -> Tensor:
        with self._deepspeed.zero.GatheredParameters([parameter], enabled=self._stage == 3):
            return parameter.detach().clone()

    def moments(self, name: str) -> dict[str, Tensor]:
        state = next(iter(self._zero.optimizer.state.values()), None)
        if not state:
            return {}
        get = self._deepspeed.utils.safe_get_full_optimizer_state
        kept = {kind: get(self.parameters[name], kind) for kind in MOMENTS}
        return kept | {"step": torch.tensor(float(state["step"]))}

    @torch.no_grad()
    def restore(self, name: str, weight: Tensor, saved: Mapping[str, Tensor]) -> None:
        parameter, utils = self.parameters[name], self._deepspeed.utils
        with self._deepspeed.zero.GatheredParameters([parameter], modifier_rank=0, enabled=self._stage == 3):
            parameter.copy_(weight)
        self._begin(saved.get("step"))
        parts = {None: weight} | {kind: saved[kind] for kind in MOMENTS if kind in saved}
        for kind, value in parts.items():
            value = value.to(self._world.device, torch.float32)
            of = (parameter, self._share(parameter, value) if self._stage == 3 else value)
            if kind is None and self._stage == 3:
                utils.safe_set_local_fp32_param(*of)
            elif kind is None:
                utils.safe_set_full_fp32_param(*of)
            elif self._stage == 3:
                utils.safe_set_local_optimizer_state(*of, kind)
            else:
                utils.safe_set_full_optimizer_state(*of, kind)

    def _share(self, parameter: Parameter, value: Tensor) -> Tensor:
        """This rank's part of a whole tensor under ZeRO-3: the last rank's is filled up."""
        size = parameter.ds_tensor.numel()  # type: ignore[attr-defined]  # of DeepSpeed
        padded = torch.nn.functional.pad(value.flatten(), (0, size * self._world.size - value.numel()))
        return padded.narrow(0, size * self._world.rank, size)

    def _begin(self, step: Tensor | None) -> None:
        """Makes the optimiser's state as after so many steps; without one as before the first. Moments that it makes
        are 0, those that are there already stay if there is a step: they are set one parameter after the other.
        """
        optimizer = self._zero.optimizer
        for state in optimizer.state.values():
            made = 0 if step is None else int(step)
            state["step"] = state["step"].fill_(made) if isinstance(state["step"], Tensor) else made
            for kind in MOMENTS if step is None else ():
                state[kind].zero_()
        if optimizer.state or step is None:
            return
        third = self._stage == 3
        flat = self._zero.fp32_partitioned_groups_flat if third else self._zero.single_partition_of_fp32_groups
        for tensor in flat:
            if self._offload:  # DeepSpeed's own
                kept = {kind: torch.zeros_like(tensor) for kind in MOMENTS}
                optimizer.state[tensor] = {"step": int(step), **kept}
            else:
                set_moments(optimizer, tensor, {"step": step, **{kind: torch.zeros(()) for kind in MOMENTS}})
        if not third:
            self._zero._lazy_init_hp_params_optimizer_state()  # as after its first step


def _import(name: str, world: World) -> ModuleType:
    if world.device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("LOCAL_RANK", str(world.rank))  # asked for where torchrun has not started this process
    # DeepSpeed calls collectives of torch by names that torch has replaced.
    warnings.filterwarnings("ignore", r"`torch.distributed.\w+` is deprecated", FutureWarning)
    try:
        import deepspeed  # takes seconds and is optional
    except ImportError as error:
        raise ValueError(f"engine={name}: DeepSpeed is not installed ({error})") from error
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    for lock in compiler_locks():
        logger.warning("%s: DeepSpeed waits for whoever compiles there; if nobody does, remove this file", lock)
    return deepspeed


def compiler_locks() -> list[Path]:
    """Files that DeepSpeed waits for without end before it uses what it compiles; one stays if a compiler is killed."""
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    return sorted(root.rglob("lock"))


def _config(stage: int, precision: str, offload: bool, clip: float) -> dict[str, Any]:
    without_masters = precision == "bf16_states"
    zero = {"stage": stage, "offload_optimizer": {"device": "cpu", "pin_memory": torch.cuda.is_available()}}
    if not offload:
        del zero["offload_optimizer"]
    return {
        "train_micro_batch_size_per_gpu": 1,  # of which it knows nothing
        "gradient_accumulation_steps": 2,  # or more: with 1 an offloaded norm is that of the last micro-batch
        "gradient_clipping": clip,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": zero,
        "bf16": {
            "enabled": precision != "fp32",
            "check_grad_overflow": True,
            "bf16_master_weights_and_grads": without_masters,
            "bf16_optimizer_states": without_masters,
        },
    }
