"""What the small models are first trained on: captions for the drawing model, texts for the tokenizer and
encoder."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from random import Random

from clvr_train.method.truncation import trace
from clvr_train.shapes.controller import make_trajectories, mutate
from clvr_train.shapes.edits import write_edits
from clvr_train.shapes.goals import sample_goals, train_scene
from clvr_train.shapes.language import describe, goal_of, list_things, parse_goal
from clvr_train.shapes.layout import repair, sample_scene
from clvr_train.shapes.world import Scene

KINDS = ("description", "goal", "edit")


@dataclass(frozen=True)
class Caption:
    """A text and the scene it asks for; for an edit, `source` is the scene of the one reference image."""

    kind: str
    text: str
    scene: Scene
    source: Scene | None = None


def captions(n: int, seed: int, weights: Mapping[str, float] | None = None) -> Iterator[Caption]:
    """`n` random captions of three kinds: full descriptions, plain goals, edits with one reference.

    Goals and descriptions are of the train split only, so no held-out goal is ever seen.

    Args:
        weights: of the kinds "description", "goal", "edit"; alike by default.
    """
    weights = weights or dict.fromkeys(KINDS, 1.0)
    if set(weights) != set(KINDS) or min(weights.values()) < 0 or sum(weights.values()) <= 0:
        raise ValueError(f"kinds {dict(weights)}: a weight of at least 0 for each of {', '.join(KINDS)}, not all 0")
    rng = Random(f"captions {seed}")
    goals = iter(sample_goals("train", n, seed))
    makers = {"description": _description, "edit": _edit, "goal": lambda _: _goal(next(goals), rng)}
    for kind in rng.choices(KINDS, [weights[kind] for kind in KINDS], k=n):
        yield makers[kind](rng)


def _description(rng: Random) -> Caption:
    """The full description, now and then in the compact form that reports use."""
    scene = train_scene(rng)
    return Caption("description", describe(scene) if rng.random() < 0.7 else list_things(scene), scene)


def _goal(text: str, rng: Random) -> Caption:
    scene = sample_scene(parse_goal(text), rng)
    return Caption("goal", text, tuple(sorted(scene, key=lambda thing: thing.cell)))


def _edit(rng: Random) -> Caption:
    """One edit that leads from a random scene to a slightly different one."""
    while True:
        target = train_scene(rng)
        source = tuple(sorted(mutate(target, rng), key=lambda thing: thing.cell))
        edits = repair(goal_of(target), source, rng)
        if source and len(edits) == 1:
            return Caption("edit", write_edits(edits), target, source)


def documents(n: int, seed: int) -> list[str]:
    """`n` texts as an encoder meets them: captions, and whole traces of trajectories, in which attributes recur."""
    texts = [caption.text for caption in captions(n // 2, seed)]
    for trajectory in make_trajectories(n - len(texts), seed):
        texts.append(trace(trajectory.goal, [step.reasoning for step in trajectory.steps]))
    return texts
