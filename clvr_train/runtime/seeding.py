"""Randomness by position: a draw depends on what it is for, not on the batch, the rank or the world size."""

import hashlib
import json

import torch


def seed(*position: int | str) -> int:
    """A seed in [0, 2^63) that depends only on the position, say (run seed, trajectory id, step, k).

    `1` and `"1"` differ, and so do `("ab", "c")` and `("a", "bc")`.

    Raises:
        TypeError: a part is neither an integer nor a text (a float's text depends on how it was computed).
    """
    for part in position:
        if not isinstance(part, int | str):
            raise TypeError(f"a position is made of integers and texts, got {part!r} in {position}")
    digest = hashlib.sha256(json.dumps(position).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def generator(*position: int | str) -> torch.Generator:
    """A CPU generator for one position. Draw on the CPU and move: a CUDA generator gives other numbers."""
    return torch.Generator().manual_seed(seed(*position))
