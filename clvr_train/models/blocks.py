"""How the blocks of the transformer run: activations kept or computed again, compiled or not."""

from collections.abc import Iterable

import torch
from diffusers import Flux2Transformer2DModel
from torch.utils.checkpoint import checkpoint

CHECKPOINTING = ("none", "selective", "full")  # of no block, of every second one, of all
# Sizes for which compiled blocks are held: by bucket and micro-batch, with gradients and without (torch: 8 by default).
MAX_COMPILED_SIZES = 64


def checkpointed(number: int, kind: str) -> range:
    """Indices of the blocks, of so many, that keep only their inputs and are computed again in the backward.

    Raises:
        ValueError: an unknown kind.
    """
    if kind not in CHECKPOINTING:
        raise ValueError(f"checkpointing={kind!r} is not one of {', '.join(CHECKPOINTING)}")
    return {"none": range(0), "selective": range(0, number, 2), "full": range(number)}[kind]


def blocks_of(transformer: Flux2Transformer2DModel) -> list[torch.nn.Module]:
    """The blocks in the order in which they run: those of two streams, then those of one."""
    return [*transformer.transformer_blocks, *transformer.single_transformer_blocks]


def set_checkpointing(transformer: Flux2Transformer2DModel, kind: str) -> None:
    """Activation checkpointing `none`, `selective` or `full`; results are the same bit for bit.

    Nothing in a block is random, so that no state of a generator is kept for the second forward.

    Raises:
        ValueError: an unknown kind.
    """
    blocks = blocks_of(transformer)
    chosen = {id(blocks[index]) for index in checkpointed(len(blocks), kind)}

    def run(block: torch.nn.Module, *args: object) -> object:
        if id(block) in chosen:
            return checkpoint(block, *args, use_reentrant=False, preserve_rng_state=False)
        return block(*args)

    if chosen:
        transformer.enable_gradient_checkpointing(run)
    else:
        transformer.disable_gradient_checkpointing()


def compile_blocks(blocks: Iterable[torch.nn.Module]) -> None:
    """Regional compilation: blocks of one class share what is compiled, which takes seconds, the whole model a minute.

    Every size is compiled by itself when it is first used; beyond MAX_COMPILED_SIZES the rest runs as it would without.
    What comes out differs from that in its last bits.
    """
    limit = torch._dynamo.config
    limit.recompile_limit = max(limit.recompile_limit, MAX_COMPILED_SIZES)
    for block in blocks:
        block.compile(dynamic=False)
