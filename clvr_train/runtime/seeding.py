"""Randomness by position: a draw depends on what it is for, not on the batch, the rank or the world size."""

import hashlib
import json
import math
import random
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor


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


def rng_state() -> dict[str, Tensor]:
    """Where the global generators of this process stand (torch, CUDA's current device, numpy, python), as tensors."""
    state = {"torch": torch.get_rng_state()}
    if torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    drawn = np.random.get_state(legacy=False)
    words = [*drawn["state"]["key"].tolist(), drawn["state"]["pos"], drawn["has_gauss"], drawn["gauss"]]
    state["numpy"] = torch.tensor(words, dtype=torch.float64)  # exact: the words have 32 bits
    version, words, gauss = random.getstate()
    state["python"] = torch.tensor([version, *words, math.nan if gauss is None else gauss], dtype=torch.float64)
    return state


def set_rng_state(state: Mapping[str, Tensor]) -> None:
    """The inverse of `rng_state`; a generator that the state does not have is left as it is."""
    if "torch" in state:
        torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    if "numpy" in state:
        *key, position, has_gauss, gauss = state["numpy"].tolist()
        np.random.set_state(("MT19937", np.array(key, dtype=np.uint32), int(position), int(has_gauss), gauss))
    if "python" in state:
        version, *words, gauss = state["python"].tolist()
        random.setstate((int(version), tuple(map(int, words)), None if math.isnan(gauss) else gauss))
