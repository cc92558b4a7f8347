"""Images as encoded bytes: what the writers put into a file."""

import functools
import io
from pathlib import Path

from clvr_train.data.images import ImageError, check_size, image_name, open_image, open_still
from clvr_train.data.records import FieldError
from clvr_train.method.trajectory import ImageLike, StoredImage, Trajectory

_SUFFIXES = {"JPEG": "jpg", "MPO": "jpg", "JPEG2000": "jp2", "TIFF": "tif"}


def in_memory(name: str, content: bytes) -> StoredImage:
    """A pointer to bytes that are here already."""
    return StoredImage(name, functools.partial(bytes, content))


def encoded(image: ImageLike) -> tuple[bytes, str]:
    """The bytes of an image and the ending of a file that holds them.

    A pointer's bytes are given as they are, once they are seen to decode; a decoded image becomes a PNG.

    Raises:
        ImageError: as `open_image` and `check_size`, without which readers would refuse it.
    """
    name = image_name(image)
    if isinstance(image, (Path, StoredImage)):
        try:
            content = image.read() if isinstance(image, StoredImage) else image.read_bytes()
        except FileNotFoundError as error:
            raise ImageError(f"{name}: no such file", "missing_image") from error
        check_size(open_image(in_memory(name, content)).size[::-1], name)
        with open_still(io.BytesIO(content)) as opened:
            kind = opened.format
        return content, _SUFFIXES.get(kind, kind.lower())
    buffer, opened = io.BytesIO(), open_image(image)
    check_size(opened.size[::-1], name)
    opened.save(buffer, format="PNG")
    return buffer.getvalue(), "png"


def encoded_images(trajectory: Trajectory) -> list[tuple[bytes, str]]:
    """Bytes and ending of every image of a trajectory, in order.

    Raises:
        FieldError: naming the step whose image cannot be read or is of no use.
    """
    result = []
    for number, step in enumerate(trajectory.steps, start=1):
        if step.image is not None:
            try:
                result.append(encoded(step.image))
            except ImageError as error:
                raise FieldError(f"steps[{number}].image", str(error), error.rule) from error
    return result
