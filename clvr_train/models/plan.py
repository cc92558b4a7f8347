"""What a training holds on every GPU and how long a step takes, as arithmetic; docs/performance.md has it in words."""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch

from clvr_train.models.blocks import CHECKPOINTING
from clvr_train.models.trace import Trace

ENGINES = ("single", "ddp", "zero1", "zero2", "zero3")
PRECISIONS = ("fp32", "bf16", "bf16_states")  # bf16: with an fp32 master copy; bf16_states: without
OPTIMIZERS = ("adamw", "adamw_bf16", "adamw8bit")
OFFLOADS = ("none", "optimizer")
CHOICES = {
    "engine": ENGINES,
    "precision": PRECISIONS,
    "optimizer": OPTIMIZERS,
    "checkpointing": CHECKPOINTING,
    "offload": OFFLOADS,
}
STEP_BYTES = 4  # torch's AdamW counts the steps of every tensor in a float32 of its own
BLOCK_8BIT, SMALL_8BIT = 256, 4096  # bitsandbytes: values that share a scale; smaller tensors keep float32 moments


@dataclass(frozen=True)
class Gpu:
    """Usable memory, and dense FLOP/s of matrix multiplications by weights' dtype (float32 without TF32)."""

    memory_bytes: int
    bf16: float
    fp32: float


# Peaks are the makers' (SXM); memory is what the driver leaves of 80, 141, 96 and 80 GB.
GPUS = {
    "h100": Gpu(78 * 2**30, 989e12, 67e12),
    "h200": Gpu(139 * 2**30, 989e12, 67e12),
    "h20": Gpu(95 * 2**30, 148e12, 44e12),
    "a100": Gpu(78 * 2**30, 312e12, 19.5e12),
}


@dataclass(frozen=True)
class Settings:
    """How a training is set up. `micro_batch`: samples in a forward of one GPU. `ema`: an average of the weights.

    Raises:
        ValueError: there is no such setting, or the engine has no such combination.
    """

    engine: str = "single"
    gpus: int = 1
    precision: str = "fp32"
    optimizer: str = "adamw"
    checkpointing: str = "none"
    micro_batch: int = 1
    offload: str = "none"
    ema: bool = False

    def __post_init__(self) -> None:
        for key, choices in CHOICES.items():
            if getattr(self, key) not in choices:
                raise ValueError(f"{key}={getattr(self, key)!r} is not one of {', '.join(choices)}")
        if self.engine == "single" and self.gpus > 1:
            raise ValueError(f"gpus={self.gpus}: engine=single has one; choose one of {', '.join(ENGINES[1:])}")
        if self.stage and self.optimizer == "adamw8bit":
            raise ValueError(f"optimizer=adamw8bit, engine={self.engine}: 8-bit moments need engine=single or ddp")
        if self.offload == "optimizer" and not self.stage:
            raise ValueError(f"offload=optimizer, engine={self.engine}: only {', '.join(ENGINES[2:])} can")
        if self.offload == "optimizer" and (self.optimizer != "adamw" or self.precision == "bf16_states"):
            raise ValueError("offload=optimizer: only with optimizer=adamw and precision=fp32 or bf16")

    @property
    def stage(self) -> int:
        """Of ZeRO; 0 without."""
        return int(self.engine[-1]) if self.engine.startswith("zero") else 0

    @property
    def dtype(self) -> torch.dtype:
        """Of weights, gradients and activations."""
        return torch.float32 if self.precision == "fp32" else torch.bfloat16


def model_bytes(model: torch.nn.Module, dtype: torch.dtype) -> int:
    """Bytes of parameters and buffers once a folder is loaded in a dtype; what is not saved with a model keeps its own.

    A model on the meta device will do.
    """
    saved = model.state_dict(keep_vars=True)
    tensors = {id(tensor): (name, tensor) for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    return sum(
        tensor.numel() * (dtype.itemsize if name in saved and tensor.is_floating_point() else tensor.dtype.itemsize)
        for name, tensor in tensors.values()
    )


def optimizer_bytes(numbers: Iterable[int], precision: str, optimizer: str) -> int:
    """Bytes of moments, step counts and, with precision bf16, master weights of tensors of so many elements."""
    return sum(_moment_bytes(n, precision, optimizer) + (4 * n if precision == "bf16" else 0) for n in numbers)


def _moment_bytes(number: int, precision: str, optimizer: str) -> int:
    if optimizer == "adamw8bit":
        return 8 * number if number < SMALL_8BIT else 2 * (number + 4 * math.ceil(number / BLOCK_8BIT))
    two = optimizer == "adamw_bf16" or precision == "bf16_states"  # torch keeps moments in the dtype of the weights
    return 2 * number * (2 if two else 4) + STEP_BYTES


def state_bytes(trained: Iterable[torch.Tensor], frozen_bytes: int, settings: Settings) -> dict[str, int]:
    """Bytes of `weights`, `gradients` and `optimizer` on every GPU, and of the optimizer on the `host` for each GPU.

    ZeRO-1 splits the optimizer's over the GPUs, ZeRO-2 the gradients too, ZeRO-3 the trained weights too. An average of
    the weights, which is shared too, is counted with the optimizer's.

    Args:
        trained: the trained parameters, each once. frozen_bytes: of everything that every GPU holds whole.
    """
    numbers = [tensor.numel() for tensor in trained]
    parts = {
        "weights": sum(numbers) * settings.dtype.itemsize,
        "gradients": sum(numbers) * settings.dtype.itemsize,
        "optimizer": optimizer_bytes(numbers, settings.precision, settings.optimizer),
    }
    if settings.stage and settings.precision != "bf16":  # DeepSpeed steps on a copy in any precision
        parts["optimizer"] += sum(numbers) * settings.dtype.itemsize
    for least, kind in enumerate(("optimizer", "gradients", "weights"), start=1):
        if settings.stage >= least:
            parts[kind] = -(-parts[kind] // settings.gpus)
    parts["weights"] += frozen_bytes
    parts["host"] = 0
    if settings.offload == "optimizer":
        # Float32 gradients too; weights on their way back (ZeRO-1, ZeRO-2), and sums of gradients (ZeRO-2).
        more = 4 + (0, 1, 2, 0)[settings.stage] * settings.dtype.itemsize
        parts["host"] = parts["optimizer"] + -(-more * sum(numbers) // settings.gpus)
        parts["optimizer"] = 0
    parts["optimizer"] += -(-4 * sum(numbers) // settings.gpus) if settings.ema else 0
    return parts


def bytes_per_gpu(
    trained: Iterable[torch.Tensor], frozen_bytes: int, trace: Trace, settings: Settings
) -> tuple[dict[str, int], int]:
    """Bytes of `weights`, `gradients`, `optimizer`, `activations` and their `total`, and bytes on the host per GPU."""
    parts = state_bytes(trained, frozen_bytes, settings)
    host = parts.pop("host")
    parts["activations"] = sum(trace.activations(settings.checkpointing))
    return parts | {"total": sum(parts.values())}, host


def micro_batches(batch: int, settings: Settings) -> int:
    """Forwards of one GPU in an optimiser step of `batch` samples over all GPUs, all samples of one bucket.

    Raises:
        ValueError: the GPUs cannot share the batch equally.
    """
    if batch % settings.gpus:
        raise ValueError(f"train.batch={batch}: must be a multiple of gpus={settings.gpus}")
    return math.ceil(batch // settings.gpus / settings.micro_batch)


def cheapest_fit(settings: Settings, fits: Callable[[Settings], bool]) -> dict[str, object] | None:
    """The least change of settings that `fits`, or None.

    In order: activation checkpointing, a higher ZeRO stage, the 8-bit optimizer, a smaller micro-batch, the optimizer
    on the host. One of these is used only where those before it, alone or together, do not do; then with as few of
    them as will do, and of each the weakest.
    """
    ways = {key: values for key, values in stronger(settings).items() if values}
    order = list(ways)
    subsets = [keys for number in range(len(order) + 1) for keys in itertools.combinations(order, number)]
    subsets.sort(key=lambda keys: order.index(keys[-1]) if keys else -1)  # stable: fewer come first
    for keys in subsets:
        for values in itertools.product(*(ways[key] for key in keys)):
            changes = dict(zip(keys, values, strict=True))
            try:
                changed = replace(settings, **changes)
            except ValueError:  # the engine has no such combination
                continue
            if fits(changed):
                return changes
    return None


def stronger(settings: Settings) -> Mapping[str, list]:
    """For each setting the values that need less memory, from weak to strong, in the order of `cheapest_fit`."""

    def after(key: str) -> list[str]:
        choices = CHOICES[key]
        return list(choices[choices.index(getattr(settings, key)) + 1 :])

    return {
        "checkpointing": after("checkpointing"),
        # one GPU has nothing to share, but only ZeRO can have the optimizer on the host
        "engine": [e for e in after("engine") if e == "zero1" or (e.startswith("zero") and settings.gpus > 1)],
        "optimizer": after("optimizer")[-1:],
        "micro_batch": list(_halves(settings.micro_batch)),
        "offload": after("offload"),
    }


def _halves(number: int) -> Iterator[int]:
    while number > 1:
        number //= 2
        yield number


def network_evaluations(
    rollouts: int, items: int, *, steps: int, cfg: float, beta_kl: float, training_cfg: float = 1.0, anchored: int = 0
) -> dict[str, int]:
    """Evaluations of an epoch of PPRL by what runs, an image and a branch of guidance counting as one each.

    `rollout`: every image takes `steps`, twice with guidance. The update evaluates `old` and `policy` (forward and
    backward) once an item, a rollout at one time, and the `reference` if `beta_kl` is above 0; each twice with guidance
    in training. `anchored` items take the reference and the policy once more, without text.
    """
    branches = 2 if training_cfg > 1 else 1
    found = {
        "rollout": rollouts * steps * (2 if cfg > 1 else 1),
        "old": items * branches,
        "reference": (items * branches if beta_kl > 0 else 0) + anchored,
        "policy": items * branches + anchored,
    }
    return found | {"total": sum(found.values())}
