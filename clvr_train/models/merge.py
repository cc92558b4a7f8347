"""Merging the transformers of three Klein folders (the equations are in method/merge.py)."""

import hashlib
import re

from diffusers import Flux2Transformer2DModel

from clvr_train.method.merge import DeltaStatistics, check_same_tensors, merge_tensor
from clvr_train.models.klein import Klein, transformer_from

_BLOCK = re.compile(r"(transformer_blocks|single_transformer_blocks)\.(\d+)\.")


def merge_transformers(
    base: Klein, distilled: Klein, aligned: Klein, *, alpha_distill: float, alpha_align: float
) -> tuple[Flux2Transformer2DModel, dict]:
    """The merged transformer (dtype of the base) and a report of shifts and cosine: in `total` and by block.

    Raises:
        ValueError: tensors that differ in name or shape, or another text encoder or VAE than the base's.
    """
    parts = {"distilled": distilled, "aligned": aligned}
    base_state = base.transformer.state_dict()
    states = {name: part.transformer.state_dict() for name, part in parts.items()}
    for name, part in parts.items():
        check_same_tensors(base_state, states[name], f"{part.folder} ({name})")
        for module in ("vae", "text_encoder"):
            _check_equal(base, part, module)
    statistics: dict[str, DeltaStatistics] = {"total": DeltaStatistics()}
    merged = {}
    for key, w in base_state.items():
        d, a = states["distilled"][key], states["aligned"][key]
        match = _BLOCK.match(key)
        block = f"{match[1]}.{match[2]}" if match else "outside"
        for name in ("total", block):
            statistics.setdefault(name, DeltaStatistics()).add(w, d, a)
        merged[key] = merge_tensor(w, d, a, alpha_distill, alpha_align).to(w.dtype)
    transformer = transformer_from(base.transformer.config, merged)
    blocks = {name: part.report() for name, part in statistics.items() if name != "total"}
    return transformer, {"total": statistics["total"].report(), "blocks": blocks}


def file_hash(klein: Klein) -> str:
    """SHA-256 over the transformer's weight files, in name order."""
    digest = hashlib.sha256()
    for path in sorted((klein.folder / "transformer").glob("*.safetensors")):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _check_equal(base: Klein, other: Klein, module: str) -> None:
    ours, theirs = getattr(base, module).state_dict(), getattr(other, module).state_dict()
    if ours.keys() != theirs.keys() or any(not ours[key].equal(theirs[key]) for key in ours):
        raise ValueError(f"{other.folder}/{module}: differs from that of {base.folder}; only transformers are merged")
