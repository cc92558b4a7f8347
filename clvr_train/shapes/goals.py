"""Goals by GenEval tag and number of things, in three splits that no goal shares.

The split of a goal is decided by a hash of its canonical form (`world.canonical`), so two wordings of the
same goal are always in the same split: train 60 %, rl 20 %, eval 20 %.
"""

import hashlib
from collections.abc import Iterator
from random import Random

from clvr_train.shapes.language import describe, parse_goal, tokens, write_goal
from clvr_train.shapes.layout import sample_scene
from clvr_train.shapes.world import (
    CELLS,
    COLOURS,
    MAX_THINGS,
    RELATIONS,
    SHAPES,
    Goal,
    Scene,
    Spec,
    Thing,
    canonical,
)

SPLITS = ("train", "rl", "eval")
TAG_SIZES = {
    "single_object": (1,),
    "two_object": (2,),
    "counting": (2, 3, 4, 5),
    "colors": (1, 2, 3, 4, 5),
    "position": (2, 3, 4, 5),
    "color_attr": (2, 3, 4, 5),
}
TAGS = tuple(TAG_SIZES)
MAX_GOAL_WORDS = 22
_TRIES = 10_000


def split_of(goal: Goal) -> str:
    """The split that this goal, however worded, belongs to."""
    bucket = hashlib.sha256(canonical(goal).encode()).digest()[0] % 10
    return "train" if bucket < 6 else "rl" if bucket < 8 else "eval"


def sizes_of(tag: str) -> tuple[int, ...]:
    """Numbers of things that goals of the tag have.

    Raises:
        ValueError: for an unknown tag.
    """
    if tag not in TAG_SIZES:
        raise ValueError(f"tag {tag!r} is not one of {', '.join(TAGS)}")
    return TAG_SIZES[tag]


def sample_goal(tag: str, num_things: int, rng: Random, split: str) -> str:
    """The text of one random goal of the split.

    Raises:
        ValueError: for an unknown tag or split, or a number of things that the tag does not have.
    """
    if split not in SPLITS:
        raise ValueError(f"split {split!r} is not one of {', '.join(SPLITS)}")
    if num_things not in sizes_of(tag):
        raise ValueError(f"goals of tag {tag!r} have {sizes_of(tag)} things, not {num_things}")
    for _ in range(_TRIES):
        goal = _BUILDERS[tag](num_things, rng)
        try:
            text = write_goal(goal)
        except ValueError:  # an ambiguous reference: draw again
            continue
        if len(tokens(text)) <= MAX_GOAL_WORDS and split_of(goal) == split and sample_scene(goal, rng):
            return text
    raise ValueError(f"no goal of tag {tag!r} with {num_things} things found in split {split!r}")


def sample_goals(
    split: str, n: int, seed: int, tags: tuple[str, ...] = TAGS, sizes: tuple[int, ...] = (1, 2, 3, 4, 5)
) -> list[str]:
    """`n` goal texts in equal shares of the numbers of things, and of the tags that have that number."""
    rng = Random(f"goals {split} {seed}")
    usable = [size for size in sizes if any(size in sizes_of(tag) for tag in tags)]
    if not usable:
        raise ValueError(f"no goal of tags {tags} has {sizes} things")
    goals = []
    for i in range(n):
        size = usable[i % len(usable)]
        fitting = [tag for tag in tags if size in TAG_SIZES[tag]]
        goals.append(sample_goal(fitting[(i // len(usable)) % len(fitting)], size, rng, split))
    rng.shuffle(goals)
    return goals


def _ban(rng: Random, i: int, chance: float) -> tuple[tuple[int, str], ...]:
    return ((i, rng.choice(COLOURS)),) if rng.random() < chance else ()


def _single_object(n: int, rng: Random) -> Goal:
    cell = rng.randrange(9) if rng.random() < 0.7 else None
    return Goal((Spec(1, rng.choice(SHAPES), None, cell),), (), _ban(rng, 0, 0.5))


def _two_object(n: int, rng: Random) -> Goal:
    specs = tuple(
        Spec(1, shape, None, rng.randrange(9) if rng.random() < 0.3 else None)
        for shape in rng.sample(SHAPES, 2)
    )
    return Goal(specs, (), _ban(rng, 0, 0.25) + _ban(rng, 1, 0.25))


def _groups(n: int, rng: Random) -> list[int]:
    """Counts of one or two groups that sum to n."""
    first = rng.randint(1, n)
    counts = [first, n - first] if first < n else [n]
    rng.shuffle(counts)
    return counts


def _counting(n: int, rng: Random) -> Goal:
    counts = _groups(n, rng)
    while max(counts) == 1:
        counts = _groups(n, rng)
    shapes = rng.sample(SHAPES, len(counts))
    specs = tuple(Spec(count, shape) for count, shape in zip(counts, shapes, strict=True))
    bans = [ban for i, count in enumerate(counts) if count > 1 for ban in _ban(rng, i, 0.5)]
    return Goal(specs, (), tuple(bans))


def _colors(n: int, rng: Random) -> Goal:
    counts = _groups(n, rng)
    specs = []
    for count, colour in zip(counts, rng.sample(COLOURS, len(counts)), strict=True):
        shape = rng.choice(SHAPES) if rng.random() < 0.9 else None
        cell = rng.randrange(9) if n == 1 and rng.random() < 0.4 else None
        specs.append(Spec(count, shape, colour, cell))
    bans = [(i, rng.choice(SHAPES)) for i, spec in enumerate(specs) if spec.shape is None]
    return Goal(tuple(specs), (), tuple(bans))


def _position(n: int, rng: Random) -> Goal:
    specs, relations = [], []
    coloured = rng.random() < (0.8 if n < 4 else 0.3)
    for i in range(n):
        cell = None
        if i and rng.random() < 0.6:
            kind = rng.choice(RELATIONS)
            relations.append((i, kind, i - 1) if rng.random() < 0.5 else (i - 1, kind, i))
        elif rng.random() < 0.6 or (n == 2 and i):
            cell = rng.randrange(9)
        specs.append(Spec(1, rng.choice(SHAPES), rng.choice(COLOURS) if coloured else None, cell))
    return Goal(tuple(specs), tuple(relations))


def _color_attr(n: int, rng: Random) -> Goal:
    colours = rng.sample(COLOURS, n)
    specs = tuple(Spec(1, rng.choice(SHAPES), colour) for colour in colours)
    relations = ()
    if n > 2 and rng.random() < 0.4:
        i = rng.randrange(1, n)
        relations = ((i, rng.choice(RELATIONS), i - 1),)
    return Goal(specs, relations)


_BUILDERS = {
    "single_object": _single_object,
    "two_object": _two_object,
    "counting": _counting,
    "colors": _colors,
    "position": _position,
    "color_attr": _color_attr,
}


def random_scene(rng: Random, num_things: int | None = None) -> Scene:
    """Things of random shape and colour in random cells, in the order of cells."""
    n = num_things or rng.randint(1, MAX_THINGS)
    cells = sorted(rng.sample(range(len(CELLS)), n))
    return tuple(Thing(rng.choice(SHAPES), rng.choice(COLOURS), cell) for cell in cells)


def train_scene(rng: Random, num_things: int | None = None) -> Scene:
    """A random scene whose full description is a goal of the train split."""
    while True:
        scene = random_scene(rng, num_things)
        if split_of(parse_goal(describe(scene))) == "train":
            return scene


def tagged_goals(split: str, seed: int, tag: str, num_things: int) -> Iterator[str]:
    """Distinct goals of one tag and number of things, without end as long as there are any."""
    rng = Random(f"tagged {split} {seed} {tag} {num_things}")
    known: set[str] = set()
    misses = 0
    while misses < 300:
        text = sample_goal(tag, num_things, rng, split)
        key = canonical(parse_goal(text))
        misses = misses + 1 if key in known else 0
        if key not in known:
            known.add(key)
            yield text
