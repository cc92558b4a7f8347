"""Merging the transformers of Klein folders, a few rows of a tensor at a time: none of the models is ever loaded.

The equations are in method/merge.py. A LoRA beside the aligned weights is folded in float32, so that nothing of it is
rounded before the merge.
"""

import hashlib
import json
import math
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from clvr_train.method.merge import DeltaStatistics, check_same_shapes, merge_tensor

KINDS = {"transformer_blocks": "double", "single_transformer_blocks": "single"}  # of blocks, by name upstream
CHUNK = 2**20  # elements worked on at a time: float32 and float64 copies of them are what memory holds
_BLOCK = re.compile(r"(transformer_blocks|single_transformer_blocks)\.(\d+)\.")


class Weights:
    """The tensors of one part of a model folder, by name: in one safetensors file or in several shards.

    Raises:
        FileNotFoundError: no safetensors files. ValueError: one that is damaged, or a tensor that comes twice.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files = sorted(folder.glob("*.safetensors"))
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.shards: dict[str, list[str]] = {}  # names of tensors by file name
        self._where: dict[str, Path] = {}
        if not self.files:
            raise FileNotFoundError(f"{folder}: no safetensors files")
        for file in self.files:
            with _opened(file) as tensors:
                names = self.shards[file.name] = list(tensors.keys())
                for name in names:
                    if name in self.shapes:
                        raise ValueError(f"{file}: {name} is in {self._where[name].name} too")
                    self.shapes[name] = tuple(tensors.get_slice(name).get_shape())
                    self._where[name] = file

    def read(self, name: str, rows: slice = slice(None)) -> Tensor:
        """A tensor, or some of its rows. The file is closed again, and its pages leave memory."""
        with _opened(self._where[name]) as tensors:
            return tensors.get_slice(name)[rows] if self.shapes[name] else tensors.get_tensor(name)

    def chunks(self, name: str) -> Iterator[slice]:
        """Slices of rows of a tensor with about `CHUNK` elements each."""
        shape = self.shapes[name] or (1,)
        step = max(1, CHUNK // max(1, math.prod(shape[1:])))
        return (slice(start, start + step) for start in range(0, shape[0], step))

    def sha256(self) -> str:
        """Over the names and contents of the files."""
        digest = hashlib.sha256()
        for file in self.files:
            with file.open("rb") as opened:
                digest.update(f"{hashlib.file_digest(opened, 'sha256').hexdigest()} {file.name}\n".encode())
        return digest.hexdigest()


class Lora:
    """A LoRA in the `diffusers` format over a transformer: what it adds to a weight is `scale B A`.

    Raises:
        FileNotFoundError, ValueError: as `Weights`; a layer whose A or B is missing; layers that the transformer lacks.
    """

    def __init__(self, folder: Path, transformer: Mapping[str, tuple[int, ...]]) -> None:
        self.weights = Weights(folder)
        with _opened(self.weights.files[0]) as tensors:
            metadata = json.loads((tensors.metadata() or {}).get("lora_adapter_metadata", "{}"))
        try:
            self.scale = metadata["transformer.lora_alpha"] / metadata["transformer.r"]
        except KeyError:
            raise ValueError(f"{folder}: its metadata do not say lora_alpha and r; write it with save_lora") from None
        self.layers: dict[str, tuple[str, str]] = {}  # (A, B) by the name of the weight
        for name in self.weights.shapes:
            stem, _, rest = name.partition(".lora_A.")
            if rest:
                self.layers[stem.removeprefix("transformer.") + ".weight"] = name, f"{stem}.lora_B.{rest}"
        pairs = {name for pair in self.layers.values() for name in pair}
        if odd := sorted(pairs ^ self.weights.shapes.keys()):
            raise ValueError(f"{folder}: {odd[0]}: an A without a B, or the reverse")
        for layer, (a, b) in self.layers.items():
            shape = self.weights.shapes[b][0], self.weights.shapes[a][1]
            if transformer.get(layer) != shape:
                raise ValueError(f"{folder}: {layer} of shape {shape}, the transformer has {transformer.get(layer)}")

    def delta(self, name: str, rows: slice) -> Tensor | float:
        """What is added to some rows of a weight, in float32; 0 where there is no LoRA."""
        if name not in self.layers:
            return 0.0
        a, b = self.layers[name]
        return self.scale * (self.weights.read(b, rows).float() @ self.weights.read(a).float())


class Sources(NamedTuple):
    """The transformers to merge; `lora` goes over `aligned`."""

    base: Weights
    distilled: Weights
    aligned: Weights
    lora: Lora | None = None

    def parts(self) -> dict[str, Weights]:
        """By name, those that are there."""
        parts = {"base": self.base, "distilled": self.distilled, "aligned": self.aligned}
        return parts | ({"lora": self.lora.weights} if self.lora else {})


def open_sources(base: Path, distilled: Path, aligned: Path, lora: Path | None = None) -> Sources:
    """Opens the transformers of three Klein folders, and sees that they can be merged.

    Raises:
        FileNotFoundError: a file is missing. ValueError: tensors that differ in name or shape, or another text encoder
            or VAE than the base's; names them.
    """
    sources = {"distilled": distilled, "aligned": aligned}
    first = Weights(base / "transformer")
    others = {name: Weights(folder / "transformer") for name, folder in sources.items()}
    for name, folder in sources.items():
        check_same_shapes(first.shapes, others[name].shapes, f"{folder / 'transformer'} ({name})")
        for part in ("text_encoder", "vae"):
            _check_equal(base / part, folder / part)
    return Sources(first, others["distilled"], others["aligned"], lora and Lora(lora, first.shapes))


def merge_transformers(
    sources: Sources, alpha_distill: float, alpha_align: float, target: Path, dtype: torch.dtype | None = None
) -> dict:
    """Writes the merged transformer into the folder `target`, in the shards of the base, and reports the deltas.

    Args:
        dtype: of what is written; None: that of the base's tensors.

    Returns:
        `DeltaStatistics.report` of the whole in `total`, of the `kinds` of blocks, and of each of the `blocks`.
    """
    statistics = {"total": DeltaStatistics()}
    target.mkdir(parents=True)
    for shard, names in sources.base.shards.items():
        merged: dict[str, Tensor] = {}
        for name in names:
            for rows in sources.base.chunks(name):
                part = _merged_rows(sources, name, rows, alpha_distill, alpha_align, statistics, dtype)
                if name not in merged:
                    merged[name] = torch.empty(sources.base.shapes[name], dtype=part.dtype)
                merged[name][rows if part.ndim else ...] = part
        save_file(merged, target / shard, metadata={"format": "pt"})
    _write_index(sources.base, target)
    shutil.copy(sources.base.folder / "config.json", target)
    kinds = {name: part.report() for name, part in statistics.items() if name in (*KINDS.values(), "outside")}
    blocks = {name: part.report() for name, part in statistics.items() if name not in ("total", *kinds)}
    return {"total": statistics["total"].report(), "kinds": kinds, "blocks": blocks}


def _merged_rows(
    sources: Sources,
    name: str,
    rows: slice,
    alpha_distill: float,
    alpha_align: float,
    statistics: dict[str, DeltaStatistics],
    dtype: torch.dtype | None,
) -> Tensor:
    w, d = sources.base.read(name, rows), sources.distilled.read(name, rows)
    a = sources.aligned.read(name, rows)
    if sources.lora is not None:
        a = a.float() + sources.lora.delta(name, rows)
    match = _BLOCK.match(name)
    for place in ("total", KINDS[match[1]], f"{match[1]}.{match[2]}") if match else ("total", "outside"):
        statistics.setdefault(place, DeltaStatistics()).add(w, d, a)
    return merge_tensor(w, d, a, alpha_distill, alpha_align).to(dtype or w.dtype)


def _write_index(base: Weights, target: Path) -> None:
    """The index of several shards; sizes are those of what was written."""
    for index in base.folder.glob("*.safetensors.index.json"):
        content = json.loads(index.read_text(encoding="utf-8"))
        content["metadata"] = {"total_size": sum(path.stat().st_size for path in target.glob("*.safetensors"))}
        (target / index.name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _check_equal(base: Path, other: Path) -> None:
    ours, theirs = Weights(base), Weights(other)
    check_same_shapes(ours.shapes, theirs.shapes, str(other))
    for name in ours.shapes:
        if any(not ours.read(name, rows).equal(theirs.read(name, rows)) for rows in ours.chunks(name)):
            raise ValueError(f"{other}: {name} differs from that of {base}; only transformers are merged")


def _opened(file: Path) -> "safe_open":
    try:
        return safe_open(file, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{file}: not a whole safetensors file ({error})") from error
