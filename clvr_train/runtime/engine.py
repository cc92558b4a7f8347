"""The step of a training on one GPU or many: gradients, schedule, AdamW, and what a checkpoint holds of them.

A loop sees the same engine whatever is beneath: torch in one process, DistributedDataParallel, or DeepSpeed's ZeRO.
Tensors of a checkpoint are whole and go by the names of the parameters, so that every engine on any number of ranks
goes on from the checkpoint of any other.
"""

import json
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Module

from clvr_train.runtime.backends import TorchBackend
from clvr_train.runtime.checkpoint import CheckpointError, Saver
from clvr_train.runtime.distributed import World
from clvr_train.runtime.files import write_atomic
from clvr_train.runtime.optimizers import MOMENTS, OPTIMIZERS
from clvr_train.runtime.seeding import rng_state, set_rng_state
from clvr_train.runtime.zero import STAGES, ZeroBackend

ENGINES = ("single", "ddp", *STAGES)
PRECISIONS = ("fp32", "bf16", "bf16_states")  # bf16: with float32 master weights; bf16_states: without
OFFLOADS = ("none", "optimizer")
SCHEDULES = ("constant", "cosine")
MODEL, STATE, AVERAGE, RNG, EXTRA = "model.", "optimizer.", "ema.", "rng.", "extra."
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
        ema_decay: how much of an exponential moving average of the weights stays in a step; None for no average. It is
            taken every `ema_every` steps, and every rank holds a part of it, in float32.
        max_skipped: so many batches in a row may have a gradient that is not finite; one more is an error.
        dump: folder for what repeats those batches.
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
        ema_decay: float | None = None,
        ema_every: int = 1,
        max_skipped: int = 3,
        dump: Path | None = None,
    ) -> None:
        self.world = world or World()
        _check(name, precision, optimizer, offload, self.world)
        self._plain = module
        self._trained = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
        if not self._trained:
            raise ValueError("no parameter asks for a gradient: nothing to train")
        options = {"lr": lr, "betas": tuple(betas), "weight_decay": weight_decay}
        common: dict[str, Any] = {"precision": precision, "optimizer": optimizer, "clip": clip, "options": options}
        self._backend: ZeroBackend | TorchBackend
        if name in STAGES:
            self._backend = ZeroBackend(module, self.world, name=name, offload=offload == "optimizer", **common)
        else:
            self._backend = TorchBackend(module, self.world, **common)
        self.module = self._backend.module
        self.lr, self.max_skipped = lr, max_skipped
        self.schedule, self.warmup_steps, self.total_steps = schedule, warmup_steps, total_steps
        self.steps = self.batches = self.skipped = self.skipped_in_a_row = 0
        self._owners = self._deal()
        self._weight_dtype = torch.bfloat16 if precision == "bf16_states" and name not in STAGES else torch.float32
        self._moment_dtype = {"adamw": self._weight_dtype, "adamw_bf16": torch.bfloat16}.get(optimizer, torch.float32)
        self._ema_decay, self._ema_every = ema_decay, ema_every
        self._average: dict[str, Tensor] = {}  # of the weights that this rank owns
        self._dump = dump
        self._failed: list[Any] = []

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

    def step(self, account: Mapping[str, Any] | None = None) -> dict[str, float]:
        """Updates the parameters from their gradients and clears these.

        A gradient that is not finite, on whatever rank, changes nothing but `batches`: optimiser, average and schedule
        go on with the next batch as if this one had not been.

        Args:
            account: what this rank has done, in values of JSON, for the dump.

        Returns:
            `grad_norm` (before clipping), `lr`, and `skipped` (batches so far).

        Raises:
            FloatingPointError: after more than `max_skipped` such gradients in a row.
        """
        self.world.phase = f"step {self.steps + 1}: update"
        lr = self.lr * lr_factor(
            self.steps, schedule=self.schedule, warmup_steps=self.warmup_steps, total_steps=self.total_steps
        )
        if self._ema_decay is not None and not self._average:
            self._average_weights(0.0)
        norm = self._backend.step(lr)
        self.batches += 1
        if math.isfinite(norm):
            self.steps += 1
            self.skipped_in_a_row, self._failed = 0, []
            if self._ema_decay is not None and self.steps % self._ema_every == 0:
                self._average_weights(self._ema_decay**self._ema_every)
        else:
            self.skipped += 1
            self.skipped_in_a_row += 1
            self._failed.append({"batch": self.batches - 1, "ranks": self.world.gather(account)})
            logger.warning("batch %d is skipped: its gradient is not finite", self.batches - 1)
        if self.skipped_in_a_row > self.max_skipped:
            self._give_up()
        return {"grad_norm": norm, "lr": lr, "skipped": float(self.skipped)}

    def _give_up(self) -> None:
        """Leaves the weights, which none of the failed batches has touched, and which batches these were."""
        where = "the last checkpoint is untouched"
        if self._dump is not None:
            self.batches -= self.skipped_in_a_row
            self.skipped -= self.skipped_in_a_row
            self.skipped_in_a_row = 0
            with Saver(self._dump, keep=1, asynchronous=False) as saver:
                self.save(saver, self.steps)
            if self.world.first:
                write_atomic(self._dump / "batches.json", json.dumps(self._failed, indent=1))
            where = f"{self._dump} has their samples and the weights"
        raise FloatingPointError(
            f"{len(self._failed)} gradients in a row are not finite after optimiser step {self.steps}; {where}; "
            f"start a run with a lower learning rate than {self.lr}"
        )

    def _average_weights(self, decay: float) -> None:
        """Moves the average towards the weights; all ranks go through them together."""
        for name, owner in self._owners.items():
            weight = self._backend.weight(name)
            if owner == self.world.rank and name in self._average:
                self._average[name].lerp_(weight.float(), 1 - decay)
            elif owner == self.world.rank:
                self._average[name] = weight.float().clone()

    def save(self, saver: Saver, step: int, extra: Mapping[str, Tensor] | None = None) -> None:
        """Saves weights, optimiser, average, counts and all random states under `step`; `extra` is rank 0's."""
        self.world.phase = f"step {self.steps}: saving"
        counts = {name: getattr(self, name) for name in ("steps", "batches", "skipped", "skipped_in_a_row")}
        saver.save(step, self._tensors(extra or {}), counts)

    def _tensors(self, extra: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """What this rank writes; all ranks go through the same parameters, of which some must be put together."""
        for name, owner in self._owners.items():
            tensors = {f"{MODEL}{name}": self._backend.weight(name)}
            tensors |= {f"{STATE}{name}.{kind}": value for kind, value in self._backend.moments(name).items()}
            if owner == self.world.rank:
                yield from tensors.items()
        yield from ((f"{AVERAGE}{name}", tensor) for name, tensor in self._average.items())
        yield from ((f"{RNG}{self.world.rank}.{name}", state) for name, state in rng_state().items())
        if self.world.first:
            yield from ((f"{EXTRA}{name}", tensor) for name, tensor in extra.items())

    def _reserve(self, saver: Saver) -> None:
        """Has the memory made for copies of what this rank owns, while training begins."""
        kinds = {f"{MODEL}{{}}": self._weight_dtype}
        kinds |= {f"{STATE}{{}}.{kind}": self._moment_dtype for kind in MOMENTS}
        kinds |= {f"{AVERAGE}{{}}": torch.float32} if self._ema_decay is not None else {}
        mine = [name for name, owner in self._owners.items() if owner == self.world.rank]
        saver.reserve(
            (key.format(name), torch.empty(self._shape(name), dtype=dtype, device="meta"))
            for name in mine for key, dtype in kinds.items()
        )  # fmt: skip

    def _deal(self) -> dict[str, int]:
        """Which rank keeps what there is once, by trained parameter: about as many elements each."""
        sizes = {name: math.prod(self._shape(name)) for name in self._trained}
        owners, held = {}, [0] * self.world.size
        for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
            owners[name] = held.index(min(held))
            held[owners[name]] += sizes[name]
        return owners

    def _shape(self, name: str) -> torch.Size:
        parameter = self._plain.get_parameter(name)
        return getattr(parameter, "ds_shape", parameter.shape)  # under ZeRO-3 there is only a part of it

    def resume(self, saver: Saver, newest: int | None = None) -> tuple[int, dict[str, Tensor]] | None:
        """Takes over the newest whole checkpoint, of no step after `newest`, and returns its step and what was `extra`;
        None if there is none.

        Raises:
            CheckpointError: the checkpoint is of other parameters.
        """
        self.world.phase = "resuming"
        self._reserve(saver)
        saved = saver.load(newest)
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
            if self._owners[name] == self.world.rank and f"{AVERAGE}{name}" in tensors:
                self._average[name] = tensors[f"{AVERAGE}{name}"].to(self.world.device)
        for name, count in counts.items():
            setattr(self, name, count)
        mine = f"{RNG}{self.world.rank}."
        set_rng_state({name.removeprefix(mine): tensors[name] for name in tensors if name.startswith(mine)})
        return step, {name.removeprefix(EXTRA): tensors[name] for name in tensors if name.startswith(EXTRA)}

    def trained(self) -> list[Tensor]:
        """The trained weights, whole, in the precision in which they are trained, in the module's order; all ranks
        ask.
        """
        return [self._backend.weight(name) for name in self._trained]

    def full_weights(self, average: bool = False) -> dict[str, Tensor]:
        """The module's whole state dict on the CPU for rank 0, trained weights in the precision in which they are
        trained, or their average; empty for the others, which have to ask too.
        """
        self.world.phase = "putting the weights together"
        state: dict[str, Tensor] = {}
        parameters = dict(self._plain.named_parameters())
        for name, tensor in self._plain.state_dict().items():
            if name in self._owners:
                tensor = self._averaged(name) if average else self._backend.weight(name)
            elif name in parameters:
                tensor = self._backend.frozen(parameters[name])
            if self.world.first:
                state[name] = tensor.cpu()
        return state

    def _averaged(self, name: str) -> Tensor:
        """An averaged weight on rank 0; what the others get is of no use."""
        owner, mine = self._owners[name], self._average.get(name)
        if owner == 0:
            return mine if mine is not None else torch.empty(0)
        if owner == self.world.rank:
            assert mine is not None
            dist.send(mine.cpu(), 0, group=self.world.group)
        received = torch.empty(self._shape(name) if self.world.first else 0)
        if self.world.first:
            dist.recv(received, owner, group=self.world.group)
        return received


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
