from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from clvr_train.data.images import ImageError, check_image, open_image, to_image, to_tensor


def test_transparency_lies_on_white(tmp_path: Path) -> None:
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    Image.new("LA", (4, 4), (0, 128)).save(tmp_path / "half.png")
    assert open_image(tmp_path / "clear.png").getpixel((0, 0)) == (255, 255, 255)
    assert open_image(tmp_path / "half.png").getpixel((0, 0)) == (127, 127, 127)


def test_exif_turn_is_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (6, 3)).save(tmp_path / "turned.jpg", exif=exif)
    assert open_image(tmp_path / "turned.jpg").size == (3, 6)


def test_cmyk_palette_and_16_bit_become_rgb(tmp_path: Path) -> None:
    Image.new("CMYK", (8, 8), (0, 0, 0, 0)).save(tmp_path / "cmyk.jpg")
    Image.new("RGB", (8, 8), (255, 0, 0)).quantize(2).save(tmp_path / "palette.png")
    Image.fromarray(np.full((8, 8), 65535, dtype=np.uint16)).save(tmp_path / "deep.png")
    images = [open_image(tmp_path / name) for name in ("cmyk.jpg", "palette.png", "deep.png")]
    assert {image.mode for image in images} == {"RGB"}
    assert [image.getpixel((0, 0)) for image in images] == [(255, 255, 255), (255, 0, 0), (255, 255, 255)]


def test_pixel_cap_holds_before_decoding(tmp_path: Path) -> None:
    Image.new("RGB", (64, 64)).save(tmp_path / "whole.png")
    # A header without its pixels: an attempt to decode would fail with another message.
    (tmp_path / "head.png").write_bytes((tmp_path / "whole.png").read_bytes()[:60])
    with pytest.raises(ImageError, match=r"head.png: 64 x 64 px is more than the 100 px"):
        open_image(tmp_path / "head.png", max_pixels=100)


def test_unusable_files_are_named(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "blue")]
    frames[0].save(tmp_path / "film.gif", save_all=True, append_images=frames[1:])
    (tmp_path / "text.png").write_text("no image")
    Image.effect_noise((64, 64), 50).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:1000])
    Image.new("F", (4, 4)).save(tmp_path / "float.tiff")
    reasons = {"film.gif": "animated", "text.png": "not an image", "cut.png": "unreadable",
               "float.tiff": "mode F", "none.png": "no such file"}
    for name, reason in reasons.items():
        with pytest.raises(ImageError, match=f"{name}: .*{reason}"):
            open_image(tmp_path / name)
    check_image(tmp_path / "cut.png")  # the header is sound
    with pytest.raises(ImageError, match="animated"):
        check_image(tmp_path / "film.gif")


def test_tensor_round_trip_is_exact() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8)
    tensor = to_tensor(Image.fromarray(pixels))
    assert tensor.shape == (3, 16, 24) and tensor.dtype == torch.float32 and tensor.abs().max() <= 1
    assert np.array_equal(np.asarray(to_image(tensor)), pixels)
