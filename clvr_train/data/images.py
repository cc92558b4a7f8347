"""Bytes to pixels: the one preprocessing of training, rollouts and judges, and tensors back to pixels.

Every image goes through `open_image` (EXIF, transparency, colour). What is drawn is then `target_image` (a set size),
what is looked at `reference_image`, which shrinks and crops as `diffusers.Flux2KleinPipeline` does with its `image`
argument (0.42.1, `pipelines/flux2/image_processor.py`).
"""

import contextlib
import hashlib
import io
import json
import math
import struct
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from torch import Tensor

from clvr_train.data.records import one_line
from clvr_train.method.trajectory import ImageLike, Sample, StoredImage

# What is opened, known by its first bytes. Pillow's other formats are films, icons and documents, and to read EPS it
# would run Ghostscript. Phones write JPEGs with a preview behind the picture, which it calls MPO.
FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "JPEG2000", "GIF", "BMP", "TIFF", "PPM")
# 7000 x 7000 is far beyond what the models take, and below Pillow's own warning (89 million).
MAX_PIXELS = 50_000_000
# What is below or beyond these, upstream refuses as a reference.
MIN_SIDE_PX, MAX_ASPECT = 64, 8
REFERENCE_AREA_PX = 1024 * 1024
# A part of the key of everything that is cached of an image: raise it when any pixel below comes out differently.
PREPROCESSING_VERSION = 1
_HEAD_BYTES = 65_536
_TOO_LARGE = (Image.DecompressionBombError, Image.DecompressionBombWarning)  # Pillow's own, before ours
# What Pillow raises on damaged bytes; the last five come of its readers of TIFF and AVIF, among others.
UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, struct.error, *_TOO_LARGE)
UNREADABLE += (TypeError, IndexError, KeyError, OverflowError, RuntimeError)


class ImageError(ValueError):
    """An image cannot be used; the message names the file, where there is one, and the reason.

    `rule` is the short code of the reason, as in `docs/data_format.md`.
    """

    def __init__(self, message: str, rule: str = "unreadable_image") -> None:
        super().__init__(one_line(message))
        self.rule = rule


def open_still(source: Path | io.BytesIO) -> Image.Image:
    """The image, not decoded, if it is in one of `FORMATS`: the one place where files are opened. Raises as Pillow."""
    return Image.open(source, formats=FORMATS)


def open_image(image: ImageLike, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The image as a decoded RGB image of its own: turned as EXIF says, transparency flattened on white.

    Raises:
        ImageError: if the file is missing, is no image, is damaged, is animated, has a mode without a range
            (32-bit integers or floats), or has more than `max_pixels`, known from the header before decoding.
    """
    if isinstance(image, (Path, StoredImage)):
        return _open_file(image, max_pixels)
    return _to_rgb(_checked(image, image_name(image), max_pixels))


def check_image(image: Path | StoredImage, max_pixels: int = MAX_PIXELS) -> None:
    """Read the header only. Raises `ImageError` as `open_image` does, except for damage in the pixels."""
    image_size(image, max_pixels)


def image_size(image: ImageLike, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """(height, width) in px that `open_image` will give, from the header alone.

    Raises:
        ImageError: as `open_image`, except for damage in the pixels.
    """
    if not isinstance(image, (Path, StoredImage)):
        return _turned_size(_checked(image, image_name(image), max_pixels))
    name = image_name(image)
    try:
        with _open_header(image) as opened:
            return _turned_size(_checked(opened, name, max_pixels))
    except ImageError:
        raise
    except UNREADABLE as error:
        raise _unreadable(name, error) from error


def image_name(image: ImageLike) -> str:
    """What stands for the image in messages."""
    if isinstance(image, Image.Image):
        return "image"
    return image.name if isinstance(image, StoredImage) else str(image)


def _open_file(image: Path | StoredImage, max_pixels: int) -> Image.Image:
    name = image_name(image)
    try:
        with open_still(_encoded(image)) as opened:
            orientation(_checked(opened, name, max_pixels))
            opened.load()
            return _to_rgb(opened)
    except ImageError:
        raise
    except UNREADABLE as error:
        raise _unreadable(name, error) from error


def _open_header(image: Path | StoredImage) -> Image.Image:
    """The image, not decoded; of a stored PNG or JPEG no more than its first bytes are read where they suffice."""
    if isinstance(image, StoredImage) and image.head is not None:
        head = image.head(_HEAD_BYTES)
        if head.startswith((b"\x89PNG", b"\xff\xd8")):  # other formats count their frames over the whole file
            with contextlib.suppress(*UNREADABLE):
                return open_still(io.BytesIO(head))
    return open_still(_encoded(image))


def _encoded(image: Path | StoredImage) -> Path | io.BytesIO:
    return io.BytesIO(image.read()) if isinstance(image, StoredImage) else image


def _unreadable(name: str, error: BaseException) -> ImageError:
    if isinstance(error, FileNotFoundError):
        return ImageError(f"{name}: no such file", "missing_image")
    if isinstance(error, Image.UnidentifiedImageError):
        return ImageError(f"{name}: not an image in {', '.join(FORMATS)}", "not_an_image")
    rule = "too_many_pixels" if isinstance(error, _TOO_LARGE) else "unreadable_image"
    return ImageError(f"{name}: unreadable image ({' '.join(str(error).split())})", rule)


def _checked(image: Image.Image, name: str, max_pixels: int) -> Image.Image:
    if image.width * image.height > max_pixels:
        size = f"{image.width} x {image.height} px"
        raise ImageError(f"{name}: {size} is more than the {max_pixels} px allowed; resize it", "too_many_pixels")
    if image.format != "MPO" and getattr(image, "n_frames", 1) > 1:  # an MPO is its first frame
        raise ImageError(f"{name}: an animated image ({image.n_frames} frames); save one frame", "animated")
    if image.mode in ("I", "F"):
        raise ImageError(f"{name}: mode {image.mode} has no fixed range; save it with 8 bits a channel", "mode")
    return image


def orientation(image: Image.Image) -> int:
    """The EXIF orientation that the header tells.

    Pillow would decode a whole PNG to look behind its pixels, and would then turn an image whose header tells nothing;
    this call makes it remember what the header says, so that sizes by header and by decoding agree.
    """
    return Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)


def _turned_size(image: Image.Image) -> tuple[int, int]:
    turned = orientation(image) in (5, 6, 7, 8) and image.format != "TIFF"  # Pillow turns TIFF by itself
    return image.size if turned else image.size[::-1]


def _to_rgb(image: Image.Image) -> Image.Image:
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def check_size(size_px: tuple[int, int], name: str = "image") -> None:
    """Refuses what is no use to the models, and what upstream refuses as a reference: (height, width) in px.

    Raises:
        ImageError: for a side under `MIN_SIDE_PX` or an aspect above `MAX_ASPECT`.
    """
    height, width = size_px
    if min(size_px) < MIN_SIDE_PX:
        raise ImageError(f"{name}: {width} x {height} px, at least {MIN_SIDE_PX} a side are needed", "small_side")
    if max(size_px) > MAX_ASPECT * min(size_px):
        raise ImageError(f"{name}: {width} x {height} px, an aspect above {MAX_ASPECT}; crop it", "aspect")


def reference_size(size_px: tuple[int, int], token_px: int = 16) -> tuple[int, int]:
    """(height, width) that `reference_image` makes of an image of `size_px`.

    Raises:
        ValueError: for tokens larger than the smallest image.
    """
    if token_px > MIN_SIDE_PX:
        raise ValueError(f"token_px={token_px}: images may have sides of {MIN_SIDE_PX} px")
    return tuple(side // token_px * token_px for side in _shrunk(size_px))


def reference_image(image: ImageLike, token_px: int = 16) -> Image.Image:
    """What a model or a judge looks at: RGB, shrunk with Lanczos to at most 1024 x 1024 px of area (never enlarged),
    then its centre, cropped to multiples of a token's side.

    Raises:
        ImageError: as `open_image` and `check_size`.
    """
    opened = _usable(image)
    height, width = _shrunk((opened.height, opened.width))
    if (width, height) != opened.size:
        opened = opened.resize((width, height), Image.Resampling.LANCZOS)
    rows, columns = reference_size((opened.height, opened.width), token_px)
    left, top = (width - columns) // 2, (height - rows) // 2
    return opened.crop((left, top, left + columns, top + rows))


def target_image(image: ImageLike, size_px: tuple[int, int]) -> Image.Image:
    """What a model draws: RGB of `size_px` (height, width), resized with Lanczos from the largest part of that aspect
    around the centre, so that nothing is squeezed and no border is added.

    Raises:
        ImageError: as `open_image` and `check_size`.
    """
    return ImageOps.fit(_usable(image), size_px[::-1], Image.Resampling.LANCZOS)


def reference_pixels(image: ImageLike, token_px: int = 16) -> Tensor:
    """`reference_image` as float32 (3, H, W) in [-1, 1]."""
    return to_tensor(reference_image(image, token_px))


def target_pixels(image: ImageLike, size_px: tuple[int, int]) -> Tensor:
    """`target_image` as float32 (3, H, W) in [-1, 1]."""
    return to_tensor(target_image(image, size_px))


def _usable(image: ImageLike) -> Image.Image:
    opened = open_image(image)
    check_size((opened.height, opened.width), image_name(image))
    return opened


def _shrunk(size_px: tuple[int, int]) -> tuple[int, int]:
    scale = math.sqrt(REFERENCE_AREA_PX / math.prod(size_px))
    return size_px if scale >= 1 else tuple(int(side * scale) for side in size_px)


def to_tensor(image: Image.Image) -> Tensor:
    """RGB image to float32 (3, H, W) in [-1, 1]."""
    pixels = torch.from_numpy(np.array(image.convert("RGB"), dtype=np.float32))
    return (pixels / 127.5 - 1.0).permute(2, 0, 1).contiguous()


def to_image(tensor: Tensor) -> Image.Image:
    """(3, H, W) in [-1, 1], values beyond it clipped, to an RGB image; the inverse of `to_tensor`."""
    pixels = ((tensor.detach().float().clamp(-1, 1) + 1.0) * 127.5).round().to(torch.uint8)
    return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())


def sample_hash(sample: Sample, *salt: str) -> str:
    """SHA-256 of what a context holds: goal, reasonings and the pixels of its images, and of what else is given."""
    digest = hashlib.sha256(json.dumps([*salt, sample.goal, *sample.reasonings]).encode())
    for reference in sample.references:
        image = open_image(reference)
        digest.update(f"{image.size}".encode() + image.tobytes())
    return digest.hexdigest()
