"""A benchmark of held-out goals with GenEval's six tags, graded by the exact reader."""

from PIL.Image import Image

from clvr_train.shapes.goals import TAGS, sizes_of, tagged_goals
from clvr_train.shapes.language import parse_goal
from clvr_train.shapes.render import read_scene
from clvr_train.shapes.world import match, passes


def benchmark_goals(n: int, seed: int = 0) -> list[tuple[str, str, int]]:
    """(tag, goal text, number of things): `n` goals of the eval split in equal shares of the tags.

    The four tags that can have three or more things give half of all goals such a number. Goals are distinct
    up to about n = 260; beyond that the tags with few goals repeat theirs, as GenEval draws several images of
    a prompt.
    """
    goals = []
    for position, tag in enumerate(TAGS):
        share = n // len(TAGS) + (position < n % len(TAGS))
        deck = _deck(sizes_of(tag))
        taken = 0
        while taken < share:
            streams = {size: tagged_goals("eval", seed, tag, size) for size in sizes_of(tag)}
            while taken < share and streams:
                size = deck[taken % len(deck)]
                size = size if size in streams else next(iter(streams))
                text = next(streams[size], None)
                if text is None:
                    del streams[size]
                else:
                    goals.append((tag, text, size))
                    taken += 1
    return goals


def _deck(sizes: tuple[int, ...]) -> list[int]:
    """The order in which sizes are dealt."""
    large, small = [s for s in sizes if s >= 3], [s for s in sizes if s < 3]
    if not large:
        return small
    deck = []
    for i in range(len(large) * max(1, len(small))):
        deck.append(large[i % len(large)])
        if i % 3 == 2:
            deck.append(small[(i // 3) % len(small)])
    return deck


def grade(goal_text: str, image: Image) -> tuple[bool, float]:
    """Whether the picture passes (goal met, everything confidently read), and its partial score in [0, 1]."""
    goal, seen = parse_goal(goal_text), read_scene(image)
    return passes(goal, seen), match(goal, seen)
