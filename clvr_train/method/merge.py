"""Delta-space weight merge: `W = W_base + a_d (W_distill - W_base) + a_a (W_align - W_base)` (CLVR 3.4, A.1)."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


def check_same_shapes(
    base: Mapping[str, tuple[int, ...]], other: Mapping[str, tuple[int, ...]], name: str
) -> None:
    """Raises ValueError naming the first tensors in which `other` differs from `base` by key or shape."""
    missing = sorted(base.keys() - other.keys())
    extra = sorted(other.keys() - base.keys())
    if missing or extra:
        raise ValueError(
            f"{name}: {len(missing)} tensors missing, e.g. {missing[:2]}; {len(extra)} unknown, e.g. {extra[:2]}"
        )
    for key, shape in base.items():
        if other[key] != shape:
            raise ValueError(f"{name}: {key} has shape {other[key]}, base has {shape}")


def merge_tensor(
    base: Tensor, distilled: Tensor, aligned: Tensor, alpha_distill: float = 1.0, alpha_align: float = 1.0
) -> Tensor:
    """One merged tensor in float32. Two zero deltas give the base bit for bit; the deltas add in either order."""
    w = base.float()
    delta = alpha_distill * (distilled.float() - w) + alpha_align * (aligned.float() - w)
    return w + delta


@dataclass
class DeltaStatistics:
    """Running sums over tensors for the relative shifts and the cosine of the two deltas (CLVR A.1), in float64."""

    base_sq: float = 0.0
    distill_sq: float = 0.0
    align_sq: float = 0.0
    dot: float = 0.0

    def add(self, base: Tensor, distilled: Tensor, aligned: Tensor) -> None:
        w = base.double()
        d, a = distilled.double() - w, aligned.double() - w
        self.base_sq += torch.sum(w * w).item()
        self.distill_sq += torch.sum(d * d).item()
        self.align_sq += torch.sum(a * a).item()
        self.dot += torch.sum(d * a).item()

    def report(self) -> dict[str, float]:
        """`shift_distill`, `shift_align` (relative Frobenius norms) and `cosine` of the deltas (0 where one is 0)."""
        norms = math.sqrt(self.distill_sq) * math.sqrt(self.align_sq)
        scale = math.sqrt(self.base_sq)
        if scale == 0.0:
            raise ValueError("the base weights are all zero: no relative shift")
        return {
            "shift_distill": math.sqrt(self.distill_sq) / scale,
            "shift_align": math.sqrt(self.align_sq) / scale,
            "cosine": self.dot / norms if norms > 0 else 0.0,
        }
