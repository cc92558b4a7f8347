"""From samples to what the transformer is conditioned on: text states, reference tokens, position ids."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from clvr_train.data.buckets import Size, nearest_bucket
from clvr_train.data.cache import TensorCache
from clvr_train.method.trajectory import Sample
from clvr_train.method.truncation import fit_trace, trace
from clvr_train.models.encoding import Encoder, Memory, Picture
from clvr_train.models.klein import Klein, count_tokens, image_ids, text_ids

OVERFLOWS = ("cut", "error")
MOST_FILLED = 0.25  # of a mixed batch's tokens: then one forward costs no more than several
FITTED_BYTES = 500e6  # of texts cut to the window, which counting tokens makes dear


@dataclass(frozen=True)
class Conditioning:
    """A batch of conditions of one bucket. B samples, W text tokens, N target tokens, R reference tokens.

    `text` (B, W, J); `references` (B, R, C) or None; `image_ids` (N + R, 4); `text_ids` (W, 4). `mask` (B, W + N + R)
    is False at tokens that fill up a batch of several buckets (`mixed`); None: there are none.
    """

    text: Tensor
    references: Tensor | None
    image_ids: Tensor
    text_ids: Tensor
    num_target: int
    mask: Tensor | None = None


def predict_velocity(transformer: torch.nn.Module, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
    """The velocity of the target's tokens, (B, N, C), at x_t (B, N, C) and times t (B,) in [0, 1]."""
    batch = x_t.shape[0]
    hidden = x_t if cond.references is None else torch.cat([x_t, cond.references], dim=1)
    masked = {} if cond.mask is None else {"joint_attention_kwargs": {"attention_mask": cond.mask[:, None, None]}}
    out = transformer(
        hidden_states=hidden.to(cond.text.dtype),
        timestep=t.to(cond.text.dtype),
        guidance=None,
        encoder_hidden_states=cond.text,
        txt_ids=cond.text_ids.expand(batch, -1, -1),
        img_ids=cond.image_ids.expand(batch, -1, -1),
        return_dict=False,
        **masked,
    )[0]
    return out[:, : cond.num_target]


class Conditioner:
    """Makes conditions of samples for one Klein model.

    Args:
        size_px: (height, width) of the images that are drawn.
        target_sizes: sizes of which a target image is brought to the nearest (`data.buckets.nearest_bucket`) instead.
        overflow: what becomes of a trace that is longer than the text window: `cut` (`method.truncation.fit_trace`) or
            an `error`.
        cache, cache_texts, memory_gb: see `models.encoding.Encoder`.

    Counters: `text_calls`, `image_calls` (things encoded, not batches), `texts_cut` and `tokens_cut` (overflow).
    """

    def __init__(
        self,
        klein: Klein,
        size_px: Size,
        *,
        target_sizes: Sequence[Size] = (),
        overflow: str = "cut",
        cache: TensorCache | None = None,
        cache_texts: bool = False,
        memory_gb: float = 8.0,
    ) -> None:
        for size in (size_px, *target_sizes):
            if any(side % klein.token_px for side in size):
                raise ValueError(f"size {size} px: both sides must be multiples of {klein.token_px}")
        if overflow not in OVERFLOWS:
            raise ValueError(f"model.overflow={overflow!r} is not one of {', '.join(OVERFLOWS)}")
        self.klein, self.overflow = klein, overflow
        self.size_px, self.target_sizes = size_px, target_sizes
        self.encoder = Encoder(klein, cache=cache, cache_texts=cache_texts, memory_gb=memory_gb)
        self.texts_cut = self.tokens_cut = 0
        self._fitted = Memory(FITTED_BYTES)

    @property
    def text_calls(self) -> int:
        return self.encoder.text_calls

    @property
    def image_calls(self) -> int:
        return self.encoder.image_calls

    @property
    def sizes(self) -> Sequence[Size]:
        """The sizes to which targets are brought."""
        return self.target_sizes or (self.size_px,)

    def fitted_text(self, sample: Sample) -> str:
        """The sample's trace within the text window; what had to be cut is counted once a sample.

        Raises:
            ValueError: it is longer, and `overflow` is `error`.
        """
        key = (*sample.key, sample.goal, sample.reasonings)
        text = self._fitted.get(key)
        if text is None:
            klein = self.klein
            text, cut = fit_trace(sample.goal, sample.reasonings, lambda s: count_tokens(klein, s), klein.window)
            if cut and self.overflow == "error":
                where = f"{sample.trajectory_id}: step {sample.step}"
                tokens = count_tokens(klein, trace(sample.goal, sample.reasonings))
                raise ValueError(
                    f"{where}: its text of {tokens} tokens exceeds model.window={klein.window};"
                    " give a longer window, or model.overflow=cut"
                )
            self.texts_cut += cut > 0
            self.tokens_cut += cut
            self._fitted.put(key, text, 4 * len(text))
        return text

    def text(self, texts: Sequence[str]) -> Tensor:
        """Text states (B, W, J) of texts that fit the window; each distinct text is encoded once."""
        found = self.encoder.texts(texts)
        return torch.stack([found[text] for text in texts]).to(self.klein.device)

    def prime(
        self,
        samples: Sequence[Sample],
        progress: Callable[[list], Iterable] = iter,
        share: Callable[[list], list] = list,
    ) -> None:
        """Encodes the texts and images of samples ahead; arguments and errors as `models.encoding.Encoder.prime`."""
        texts = ["", *map(self.fitted_text, samples)]
        pictures = [picture for sample in samples for picture in self._pictures(sample)]
        self.encoder.prime(texts, pictures, progress, share)

    def announce(self, num_samples: int) -> None:
        """States what a cache will hold of samples that are encoded when they are drawn, and checks that it fits.

        Raises:
            OSError: as `models.encoding.Encoder.check_disk`.
        """
        largest = max(map(math.prod, map(self.klein.grid, self.sizes)))
        image_bytes = largest * self.klein.transformer.config.in_channels * self.klein.vae.dtype.itemsize
        self.encoder.check_disk(num_samples, [image_bytes] * num_samples)

    def _pictures(self, sample: Sample) -> list[Picture]:
        """References, then the target."""
        target = [] if sample.target is None else [self._target(sample)]
        return [*map(Picture, sample.references), *target]

    def target(self, sample: Sample) -> Tensor:
        """Tokens (N, C) of the sample's target image."""
        if sample.target is None:
            raise ValueError(f"sample {sample.key}: has no target image")
        return self.encoder.pictures([self._target(sample)])[0].to(self.klein.device)

    def _target(self, sample: Sample) -> Picture:
        size_px = self.size_px
        if self.target_sizes and sample.target is not None:
            size_px = nearest_bucket(self.encoder.given_size(sample.target), self.target_sizes)
        return Picture(sample.target, size_px)

    def grid(self, sample: Sample) -> tuple[int, int]:
        """Rows and columns of tokens of the image that is drawn for a sample."""
        return self.klein.grid(self._target(sample).target_px)

    def bucket(self, sample: Sample) -> tuple[tuple[int, int], ...]:
        """Samples with the same bucket can share a forward: the same grids of the target and of the references, in
        order.
        """
        references = (self.encoder.view(Picture(image)).size_px for image in sample.references)
        return self.grid(sample), *map(self.klein.grid, references)

    def batch(self, samples: Sequence[Sample], drop_text: Sequence[bool] | None = None) -> Conditioning:
        """Conditions of samples of one bucket. Where `drop_text` holds, the text is empty; references stay."""
        buckets = {self.bucket(sample) for sample in samples}
        if len(buckets) != 1:
            raise ValueError(f"samples of {len(buckets)} buckets in one batch")
        grid, *grids = buckets.pop()
        drop_text = drop_text or [False] * len(samples)
        texts = ["" if drop else self.fitted_text(s) for s, drop in zip(samples, drop_text, strict=True)]
        device = self.klein.device
        references = None
        if samples[0].references:
            tokens = self.encoder.pictures([Picture(image) for sample in samples for image in sample.references])
            references = torch.cat(tokens).unflatten(0, (len(samples), -1)).to(device)
        ids = image_ids(grid, grids).to(device)
        return Conditioning(self.text(texts), references, ids, text_ids(self.klein.window).to(device), math.prod(grid))

    def without_text(self, cond: Conditioning) -> Conditioning:
        """The unconditional branch of guidance: the empty prompt, references kept (as upstream)."""
        empty = self.text([""]).expand(cond.text.shape[0], -1, -1)
        return replace(cond, text=empty)


def rows(cond: Conditioning, indices: Sequence[int]) -> Conditioning:
    """The conditions of some samples of a batch."""
    picked = torch.tensor(indices, device=cond.text.device)
    references = None if cond.references is None else cond.references[picked]
    mask = None if cond.mask is None else cond.mask[picked]
    return replace(cond, text=cond.text[picked], references=references, mask=mask)


def joined(one: Conditioning, other: Conditioning) -> Conditioning:
    """The conditions of two batches of one bucket, one after the other."""
    references = None if one.references is None else torch.cat([one.references, other.references])
    mask = None if one.mask is None else torch.cat([one.mask, other.mask])
    return replace(one, text=torch.cat([one.text, other.text]), references=references, mask=mask)


def mixed(conds: Sequence[Conditioning]) -> Conditioning:
    """The conditions of batches whose references are each the beginning of the longest one's, one after the other.

    References are filled up to the longest with tokens that `mask` keeps all others from seeing. Positions count from
    the first reference, so those of what is there stay.
    """
    longest = max(conds, key=lambda cond: cond.image_ids.shape[0])
    if longest.references is None:
        return replace(longest, text=torch.cat([cond.text for cond in conds]))
    num, channels = longest.references.shape[1:]
    references, masks = [], []
    for cond in conds:
        size = cond.text.shape[0]
        given = longest.references.new_zeros(size, 0, channels) if cond.references is None else cond.references
        references.append(torch.nn.functional.pad(given, (0, 0, 0, num - given.shape[1])))
        seen = cond.text_ids.shape[0] + cond.image_ids.shape[0]
        masks.append((torch.arange(seen + num - given.shape[1], device=given.device) < seen).expand(size, -1))
    text = torch.cat([cond.text for cond in conds])
    return replace(longest, text=text, references=torch.cat(references), mask=torch.cat(masks))


def by_bucket(conditioner: Conditioner, samples: Sequence[Sample], limit: int) -> list[list[int]]:
    """Indices of samples grouped by bucket, at most `limit` together, in order of first appearance."""
    buckets: dict[tuple, list[int]] = {}
    for index, sample in enumerate(samples):
        buckets.setdefault(conditioner.bucket(sample), []).append(index)
    return [indices[i : i + limit] for indices in buckets.values() for i in range(0, len(indices), limit)]


def by_beginning(conditioner: Conditioner, samples: Sequence[Sample], limit: int) -> list[list[int]]:
    """Indices of samples that can share a `mixed` batch, at most `limit` together: the references of each are the
    beginning of the longest one's, and filling up adds at most the share `MOST_FILLED` of that one's tokens.
    """
    window = conditioner.klein.window
    buckets = [conditioner.bucket(sample) for sample in samples]
    lengths = {bucket: window + sum(map(math.prod, bucket)) for bucket in buckets}
    groups: list[tuple[tuple, list[int]]] = []
    for index in sorted(range(len(samples)), key=lambda index: -len(buckets[index])):
        bucket = buckets[index]
        for longest, indices in groups:
            filled = lengths[longest] - lengths[bucket]
            begins = longest[: len(bucket)] == bucket and filled <= MOST_FILLED * lengths[longest]
            if begins and len(indices) < limit:
                indices.append(index)
                break
        else:
            groups.append((bucket, [index]))
    return [indices for _, indices in groups]
