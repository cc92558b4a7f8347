"""Frozen encoders see a thing once: encoded texts and images are remembered, and kept in a cache where there is one."""

import hashlib
import logging
import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from clvr_train.data.cache import Description, TensorCache, bytes_on_disk, readable
from clvr_train.data.images import (
    PREPROCESSING_VERSION,
    image_name,
    image_size,
    open_image,
    reference_pixels,
    reference_size,
    target_pixels,
)
from clvr_train.method.trajectory import ImageLike, StoredImage
from clvr_train.models.klein import ENCODING_VERSION, Klein, encode_images, encode_text, fingerprint

logger = logging.getLogger(__name__)

# So many things are encoded together on a CPU, always: copies of the first fill up. A state then does not depend on its
# company (tests hold that), as it does in its last bits where the number changes; and small models would take 2 to 3
# times as long one by one. Kernels of accelerators may sum by position, and there one long text fills the device.
GROUP = 4


class Picture(NamedTuple):
    """An image to encode: as a reference, or as a target of (height, width) px."""

    image: ImageLike
    target_px: tuple[int, int] | None = None


class View(NamedTuple):
    """What preprocessing makes of an image: a `reference`, a `target`, or what is both, the `whole` as it is."""

    kind: str
    size_px: tuple[int, int]


class Memory:
    """Values by key, as many as `limit_bytes` hold; the oldest go first."""

    def __init__(self, limit_bytes: float) -> None:
        self.limit_bytes, self.used_bytes = limit_bytes, 0
        self._values: dict[tuple, tuple[object, int]] = {}

    def get(self, key: tuple) -> object | None:
        return self._values.get(key, (None, 0))[0]

    def drop(self, key: tuple) -> None:
        self.used_bytes -= self._values.pop(key, (None, 0))[1]

    def put(self, key: tuple, value: object, num_bytes: int) -> None:
        self.drop(key)
        if num_bytes > self.limit_bytes:
            return
        while self.used_bytes + num_bytes > self.limit_bytes:
            self.drop(next(iter(self._values)))
        self._values[key] = value, num_bytes
        self.used_bytes += num_bytes


class Encoder:
    """The frozen parts of a Klein model, with memory and cache. What it gives is the same bit for bit with and without.

    Args:
        cache: where encoded images are kept; `cache_texts`: and the states of texts.
        memory_gb: of encoded things held in memory.

    Counters: `text_calls`, `image_calls` (things that had to be encoded, not batches).
    """

    def __init__(
        self, klein: Klein, *, cache: TensorCache | None = None, cache_texts: bool = False, memory_gb: float = 8.0
    ) -> None:
        self.klein = klein
        self.memory = Memory(memory_gb * 1e9)
        self.text_calls = self.image_calls = 0
        self._group = GROUP if klein.device.type == "cpu" else 1
        self._image_cache, self._text_cache = cache, cache if cache_texts else None
        self._image_encoder: Description = {}
        self._text_encoder: Description = {}
        if self._image_cache:
            self._image_encoder = {
                "kind": "image",
                "encoder": fingerprint(klein.folder, ("vae",)),
                "dtype": str(klein.vae.dtype),
                "encoding": ENCODING_VERSION,
                "preprocessing": PREPROCESSING_VERSION,
            }
        if self._text_cache:
            self._text_encoder = {
                "kind": "text",
                "encoder": fingerprint(klein.folder, ("text_encoder", "tokenizer")),  # the chat template included
                "dtype": f"{klein.text_encoder.dtype}, {klein.transformer.dtype}",
                "encoding": ENCODING_VERSION,
                "window": klein.window,
                "layers": klein.layers,
            }

    def texts(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """The state (W, J) of every text, on the CPU; all fit the window."""
        found = {text: self._known_text(text) for text in dict.fromkeys(texts)}
        return found | self._encode_texts([text for text, state in found.items() if state is None])

    def pictures(self, pictures: Sequence[Picture]) -> list[Tensor]:
        """The tokens (n, C) of every picture, on the CPU.

        Raises:
            ImageError: as `data.images.open_image` and `check_size`.
        """
        distinct = {self.key(picture): picture for picture in pictures}
        found = {key: self._known_picture(picture) for key, picture in distinct.items()}
        missing = [key for key, tokens in found.items() if tokens is None]
        found |= zip(missing, self._encode_pictures([distinct[key] for key in missing]), strict=True)
        return [found[self.key(picture)] for picture in pictures]

    def view(self, picture: Picture) -> View:
        """How the picture is preprocessed, from the header of its file."""
        given = self.given_size(picture.image)
        size_px = picture.target_px or reference_size(given, self.klein.token_px)
        return View("whole" if size_px == given else "target" if picture.target_px else "reference", size_px)

    def prime(
        self,
        texts: Iterable[str],
        pictures: Iterable[Picture],
        progress: Callable[[list], Iterable] = iter,
        share: Callable[[list], list] = list,
    ) -> None:
        """Encodes ahead what the cache lacks; of what is not cached, all that memory holds, or nothing if it is less.

        Args:
            progress: wraps the list of what is to do, as tqdm does.
            share: of what several processes write into one cache, the part of this one. What was missing is listed
                before it is called.

        Raises:
            ImageError: as `pictures`. OSError: the disk has no room for what is missing; nothing is written then.
        """
        texts = [text for text in dict.fromkeys(texts) if not self._keeps_text(text)]
        pictures = sorted(self._not_kept(pictures), key=lambda picture: self.view(picture).size_px)
        self.check_disk(len(texts), list(map(self._picture_bytes, pictures)))
        in_memory = 0 if self._text_cache else self._text_bytes * len(texts)
        in_memory += 0 if self._image_cache else sum(map(self._picture_bytes, pictures))
        if in_memory > self.memory.limit_bytes:
            logger.warning(
                "what is not cached takes %s, memory holds %s: it is encoded anew whenever it is used",
                readable(in_memory), readable(self.memory.limit_bytes),
            )  # fmt: skip
            texts = texts if self._text_cache else []
            pictures = pictures if self._image_cache else []
        of_texts = [partial(self._encode_texts, part) for part in _parts(texts, self._group)]
        of_pictures = [partial(self._encode_pictures, part) for part in _parts(pictures, self._group)]
        of_texts = share(of_texts) if self._text_cache else of_texts
        of_pictures = share(of_pictures) if self._image_cache else of_pictures
        for encode in progress(of_texts + of_pictures):
            encode()

    def check_disk(self, num_texts: int, image_bytes: Sequence[int]) -> None:
        """States what will be written of so many texts, and of images of so many bytes each.

        Raises:
            OSError: it does not fit.
        """
        num_texts = num_texts if self._text_cache else 0
        if not self._image_cache or not num_texts + len(image_bytes):
            return
        total = num_texts * bytes_on_disk(self._text_bytes) + sum(map(bytes_on_disk, image_bytes))
        largest = max(image_bytes, default=0)
        free = self._image_cache.free_bytes()
        what = (
            f"{num_texts} texts of {readable(self._text_bytes)} and {len(image_bytes)} images of up to"
            f" {readable(largest)}: {readable(total)} to write, {readable(free)} free"
        )
        if total > free:
            raise OSError(f"{self._image_cache.folder}: {what}; free space, choose another folder, or keep no texts")
        logger.info("%s: %s", self._image_cache.folder, what)

    @property
    def _text_bytes(self) -> int:
        transformer = self.klein.transformer
        return self.klein.window * transformer.config.joint_attention_dim * transformer.dtype.itemsize

    def _picture_bytes(self, picture: Picture) -> int:
        num_tokens = math.prod(self.klein.grid(self.view(picture).size_px))
        return num_tokens * self.klein.transformer.config.in_channels * self.klein.vae.dtype.itemsize

    def given_size(self, image: ImageLike) -> tuple[int, int]:
        """(height, width) in px of an image, from the header of its file, which is read once."""
        if not isinstance(image, (Path, StoredImage)):
            return image_size(image)
        key = "size", _identity(image)
        size_px = self.memory.get(key)
        if size_px is None:
            size_px = image_size(image)
            self.memory.put(key, size_px, 200)
        return size_px

    def key(self, picture: Picture) -> tuple:
        """What tells a picture from others, while the process lives."""
        return "image", _identity(picture.image), self.view(picture)

    def _text_description(self, text: str) -> Description:
        return {**self._text_encoder, "sha256": hashlib.sha256(text.encode()).hexdigest()}

    def _image_description(self, picture: Picture, digest: str) -> Description:
        view = self.view(picture)
        return {**self._image_encoder, "sha256": digest, "view": view.kind, "size_px": view.size_px}

    def _keeps_text(self, text: str) -> bool:
        if self._text_cache:
            return self._text_cache.has(self._text_description(text))
        return self.memory.get(("text", text)) is not None

    def _not_kept(self, pictures: Iterable[Picture]) -> list[Picture]:
        distinct = {self.key(picture): picture for picture in pictures}
        if not self._image_cache:
            return [picture for key, picture in distinct.items() if self.memory.get(key) is None]
        paths = {self._image_path(picture): picture for picture in distinct.values()}
        return [picture for path, picture in paths.items() if not path.is_file()]

    def _image_path(self, picture: Picture) -> Path:
        return self._image_cache.path(self._image_description(picture, _held(picture.image)[0]))

    def _known_text(self, text: str) -> Tensor | None:
        state = self.memory.get(("text", text))
        if state is None and self._text_cache:
            state = self._text_cache.get(self._text_description(text))
            if state is not None:
                self._remember_text(text, state)
        return state

    def _known_picture(self, picture: Picture) -> Tensor | None:
        known = self.memory.get(self.key(picture))
        if known is not None or not self._image_cache:
            return known and known[0]
        tokens = self._image_cache.get(self._image_description(picture, _held(picture.image)[0]))
        if tokens is not None:
            self._remember_picture(picture, tokens)
        return tokens

    def _remember_text(self, text: str, state: Tensor) -> None:
        self.memory.put(("text", text), state, state.nbytes)

    def _remember_picture(self, picture: Picture, tokens: Tensor) -> None:
        """A decoded image is known by its identity, so that its tokens go when the object does."""
        key, alive = self.key(picture), None
        if not isinstance(picture.image, (Path, StoredImage)):
            alive = weakref.ref(picture.image, lambda _: self.memory.drop(key))
        self.memory.put(key, (tokens, alive), tokens.nbytes)

    def _encode_texts(self, texts: Sequence[str]) -> dict[str, Tensor]:
        states = {}
        for part in _parts(texts, self._group):
            self.text_calls += len(part)
            encoded = self._together(partial(encode_text, self.klein), part)
            states |= zip(part, encoded, strict=True)
        for text, state in states.items():
            if self._text_cache:
                self._text_cache.put(self._text_description(text), state)
            self._remember_text(text, state)
        return states

    def _encode_pictures(self, pictures: Sequence[Picture]) -> list[Tensor]:
        by_size: dict[tuple[int, int], list[int]] = {}
        for index, picture in enumerate(pictures):
            by_size.setdefault(self.view(picture).size_px, []).append(index)
        tokens: dict[int, Tensor] = {}
        for same in by_size.values():
            for part in _parts(same, self._group):
                tokens |= zip(part, self._encode_same([pictures[i] for i in part]), strict=True)
        return [tokens[index] for index in range(len(pictures))]

    def _encode_same(self, pictures: Sequence[Picture]) -> list[Tensor]:
        """Tokens of at most a group of pictures of one size. What is hashed and what is decoded are the same bytes."""
        held = [_held(p.image) if self._image_cache else ("", p.image) for p in pictures]
        pixels = [self._pixels(p._replace(image=image)) for p, (_, image) in zip(pictures, held, strict=True)]
        self.image_calls += len(pictures)
        encoded = self._together(lambda group: encode_images(self.klein, torch.stack(group)), pixels)
        for picture, (digest, _), tokens in zip(pictures, held, encoded, strict=True):
            if self._image_cache:
                self._image_cache.put(self._image_description(picture, digest), tokens)
            self._remember_picture(picture, tokens)
        return encoded

    def _pixels(self, picture: Picture) -> Tensor:
        if picture.target_px:
            return target_pixels(picture.image, picture.target_px)
        return reference_pixels(picture.image, self.klein.token_px)

    def _together(self, encode: Callable[[list], Tensor], items: Sequence) -> list[Tensor]:
        """Encodes at most a group, filled up with copies; what is given back holds no storage of the others."""
        filled = [*items, *[items[0]] * (self._group - len(items))]
        return [one.clone(memory_format=torch.contiguous_format) for one in encode(filled)[: len(items)].cpu()]


def _parts(items: Sequence, size: int) -> Iterator[Sequence]:
    return (items[start : start + size] for start in range(0, len(items), size))


def _identity(image: ImageLike) -> Path | str | int:
    if isinstance(image, Path):
        return image
    return image.name if isinstance(image, StoredImage) else id(image)


def _held(image: ImageLike) -> tuple[str, ImageLike]:
    """SHA-256 of the image's encoded bytes, or of its pixels if it has none, and the image that those are."""
    if isinstance(image, (Path, StoredImage)):
        content = image.read() if isinstance(image, StoredImage) else image.read_bytes()
        return hashlib.sha256(content).hexdigest(), StoredImage(image_name(image), lambda: content)
    rgb = open_image(image)
    return hashlib.sha256(f"{rgb.size}".encode() + rgb.tobytes()).hexdigest(), rgb
