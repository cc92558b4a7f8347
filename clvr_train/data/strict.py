"""What validation asks of an image beyond what training does: that other programs show it, and show it alike."""

import contextlib
import io
import zlib
from pathlib import Path

from PIL import ExifTags

from clvr_train.data.images import UNREADABLE, ImageError, image_name, open_still, orientation
from clvr_train.data.readers import check_pixels
from clvr_train.data.stored import in_memory
from clvr_train.method.trajectory import StoredImage

_MAY_HOLD_EXIF = {b"eXIf", b"tEXt", b"zTXt", b"iTXt"}  # chunks of a PNG: ImageMagick writes EXIF as text


def check_strictly(image: Path | StoredImage) -> None:
    """Refuse also what this project's preprocessing would mend and other programs may not.

    Raises:
        ImageError: as `data.readers.check_pixels`; or for a PNG of damaged chunks, an EXIF orientation, a palette with
            transparency, CMYK.
    """
    if isinstance(image, StoredImage):
        try:
            image = in_memory(image.name, image.read())  # read once
        except OSError as error:
            raise ImageError(f"{image.name}: unreadable image ({error})") from error
    check_pixels(image)
    name, content = image_name(image), image.read() if isinstance(image, StoredImage) else image.read_bytes()
    with open_still(io.BytesIO(content)) as opened:
        turned = orientation(opened)
        if opened.format == "PNG" and _check_chunks(name, content) and turned == 1:
            turned = _orientation_behind(content)
        if turned != 1:
            message = f"{name}: EXIF orientation {turned}; turn the pixels and save it without"
            raise ImageError(message, "exif_rotation")
        if opened.mode in ("P", "PA") and opened.has_transparency_data:
            message = f"{name}: a palette with transparency; lay it on a background and save it as RGB"
            raise ImageError(message, "palette_transparency")
        if opened.mode == "CMYK":
            raise ImageError(f"{name}: CMYK; convert it to sRGB and save it as RGB", "cmyk")


def _check_chunks(name: str, content: bytes) -> bool:
    """Go over the chunks of a PNG to IEND, which Pillow can do without; tell if EXIF may stand behind the pixels.

    Raises:
        ImageError: for a chunk that is cut off; for a wrong checksum of one that a decoder must read (PNG, 5.4).
    """
    at, kind, kinds = 8, b"", []
    while kind != b"IEND":
        end = at + 8 + int.from_bytes(content[at : at + 4])
        kind, checksum = content[at + 4 : at + 8], content[end : end + 4]
        if len(checksum) < 4:
            raise ImageError(f"{name}: a PNG that is cut off before its end (IEND); save it again", "damaged_png")
        if kind[:1].isupper() and int.from_bytes(checksum) != zlib.crc32(memoryview(content)[at + 4 : end]):
            message = f"{name}: a PNG whose chunk {kind.decode('latin-1')} has a wrong checksum; save it again"
            raise ImageError(message, "damaged_png")
        kinds.append(kind)
        at = end + 4
    behind = kinds[len(kinds) - kinds[::-1].index(b"IDAT") :] if b"IDAT" in kinds else kinds
    return not _MAY_HOLD_EXIF.isdisjoint(behind)


def _orientation_behind(content: bytes) -> int:
    """The orientation that Pillow tells of a PNG once it is decoded; 1 of EXIF that cannot be read."""
    with contextlib.suppress(*UNREADABLE), open_still(io.BytesIO(content)) as opened:
        opened.load()
        return opened.getexif().get(ExifTags.Base.Orientation, 1)
    return 1
