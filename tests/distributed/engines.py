"""What two processes do, started by test_engines.py: every engine trains a small net, saves, resumes, and says what
came of it.
"""

import json
import os
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from clvr_train.runtime.checkpoint import Saver
from clvr_train.runtime.distributed import World, start
from clvr_train.runtime.engine import Engine

ENGINES = ("ddp", "zero1", "zero2", "zero3")
PRECISIONS = [(name, precision) for name in ("ddp", "zero2", "zero3") for precision in ("bf16", "bf16_states")]
HELD = [(name, precision) for name in ("zero1", "zero2", "zero3") for precision in ("fp32", "bf16", "bf16_states")]
SIDES = (256, 512)  # of a layer whose bytes are counted
STEPS, SAVED = 6, 3  # updates; the checkpoint
BAD = 4  # number of the batch with a loss that is not finite, after the checkpoint
OPTIONS = {"lr": 1e-2, "total_steps": STEPS, "warmup_steps": 2, "weight_decay": 0.1, "clip": 0.5, "ema_decay": 0.6}


def net(seed: int = 0) -> nn.Module:
    """Tensors of which most cannot be divided by two, one layer that is not trained, and a buffer."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 31), nn.Tanh(), nn.Linear(31, 3), nn.Tanh(), nn.Linear(3, 1))
    torch.manual_seed(99)
    for parameter in model[0].requires_grad_(False).parameters():
        nn.init.normal_(parameter)
    model.register_buffer("third", torch.tensor([1 / 3]), persistent=False)
    return model


def batch(number: int) -> Tensor:
    """7 samples of 5 numbers."""
    return torch.randn(7, 5, generator=torch.Generator().manual_seed(number))


def train(engine: Engine, world: World, until: int) -> list[dict[str, float]]:
    """In micro-batches of 2: of one rank four, of two ranks two, one of which has a sample less."""
    values = []
    while engine.steps < until:
        rows = batch(engine.batches)
        mine = world.share(rows)
        for part in engine.turns(mine.split(2)):
            inputs = rows[:1] if part is None else part
            errors = (engine.module(inputs.to(dtype(engine))).float()[:, 0] - inputs.sum(1).sin()).square()
            bad = engine.batches == BAD and world.rank == world.size - 1
            engine.backward(errors.sum() / len(rows) * (0 if part is None else float("nan") if bad else 1))
        values.append(engine.step())
    return values


def held_bytes(engine: Engine) -> int:
    """What this rank keeps between steps under ZeRO: weights, moments, and weights that the optimiser steps on."""
    zero, third = engine._backend._zero, engine._backend._stage == 3
    stepped = zero.fp32_partitioned_groups_flat if third else zero.single_partition_of_fp32_groups
    used = zero.fp16_partitioned_groups_flat if third else zero.bit16_groups_flat
    kept = [value for state in zero.optimizer.state.values() for value in state.values()]
    storages = {tensor.data_ptr(): tensor.untyped_storage().nbytes() for tensor in (*stepped, *used, *kept)}
    return sum(storages.values())


def offload_compiled() -> bool:
    """Whether DeepSpeed's AdamW for CPUs, minutes of the compiler, is there: `make test-all` compiles it."""
    return any(Path(os.environ["TORCH_EXTENSIONS_DIR"]).rglob("cpu_adam.so"))


def dtype(engine: Engine) -> torch.dtype:
    return next(engine.module.parameters()).dtype


def stop(engine: Engine, world: World) -> str:
    """Makes every batch from now on one that is not finite; returns how the engine gives up."""
    try:
        while True:
            for _ in engine.turns([0]):
                value = float("inf") if world.rank == world.size - 1 else 1.0
                engine.backward(engine.module(torch.ones(1, 5, dtype=dtype(engine))).sum() * value)
            engine.step({"samples": [world.rank, engine.batches]})
    except FloatingPointError as error:
        return str(error)


def main(folder: Path) -> None:
    found, weights = {}, {}

    def keep(case: str, engine: Engine, **values: object) -> None:
        found[case] = {"steps": engine.steps, "batches": engine.batches, "skipped": engine.skipped} | values
        for name, tensor in engine.full_weights().items():
            weights[f"{case}/{name}"] = tensor.float().clone()
        for name, tensor in engine.full_weights(average=True).items():
            weights[f"{case} average/{name}"] = tensor.float().clone()

    with start("cpu", timeout_s=60, collectives=True) as world:
        for name in ENGINES:
            engine = Engine(net(), world, name=name, **OPTIONS)
            with Saver(folder / name) as saver:
                train(engine, world, SAVED)
                engine.save(saver, SAVED)
                values = train(engine, world, STEPS)
            keep(name, engine, values=values)
            before = {key: tensor.clone() for key, tensor in engine.full_weights().items()}
            assert not list(engine.turns([])) and engine.step()["grad_norm"] == 0, "a batch that was refused as a whole"
            assert all(torch.equal(before[key], tensor) for key, tensor in engine.full_weights().items())
            for case, source in ((f"{name} resumed", name), (f"{name} of one", "single")):
                engine = Engine(net(seed=5), world, name=name, **OPTIONS)
                with Saver(folder / source) as saver:
                    engine.resume(saver)
                train(engine, world, STEPS)
                keep(case, engine)
            engine = Engine(net(), world, name=name, dump=folder / f"{name} failed", **OPTIONS)
            train(engine, world, SAVED)
            keep(f"{name} stopped", engine, message=stop(engine, world))
        for name, precision in PRECISIONS:
            model = net()
            engine = Engine(model, world, name=name, precision=precision, **OPTIONS)
            keep(f"{name} {precision}", engine, values=train(engine, world, STEPS), third=model.third.item())
        for name, precision in HELD:
            model = nn.Linear(*SIDES, bias=False)
            engine = Engine(model, world, name=name, precision=precision, **OPTIONS)
            for _ in engine.turns([0]):
                engine.backward(engine.module(torch.ones(1, SIDES[0], dtype=dtype(engine))).float().sum())
            engine.step()
            found[f"{name} {precision} held"] = held_bytes(engine)
        for name in ("zero2", "zero3") if offload_compiled() else ():
            engine = Engine(net(seed=5), world, name=name, offload="optimizer", **OPTIONS)
            with Saver(folder / "single") as saver:
                engine.resume(saver)
            train(engine, world, STEPS)
            keep(f"{name} offload", engine)
        if world.first:
            (folder / "found.json").write_text(json.dumps(found))
            save_file(weights, folder / "weights.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
