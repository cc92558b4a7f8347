"""Bytes to pixels: the one way in which an image enters the project, and tensors back to pixels."""

import struct
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from clvr_train.method.trajectory import ImageLike

# 7000 x 7000 is far beyond what the models take, and below Pillow's own warning (89 million).
MAX_PIXELS = 50_000_000
_UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)


class ImageError(ValueError):
    """An image cannot be used; the message names the file, where there is one, and the reason."""


def open_image(image: ImageLike, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The image as a decoded RGB image of its own: turned as EXIF says, transparency flattened on white.

    Raises:
        ImageError: if the file is missing, is no image, is damaged, is animated, has a mode without a range
            (32-bit integers or floats), or has more than `max_pixels`, known from the header before decoding.
    """
    if isinstance(image, Path):
        return _open_file(image, max_pixels)
    return _to_rgb(_checked(image, "image", max_pixels))


def check_image(path: Path, max_pixels: int = MAX_PIXELS) -> None:
    """Read the header only. Raises `ImageError` as `open_image` does, except for damage in the pixels."""
    try:
        with Image.open(path) as image:
            _checked(image, str(path), max_pixels)
    except ImageError:
        raise
    except _UNREADABLE as error:
        raise ImageError(f"{path}: {_reason(error)}") from error


def _open_file(path: Path, max_pixels: int) -> Image.Image:
    try:
        with Image.open(path) as image:
            _checked(image, str(path), max_pixels).load()
            return _to_rgb(image)
    except ImageError:
        raise
    except _UNREADABLE as error:
        raise ImageError(f"{path}: {_reason(error)}") from error


def _reason(error: BaseException) -> str:
    if isinstance(error, FileNotFoundError):
        return "no such file"
    if isinstance(error, Image.UnidentifiedImageError):
        return "not an image"
    return f"unreadable image ({' '.join(str(error).split())})"


def _checked(image: Image.Image, name: str, max_pixels: int) -> Image.Image:
    if image.width * image.height > max_pixels:
        size = f"{image.width} x {image.height} px"
        raise ImageError(f"{name}: {size} is more than the {max_pixels} px allowed; resize it")
    if getattr(image, "n_frames", 1) > 1:
        raise ImageError(f"{name}: an animated image ({image.n_frames} frames); save one frame")
    if image.mode in ("I", "F"):
        raise ImageError(f"{name}: mode {image.mode} has no fixed range; save it with 8 bits a channel")
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
