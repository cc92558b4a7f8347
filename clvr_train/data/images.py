"""Bytes to pixels: the one way in which an image enters the project, and tensors back to pixels."""

import io
import struct
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from clvr_train.method.trajectory import ImageLike, StoredImage

# 7000 x 7000 is far beyond what the models take, and below Pillow's own warning (89 million).
MAX_PIXELS = 50_000_000
_TOO_LARGE = (Image.DecompressionBombError, Image.DecompressionBombWarning)  # Pillow's own, before ours
_UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, struct.error, *_TOO_LARGE)


class ImageError(ValueError):
    """An image cannot be used; the message names the file, where there is one, and the reason.

    `rule` is the short code of the reason, as in `docs/data_format.md`.
    """

    def __init__(self, message: str, rule: str = "unreadable_image") -> None:
        super().__init__(message)
        self.rule = rule


def open_image(image: ImageLike, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The image as a decoded RGB image of its own: turned as EXIF says, transparency flattened on white.

    Raises:
        ImageError: if the file is missing, is no image, is damaged, is animated, has a mode without a range
            (32-bit integers or floats), or has more than `max_pixels`, known from the header before decoding.
    """
    if isinstance(image, (Path, StoredImage)):
        return _open_file(image, max_pixels)
    return _to_rgb(_checked(image, "image", max_pixels))


def check_image(image: Path | StoredImage, max_pixels: int = MAX_PIXELS) -> None:
    """Read the header only. Raises `ImageError` as `open_image` does, except for damage in the pixels."""
    name = image_name(image)
    try:
        with Image.open(_encoded(image)) as opened:
            _checked(opened, name, max_pixels)
    except ImageError:
        raise
    except _UNREADABLE as error:
        raise _unreadable(name, error) from error


def image_name(image: Path | StoredImage) -> str:
    """What stands for the image in messages."""
    return image.name if isinstance(image, StoredImage) else str(image)


def _open_file(image: Path | StoredImage, max_pixels: int) -> Image.Image:
    name = image_name(image)
    try:
        with Image.open(_encoded(image)) as opened:
            _checked(opened, name, max_pixels).load()
            return _to_rgb(opened)
    except ImageError:
        raise
    except _UNREADABLE as error:
        raise _unreadable(name, error) from error


def _encoded(image: Path | StoredImage) -> Path | io.BytesIO:
    return io.BytesIO(image.read()) if isinstance(image, StoredImage) else image


def _unreadable(name: str, error: BaseException) -> ImageError:
    if isinstance(error, FileNotFoundError):
        return ImageError(f"{name}: no such file", "missing_image")
    if isinstance(error, Image.UnidentifiedImageError):
        return ImageError(f"{name}: not an image", "not_an_image")
    rule = "too_many_pixels" if isinstance(error, _TOO_LARGE) else "unreadable_image"
    return ImageError(f"{name}: unreadable image ({' '.join(str(error).split())})", rule)


def _checked(image: Image.Image, name: str, max_pixels: int) -> Image.Image:
    if image.width * image.height > max_pixels:
        size = f"{image.width} x {image.height} px"
        raise ImageError(f"{name}: {size} is more than the {max_pixels} px allowed; resize it", "too_many_pixels")
    if getattr(image, "n_frames", 1) > 1:
        raise ImageError(f"{name}: an animated image ({image.n_frames} frames); save one frame", "animated")
    if image.mode in ("I", "F"):
        raise ImageError(f"{name}: mode {image.mode} has no fixed range; save it with 8 bits a channel", "mode")
    return image


def _to_rgb(image: Image.Image) -> Image.Image:
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def to_tensor(image: Image.Image) -> Tensor:
    """RGB image to float32 (3, H, W) in [-1, 1]."""
    pixels = torch.from_numpy(np.array(image.convert("RGB"), dtype=np.float32))
    return (pixels / 127.5 - 1.0).permute(2, 0, 1).contiguous()


def to_image(tensor: Tensor) -> Image.Image:
    """(3, H, W) in [-1, 1], values beyond it clipped, to an RGB image; the inverse of `to_tensor`."""
    pixels = ((tensor.detach().float().clamp(-1, 1) + 1.0) * 127.5).round().to(torch.uint8)
    return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())
