"""Exact renderer (scene -> 96 x 96 picture) and exact reader (picture -> things with confidence)."""

from collections.abc import Sequence
from functools import cache, lru_cache

import numpy as np
from PIL import Image, ImageDraw

from clvr_train.shapes.world import COLOURS, SHAPES, Scene, SeenThing

SIZE = 96
CELL = 32
BACKGROUND = (244, 244, 238)
RGB = {
    "red": (214, 40, 40),
    "green": (46, 160, 67),
    "blue": (45, 85, 210),
    "yellow": (245, 208, 35),
    "purple": (140, 60, 175),
    "orange": (240, 128, 28),
}
_OVERSAMPLE = 4
_POOL = 4  # px averaged before comparing: blur below this scale does not matter
_FAINT = 0.1  # belief below which there is no thing at all; confidence starts at 0 there, so it is continuous
_HALF_DISTANCE = 0.13  # rms colour distance (0..1 scale) at which a cell is half believed
_CLEAR_MARGIN = 0.35  # relative margin to the second-best template from which it is fully believed


@cache
def _tile(shape: str, colour: str) -> Image.Image:
    """One antialiased 32 px cell."""
    big = CELL * _OVERSAMPLE
    tile = Image.new("RGB", (big, big), BACKGROUND)
    draw = ImageDraw.Draw(tile)
    low, high = 5 * _OVERSAMPLE, 27 * _OVERSAMPLE - 1
    if shape == "circle":
        draw.ellipse((low, low, high, high), fill=RGB[colour])
    elif shape == "square":
        draw.rectangle((low, low, high, high), fill=RGB[colour])
    else:
        draw.polygon(((big // 2, low), (high, high), (low, high)), fill=RGB[colour])
    return tile.resize((CELL, CELL), Image.Resampling.BOX)


def render(scene: Scene) -> Image.Image:
    """The picture of a scene: 96 x 96 RGB, the same bytes for the same scene."""
    image = Image.new("RGB", (SIZE, SIZE), BACKGROUND)
    for thing in scene:
        row, column = divmod(thing.cell, 3)
        image.paste(_tile(thing.shape, thing.colour), (column * CELL, row * CELL))
    return image


_KINDS = [(shape, colour) for shape in SHAPES for colour in COLOURS]


@lru_cache(maxsize=1)
def _templates() -> np.ndarray:
    """The 18 things and, last, the empty cell: (19, pooled values)."""
    tiles = [_tile(shape, colour) for shape, colour in _KINDS] + [Image.new("RGB", (CELL, CELL), BACKGROUND)]
    return _pool(np.stack([np.asarray(tile) for tile in tiles])[:, None])[:, 0]


def _pool(cells: np.ndarray) -> np.ndarray:
    """(..., 32, 32, 3) uint8 -> (..., values) in 0..1, averaged over squares of `_POOL` px."""
    side = CELL // _POOL
    pooled = cells.reshape(*cells.shape[:-3], side, _POOL, side, _POOL, 3).mean(axis=(-4, -2)) / 255.0
    return pooled.reshape(*cells.shape[:-3], -1)


def read_batch(images: np.ndarray) -> list[tuple[SeenThing, ...]]:
    """Read many pictures at once.

    Args:
        images: (batch, 96, 96, 3) uint8.

    Returns:
        The things of each picture in the order of cells. With d and d2 the rms distances to the best and the
        second-best template (the empty cell included), belief is `1 / (1 + (d / h)^4)` times a smooth step of
        `(d2 - d) / (d2 + d)`, and confidence is belief rescaled so that 0.1 becomes 0. Cells most like empty,
        or without confidence, hold nothing.
    """
    grid = images.reshape(-1, 3, CELL, 3, CELL, 3).transpose(0, 1, 3, 2, 4, 5).reshape(-1, 9, CELL, CELL, 3)
    cells, templates = _pool(grid), _templates()
    squares = (cells**2).sum(-1)[..., None] + (templates**2).sum(-1) - 2 * cells @ templates.T
    distance = np.sqrt(np.maximum(squares, 0.0) / templates.shape[1])
    distance[distance < 1e-6] = 0.0  # rounding of the expanded square
    best = distance.argmin(-1)
    ordered = np.partition(distance, 1, axis=-1)
    first, second = ordered[..., 0], ordered[..., 1]
    step = np.clip((second - first) / (second + first + 1e-12) / _CLEAR_MARGIN, 0.0, 1.0)
    belief = step**2 * (3 - 2 * step) / (1 + (first / _HALF_DISTANCE) ** 4)
    confidence = (belief - _FAINT) / (1 - _FAINT)
    return [
        tuple(
            SeenThing(*_KINDS[kinds[cell]], cell, float(sure[cell]))
            for cell in range(9)
            if kinds[cell] < len(_KINDS) and sure[cell] > 0
        )
        for kinds, sure in zip(best, confidence, strict=True)
    ]


def read_scene(image: Image.Image) -> tuple[SeenThing, ...]:
    """Read one picture; another size is first scaled to 96 x 96."""
    return read_scenes([image])[0]


def read_scenes(images: Sequence[Image.Image]) -> list[tuple[SeenThing, ...]]:
    """Read pictures of any size."""
    if not images:
        return []
    scaled = [
        image if image.size == (SIZE, SIZE) else image.resize((SIZE, SIZE), Image.Resampling.BOX)
        for image in images
    ]
    return read_batch(np.stack([np.asarray(image.convert("RGB")) for image in scaled]))


def confident_scene(image: Image.Image) -> Scene:
    """The things of a picture that were read with confidence of a half or more."""
    return tuple(seen.thing for seen in read_scene(image) if seen.confidence >= 0.5)
