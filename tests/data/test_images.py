from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.pipelines.flux2.image_processor import Flux2ImageProcessor
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from clvr_train.data.images import (
    ImageError,
    check_image,
    image_size,
    open_image,
    reference_image,
    reference_pixels,
    reference_size,
    target_image,
    target_pixels,
    to_image,
    to_tensor,
)
from clvr_train.method.trajectory import StoredImage


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


def test_what_needs_a_program_is_not_opened_whatever_its_name(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("subprocess.check_call", lambda *args, **options: pytest.fail(f"{args}"))
    for name in ("drawing.eps", "drawing.png"):
        noise(64, 64).save(tmp_path / name, "EPS")
        for opened in (open_image, check_image):
            with pytest.raises(ImageError, match=f"{name}: not an image in JPEG, PNG, ") as error:
                opened(tmp_path / name)
            assert error.value.rule == "not_an_image"


def test_a_phones_picture_is_its_first_frame(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    path, plain = tmp_path / "phone.jpg", tmp_path / "plain.jpg"
    noise(80, 70).save(path, "MPO", save_all=True, append_images=[noise(40, 35)], exif=exif)
    noise(80, 70).save(plain, "JPEG", exif=exif)
    stored = StoredImage("tar:1:image", partial(Path.read_bytes, path), lambda limit: path.read_bytes()[:limit])
    with Image.open(path) as opened:
        assert (opened.format, opened.n_frames) == ("MPO", 2)
    assert image_size(path) == image_size(stored) == (80, 70)
    assert np.array_equal(open_image(path), open_image(plain)) and np.array_equal(open_image(stored), open_image(plain))


def test_tensor_round_trip_is_exact() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8)
    tensor = to_tensor(Image.fromarray(pixels))
    assert tensor.shape == (3, 16, 24) and tensor.dtype == torch.float32 and tensor.abs().max() <= 1
    assert np.array_equal(np.asarray(to_image(tensor)), pixels)


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("size", [(96, 96), (101, 75), (64, 512), (1024, 1024), (1200, 1000), (3000, 400), (999, 2100)])
def test_references_are_those_of_the_upstream_pipeline(size: tuple[int, int]) -> None:
    """`Flux2KleinPipeline.__call__`, step 4, pixel by pixel."""
    image, processor = noise(*size), Flux2ImageProcessor(vae_scale_factor=16)
    processor.check_image_input(image)
    upstream = image
    if size[0] * size[1] > 1024 * 1024:
        upstream = processor._resize_to_target_area(image, 1024 * 1024)
    width, height = (side // 16 * 16 for side in upstream.size)
    upstream = processor.preprocess(upstream, height=height, width=width, resize_mode="crop")[0]
    ours = reference_pixels(image)
    assert torch.equal(((ours + 1) * 127.5).round(), ((upstream + 1) * 127.5).round())
    assert torch.allclose(ours, upstream, atol=1e-6)
    assert reference_size((size[1], size[0])) == tuple(ours.shape[1:])


@pytest.mark.parametrize("size", [(63, 200), (200, 63), (64, 513), (2000, 249), (64, 512), (1600, 200)])
def test_sizes_are_refused_where_upstream_refuses_them(size: tuple[int, int]) -> None:
    image, upstream = Image.new("RGB", size), Flux2ImageProcessor(vae_scale_factor=16)
    refused = False
    try:
        upstream.check_image_input(image)
    except ValueError:
        refused = True
    for preprocess in (reference_image, lambda image: target_image(image, (64, 64))):
        if refused:
            with pytest.raises(ImageError, match=rf"{size[0]} x {size[1]} px") as error:
                preprocess(image)
            assert error.value.rule == ("small_side" if min(size) < 64 else "aspect")
        else:
            preprocess(image)


def test_an_image_that_fits_keeps_its_pixels() -> None:
    image = noise(96, 96)
    assert torch.equal(target_pixels(image, (96, 96)), to_tensor(image))
    assert torch.equal(reference_pixels(image, 32), to_tensor(image))
    wide = noise(130, 70)
    assert torch.equal(reference_pixels(wide, 32), to_tensor(wide)[:, 3:67, 1:129])


@given(
    width=st.integers(64, 300),
    height=st.integers(64, 300),
    size=st.tuples(st.sampled_from([64, 96, 160]), st.sampled_from([64, 96, 160])),
)
@settings(max_examples=30, deadline=None)
def test_targets_have_the_asked_size_and_nothing_is_squeezed(width: int, height: int, size: tuple[int, int]) -> None:
    """A ramp that rises by its place: the middle stays in the middle, and a pixel is as wide as it is high."""
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    image = Image.fromarray(np.stack([x * 255 // width, y * 255 // height, 0 * x], axis=-1).astype(np.uint8))
    drawn = np.asarray(target_image(image, size), dtype=float)
    assert drawn.shape == (*size, 3)
    assert drawn[..., 0].mean() == pytest.approx(127, abs=3) and drawn[..., 1].mean() == pytest.approx(127, abs=3)
    middle = np.s_[8:-8, 8:-8]  # the resampling is another at the borders
    step_x = np.diff(drawn[..., 0], axis=1)[middle].mean() * width
    step_y = np.diff(drawn[..., 1], axis=0)[middle].mean() * height
    assert step_x == pytest.approx(step_y, rel=0.1)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_sizes_by_header_are_those_of_the_pixels(tmp_path: Path, kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "turned.jpg"  # the name does not matter
    noise(80, 70).save(path, kind, exif=exif)
    stored = StoredImage("tar:1:image", partial(Path.read_bytes, path))
    opened = open_image(path)
    assert image_size(path) == image_size(stored) == (opened.height, opened.width)
    assert opened.size == ((70, 80) if orientation > 4 else (80, 70))
    assert image_size(opened) == (opened.height, opened.width)  # it is not turned twice
    assert np.array_equal(open_image(opened), opened)


def test_a_png_that_is_turned_behind_its_pixels_stays_as_its_header_says(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "late.png"
    noise(80, 70).save(path, exif=exif)
    data = path.read_bytes()
    at = data.index(b"eXIf") - 4
    end = at + 12 + int.from_bytes(data[at : at + 4], "big")
    path.write_bytes(data[:at] + data[end:-12] + data[at:end] + data[-12:])
    assert image_size(path) == (70, 80) and open_image(path).size == (80, 70)
