"""The step of a training on one GPU or many: gradients, schedule, AdamW, and what a checkpoint holds of them.

A loop sees the same engine whatever is beneath: torch in one process, DistributedDataParallel, or DeepSpeed's ZeRO.
Tensors of a checkpoint are whole and go by the names of the parameters, so that every engine on any number of ranks
goes on from the checkpoint of any other.
"""

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn import Module

from clvr_train.runtime.backends import TorchBackend
from clvr_train.runtime.checkpoint import CheckpointError, Saver
from clvr_train.runtime.distributed import World
from clvr_train.runtime.optimizers import OPTIMIZERS
from clvr_train.runtime.seeding import rng_state, set_rng_state
from clvr_train.runtime.zero import STAGES, ZeroBackend

ENGINES = ("single", "ddp", *STAGES)
PRECISIONS = ("fp32", "bf16", "bf16_states")  # bf16: with float32 master weights; bf16_states: without
OFFLOADS = ("none", "optimizer")
SCHEDULES = ("constant", "cosine")
MODEL, STATE, RNG, EXTRA = "model.", "optimizer.", "rng.", "extra."
KINDS = ("exp_avg", "exp_avg_sq", "exp_avg_scale", "exp_avg_sq_scale", "step")

logger = logging.getLogger(__name__)
T = TypeVar("T")


def lr_factor(step: int, *, schedule: str, warmup_steps: int, total_steps: int) -> float:
    """What the peak learning rate is multiplied by at a step (from 0): linear warm-up, then constant or cosine to 0."""
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule={schedule!r} is not one of {', '.join(SCHEDULES)}")
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if schedule == "constant":
        return 1.0
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


class Engine:
    """Owns a module's trained parameters and their optimiser, and counts.

    `module` is what the forwards go through; `steps` the updates made, which the schedule follows; `batches` the
    batches seen, of which some may have been skipped.

    Args:
        name, precision, optimizer, offload: as in conf/engine/.
        lr: peak learning rate. clip: largest norm of the gradient.
        max_skipped: so many batches in a row may have a gradient that is not finite; one more is an error.
    """

    def __init__(
        self,
        module: Module,
        world: World | None = None,
        *,
        name: str = "single",
        precision: str = "fp32",
        optimizer: str = "adamw",
        offload: str = "none",
        lr: float,
        total_steps: int,
        schedule: str = "cosine",
        warmup_steps: int = 0,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        clip: float = 1.0,
        max_skipped: int = 3,
    ) -> None:
        self.world = world or World()
        _check(name, precision, optimizer, offload, self.world)
        self._plain = module
        self._trained = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
        if not self._trained:
            raise ValueError("no parameter asks for a gradient: nothing to train")
        options = {"lr": lr, "betas": tuple(betas), "weight_decay": weight_decay}
        common = {"precision": precision, "optimizer": optimizer, "clip": clip, "options": options}
        if name in STAGES:
            self._backend = ZeroBackend(module, self.world, name=name, offload=offload == "optimizer", **common)
        else:
            self._backend = TorchBackend(module, self.world, **common)
        self.module = self._backend.module
        self.lr, self.max_skipped = lr, max_skipped
        self.schedule, self.warmup_steps, self.total_steps = schedule, warmup_steps, total_steps
        self.steps = self.batches = self.skipped = self.skipped_in_a_row = 0

    def turns(self, parts: Sequence[T]) -> Iterator[T | None]:
        """This rank's parts of the batch, each for one forward and one `backward`; None for a forward that only keeps
        the ranks in step, with a loss of weight 0: a collective waits for all of them.
        """
        number = max(self.world.gather(len(parts)))
        for turn in range(number):
            self.world.phase = f"step {self.steps + 1}: forward {turn + 1} of {number}"
            self._backend.expect(last=turn + 1 == number)
            yield parts[turn] if turn < len(parts) else None

    def backward(self, loss: Tensor) -> None:
        """Adds the gradients of a part of the loss; parts of all ranks add up to the loss of the batch."""
        self.world.phase = self.world.phase.replace("forward", "backward")
        # A loss that is not finite may have finite gradients, even none; here it spoils all, on every rank.
        self._backend.backward(loss * torch.where(loss.detach().isfinite(), 1.0, math.nan))

    def step(self) -> dict[str, float]:
        """Updates the parameters from their gradients and clears these.

        A gradient that is not finite, on whatever rank, changes nothing but `batches`: optimiser, average and schedule
        go on with the next batch as if this one had not been.

        Returns:
            `grad_norm` (before clipping), `lr`, and `skipped` (batches so far).

        Raises:
            FloatingPointError: after more than `max_skipped` such gradients in a row.
        """
        self.world.phase = f"step {self.steps + 1}: update"
        lr = self.lr * lr_factor(
            self.steps, schedule=self.schedule, warmup_steps=self.warmup_steps, total_steps=self.total_steps
        )
        norm = self._backend.step(lr)
        self.batches += 1
        if math.isfinite(norm):
            self.steps += 1
            self.skipped_in_a_row = 0
        else:
            self.skipped += 1
            self.skipped_in_a_row += 1
            logger.warning("batch %d is skipped: its gradient is not finite", self.batches)
        if self.skipped_in_a_row > self.max_skipped:
            raise FloatingPointError(
                f"{self.skipped_in_a_row} gradients in a row are not finite at optimiser step {self.steps}; "
                f"the last checkpoint is untouched: start a run with a lower learning rate than {self.lr}"
            )
        return {"grad_norm": norm, "lr": lr, "skipped": float(self.skipped)}

    def save(self, saver: Saver, step: int, extra: Mapping[str, Tensor] | None = None) -> None:
        """Saves weights, optimiser, counts and random states of all ranks under `step`; `extra` is rank 0's."""
        self.world.phase = f"step {self.steps}: saving"
        counts = {name: getattr(self, name) for name in ("steps", "batches", "skipped", "skipped_in_a_row")}
        saver.save(step, self._tensors(extra or {}), counts)

    def _tensors(self, extra: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """What this rank writes; all ranks go through the same parameters, of which some must be put together."""
        for name, owner in self._owners().items():
            tensors = {f"{MODEL}{name}": self._backend.weight(name)}
            tensors |= {f"{STATE}{name}.{kind}": value for kind, value in self._backend.moments(name).items()}
            if owner == self.world.rank:
                yield from tensors.items()
        yield from ((f"{RNG}{self.world.rank}.{name}", state) for name, state in rng_state().items())
        if self.world.first:
            yield from ((f"{EXTRA}{name}", tensor) for name, tensor in extra.items())

    def _owners(self) -> dict[str, int]:
        """Which rank keeps what there is once, by parameter: about as many bytes each."""
        sizes = {name: self._plain.get_parameter(name) for name in self._trained}
        sizes = {name: getattr(p, "ds_numel", p.numel()) for name, p in sizes.items()}
        owners, held = {}, [0] * self.world.size
        for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
            owners[name] = held.index(min(held))
            held[owners[name]] += sizes[name]
        return owners

    def resume(self, saver: Saver) -> tuple[int, dict[str, Tensor]] | None:
        """Takes over the newest whole checkpoint and returns its step and what was `extra`; None if there is none.

        Raises:
            CheckpointError: the checkpoint is of other parameters.
        """
        self.world.phase = "resuming"
        saved = saver.load()
        if saved is None:
            return None
        step, tensors, counts = saved
        names = {name.removeprefix(MODEL) for name in tensors if name.startswith(MODEL)}
        for name in self._trained:
            if name not in names:
                raise CheckpointError(f"step {step}: no weights of {name}: a checkpoint of another model or an old one")
            kept = {kind: f"{STATE}{name}.{kind}" for kind in KINDS}
            moments = {kind: tensors[key] for kind, key in kept.items() if key in tensors}
            self._backend.restore(name, tensors[f"{MODEL}{name}"], moments)
        for name, count in counts.items():
            setattr(self, name, count)
        mine = f"{RNG}{self.world.rank}."
        set_rng_state({name.removeprefix(mine): tensors[name] for name in tensors if name.startswith(mine)})
        return step, {name.removeprefix(EXTRA): tensors[name] for name in tensors if name.startswith(EXTRA)}

    def full_weights(self) -> dict[str, Tensor]:
        """The module's whole state dict on the CPU for rank 0, trained weights in the precision in which they are
        trained; empty for the others, which have to ask too.
        """
        self.world.phase = "putting the weights together"
        state: dict[str, Tensor] = {}
        parameters = dict(self._plain.named_parameters())
        for name, tensor in self._plain.state_dict().items():
            if name in parameters:
                trained = parameters[name].requires_grad
                tensor = self._backend.weight(name) if trained else self._backend.frozen(parameters[name])
            if self.world.first:
                state[name] = tensor.cpu()
        return state


def _check(name: str, precision: str, optimizer: str, offload: str, world: World) -> None:
    """Refuses settings that do not exist, before anything is built."""
    given = {"": (name, ENGINES), ".precision": (precision, PRECISIONS), ".optimizer": (optimizer, OPTIMIZERS)}
    for key, (value, choices) in (given | {".offload": (offload, OFFLOADS)}).items():
        if value not in choices:
            raise ValueError(f"engine{key}={value!r} is not one of {', '.join(choices)}")
    if name == "single" and world.size > 1:
        raise ValueError(f"engine=single: has one process, and {world.size} were started; choose another engine")
    if name not in STAGES and offload != "none":
        raise ValueError(f"engine.offload={offload}, engine={name}: only {', '.join(STAGES)} can (on one GPU too)")
