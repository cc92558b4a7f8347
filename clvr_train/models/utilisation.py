"""Model FLOPs utilisation (MFU) of a training: FLOPs that its samples ask for, over what the GPU could do."""

import functools
from collections.abc import Sequence

import torch
from diffusers import Flux2Transformer2DModel

from clvr_train.method.trajectory import Sample
from clvr_train.models.conditioning import Conditioner
from clvr_train.models.plan import GPUS
from clvr_train.models.trace import trace_transformer


def peak_flops(name: str, dtype: torch.dtype) -> float | None:
    """Dense FLOP/s of a GPU by the name that its driver gives it; None for one that `plan.GPUS` does not know."""
    known = [key for key in GPUS if key in name.lower()]
    gpu = GPUS[max(known, key=len)] if known else None  # an H200 is no H20
    return None if gpu is None else gpu.fp32 if dtype == torch.float32 else gpu.bf16


def peak_of(device: torch.device, dtype: torch.dtype) -> float | None:
    """Dense FLOP/s of a device; None for a CPU and for a GPU that is not known."""
    return peak_flops(torch.cuda.get_device_name(device), dtype) if device.type == "cuda" else None


class Utilisation:
    """Adds up the FLOPs of this rank's samples: forward and backward of the transformer, three forwards in all, without
    what is recomputed, as the `plan` recipe counts them. On a CPU, or an unknown GPU, it does nothing.
    """

    def __init__(self, conditioner: Conditioner, precision: str) -> None:
        dtype = torch.float32 if precision == "fp32" else torch.bfloat16
        self.peak = peak_of(conditioner.klein.device, dtype)
        self._conditioner, self._flops = conditioner, 0
        self._of = functools.cache(functools.partial(_flops, conditioner, dtype))

    def add(self, samples: Sequence[Sample]) -> None:
        if self.peak is not None:
            self._flops += sum(self._of(self._conditioner.bucket(sample)) for sample in samples)

    def take(self, seconds: float) -> dict[str, float]:
        """`mfu` of these seconds, in which all that was added has been done; it then begins anew."""
        flops, self._flops = self._flops, 0
        return {} if self.peak is None or seconds <= 0 else {"mfu": flops / seconds / self.peak}


def _flops(conditioner: Conditioner, dtype: torch.dtype, bucket: tuple[tuple[int, int], ...]) -> int:
    target, *references = bucket
    with torch.device("meta"):
        shape = Flux2Transformer2DModel.from_config(conditioner.klein.transformer.config)
    return 3 * trace_transformer(shape, dtype, 1, conditioner.klein.window, target, references).flops
