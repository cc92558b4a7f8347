"""The reader is the exact inverse of the renderer, bears mild blur and believes no noise."""

import numpy as np
from hypothesis import given, settings
from PIL import Image, ImageFilter
from strategies import scenes

from clvr_train.shapes.render import confident_scene, read_scene, read_scenes, render
from clvr_train.shapes.world import COLOURS, SHAPES, SeenThing, Thing


def test_every_thing_in_every_cell_is_read_with_certainty():
    wanted = [Thing(shape, colour, cell) for shape in SHAPES for colour in COLOURS for cell in range(9)]
    for thing, read in zip(wanted, read_scenes([render((thing,)) for thing in wanted]), strict=True):
        assert read == (SeenThing(thing.shape, thing.colour, thing.cell, 1.0),)


@settings(max_examples=50)
@given(scenes)
def test_scenes_are_read_back_also_through_mild_blur(scene):
    image = render(scene)
    assert image.size == (96, 96) and image.tobytes() == render(scene[::-1]).tobytes()
    assert confident_scene(image) == scene
    assert confident_scene(image.filter(ImageFilter.GaussianBlur(1.5))) == scene
    assert confident_scene(image.resize((192, 192))) == scene


def test_empty_canvas_and_noise_hold_nothing():
    assert read_scene(render(())) == ()
    rng = np.random.default_rng(0)
    for _ in range(20):
        noise = Image.fromarray(rng.integers(0, 256, (96, 96, 3), dtype=np.uint8))
        assert confident_scene(noise) == ()


def test_confidence_falls_smoothly_as_a_thing_fades():
    thing = (Thing("square", "blue", 4),)
    fades = [Image.blend(render(thing), render(()), amount) for amount in np.linspace(0, 1, 201)]
    sure = [max((seen.confidence for seen in read_scene(image)), default=0.0) for image in fades]
    assert sure[0] == 1.0 and sure[-1] == 0.0
    assert max(abs(a - b) for a, b in zip(sure, sure[1:], strict=False)) < 0.06
    half_drawn = read_scene(fades[100])
    assert all(seen.confidence < 0.5 for seen in half_drawn)
