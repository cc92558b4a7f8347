"""From samples to what the transformer is conditioned on: text states, reference tokens, position ids.

Frozen encoders need to see a thing once: text states and image tokens are remembered, and every encoder call is
counted.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from clvr_train.data.images import open_image, to_tensor
from clvr_train.method.trajectory import ImageLike, Sample
from clvr_train.method.truncation import fit_trace
from clvr_train.models.klein import Klein, count_tokens, encode_images, encode_text, image_ids, text_ids


@dataclass(frozen=True)
class Conditioning:
    """A batch of conditions of one bucket. B samples, W text tokens, N target tokens, R reference tokens.

    `text` (B, W, J); `references` (B, R, C) or None; `image_ids` (N + R, 4); `text_ids` (W, 4).
    """

    text: Tensor
    references: Tensor | None
    image_ids: Tensor
    text_ids: Tensor
    num_target: int


def predict_velocity(transformer: torch.nn.Module, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
    """The velocity of the target's tokens, (B, N, C), at x_t (B, N, C) and times t (B,) in [0, 1]."""
    batch = x_t.shape[0]
    hidden = x_t if cond.references is None else torch.cat([x_t, cond.references], dim=1)
    out = transformer(
        hidden_states=hidden.to(cond.text.dtype),
        timestep=t.to(cond.text.dtype),
        guidance=None,
        encoder_hidden_states=cond.text,
        txt_ids=cond.text_ids.expand(batch, -1, -1),
        img_ids=cond.image_ids.expand(batch, -1, -1),
        return_dict=False,
    )[0]
    return out[:, : cond.num_target]


class Conditioner:
    """Encodes samples for one Klein model.

    Args:
        size_px: (height, width) of the images that are drawn.
        memory: how many texts and how many images are remembered (the oldest goes first).

    Counters: `text_calls`, `image_calls` (things encoded, not batches), `texts_cut` and `tokens_cut` (overflow).
    """

    def __init__(self, klein: Klein, size_px: tuple[int, int], memory: int = 20_000) -> None:
        if any(side % klein.token_px for side in size_px):
            raise ValueError(f"size {size_px} px: both sides must be multiples of {klein.token_px}")
        self.klein = klein
        self.size_px = size_px
        self.grid = klein.grid(size_px)
        self.memory = memory
        self.text_calls = self.image_calls = self.texts_cut = self.tokens_cut = 0
        self._texts: dict[str, Tensor] = {}
        self._images: dict[tuple[str, int], tuple[ImageLike, Tensor, tuple[int, int]]] = {}
        self._fitted: dict[tuple, str] = {}

    def fitted_text(self, sample: Sample) -> str:
        """The sample's trace within the text window; what had to be cut is counted once a sample."""
        key = (*sample.key, sample.goal, sample.reasonings)
        if key not in self._fitted:
            klein = self.klein
            text, cut = fit_trace(sample.goal, sample.reasonings, lambda s: count_tokens(klein, s), klein.window)
            self.texts_cut += cut > 0
            self.tokens_cut += cut
            _remember(self._fitted, key, text, self.memory)
        return self._fitted[key]

    def text(self, texts: Sequence[str]) -> Tensor:
        """Text states (B, W, J) of texts that fit the window; each distinct text is encoded once, by itself."""
        found = {}
        for text in texts:
            if text not in self._texts and text not in found:
                self._encode_texts([text])
            found.setdefault(text, self._texts.get(text))
        return torch.stack([found[text] for text in texts])

    def image(self, trajectory_id: str, number: int, image: ImageLike) -> tuple[Tensor, tuple[int, int]]:
        """Tokens (n, C) and grid of image `number` (from 1) of a trajectory; each is encoded once, by itself."""
        key = (trajectory_id, number)
        known = self._images.get(key)
        if known is None or not (known[0] is image or isinstance(image, Path) and known[0] == image):
            self._encode_images([key], [image])
        _, tokens, grid = self._images[key]
        return tokens, grid

    def _encode_images(self, keys: list[tuple[str, int]], images: Sequence[ImageLike]) -> None:
        pixels = [self._cropped(key, image) for key, image in zip(keys, images, strict=True)]
        for size in dict.fromkeys(p.shape for p in pixels):
            same = [i for i, p in enumerate(pixels) if p.shape == size]
            self.image_calls += len(same)
            tokens = encode_images(self.klein, torch.stack([pixels[i] for i in same]))
            for i, encoded in zip(same, tokens, strict=True):
                _remember(self._images, keys[i], (images[i], encoded, self.klein.grid(tuple(size[1:]))), self.memory)

    def _cropped(self, key: tuple[str, int], image: ImageLike) -> Tensor:
        """Pixels (3, H, W), the centre crop whose sides are multiples of a token, as upstream crops references."""
        pixels = to_tensor(open_image(image))
        px = self.klein.token_px
        height, width = (side // px * px for side in pixels.shape[1:])
        if not height or not width:
            raise ValueError(f"image {key[1]} of {key[0]!r}: {tuple(pixels.shape[1:])} px, at least {px} a side")
        top, left = (pixels.shape[1] - height) // 2, (pixels.shape[2] - width) // 2
        return pixels[:, top : top + height, left : left + width]

    def prime(self, samples: Sequence[Sample], chunk: int = 64) -> None:
        """Encodes every text and image of a fixed list of samples in chunks whose make-up depends on the list alone.

        A state differs in its last bits with the batch that it was encoded in, so a resumed run must encode in the same
        batches: prime with the same list, or leave it and have every text and image encoded by itself.
        """
        self.memory = max(self.memory, 2 * len(samples) + 1)
        texts = list(dict.fromkeys(["", *(self.fitted_text(sample) for sample in samples)]))
        for start in range(0, len(texts), chunk):
            self._encode_texts(texts[start : start + chunk])
        images: dict[tuple[str, int], ImageLike] = {}
        for sample in samples:
            images |= {(sample.trajectory_id, n): image for n, image in enumerate(sample.references, start=1)}
            if sample.target is not None:
                images[sample.key] = sample.target
        keys = list(images)
        for start in range(0, len(keys), chunk):
            part = keys[start : start + chunk]
            self._encode_images(part, [images[key] for key in part])

    def _encode_texts(self, texts: list[str]) -> None:
        self.text_calls += len(texts)
        for text, state in zip(texts, encode_text(self.klein, texts), strict=True):
            _remember(self._texts, text, state, self.memory)

    def target(self, sample: Sample) -> Tensor:
        """Tokens (N, C) of the sample's target image."""
        if sample.target is None:
            raise ValueError(f"sample {sample.key}: has no target image")
        tokens, grid = self.image(sample.trajectory_id, sample.step, sample.target)
        if grid != self.grid:
            raise ValueError(f"sample {sample.key}: target of {grid} tokens, this run draws {self.grid}")
        return tokens

    def bucket(self, sample: Sample) -> tuple:
        """Samples with the same bucket can share a forward: the same grids of references, in order."""
        numbered = enumerate(sample.references, start=1)
        return tuple(self.image(sample.trajectory_id, number, image)[1] for number, image in numbered)

    def batch(self, samples: Sequence[Sample], drop_text: Sequence[bool] | None = None) -> Conditioning:
        """Conditions of samples of one bucket. Where `drop_text` holds, the text is empty; references stay."""
        grids = {self.bucket(sample) for sample in samples}
        if len(grids) != 1:
            raise ValueError(f"samples of {len(grids)} buckets in one batch")
        drop_text = drop_text or [False] * len(samples)
        texts = ["" if drop else self.fitted_text(s) for s, drop in zip(samples, drop_text, strict=True)]
        references = None
        if samples[0].references:
            tokens = [
                torch.cat([self.image(s.trajectory_id, n, image)[0] for n, image in enumerate(s.references, start=1)])
                for s in samples
            ]
            references = torch.stack(tokens)
        device = self.klein.device
        ids = image_ids(self.grid, grids.pop()).to(device)
        num_target = self.grid[0] * self.grid[1]
        return Conditioning(self.text(texts), references, ids, text_ids(self.klein.window).to(device), num_target)

    def without_text(self, cond: Conditioning) -> Conditioning:
        """The unconditional branch of guidance: the empty prompt, references kept (as upstream)."""
        empty = self.text([""]).expand(cond.text.shape[0], -1, -1)
        return Conditioning(empty, cond.references, cond.image_ids, cond.text_ids, cond.num_target)


def by_bucket(conditioner: Conditioner, samples: Sequence[Sample], limit: int) -> list[list[int]]:
    """Indices of samples grouped by bucket, at most `limit` together, in order of first appearance."""
    buckets: dict[tuple, list[int]] = {}
    for index, sample in enumerate(samples):
        buckets.setdefault(conditioner.bucket(sample), []).append(index)
    return [indices[i : i + limit] for indices in buckets.values() for i in range(0, len(indices), limit)]


def _remember(memory: dict, key: object, value: object, limit: int) -> None:
    if len(memory) >= limit:
        memory.pop(next(iter(memory)))
    memory[key] = value
