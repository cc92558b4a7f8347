"""The shapes world: things in the cells of a 3 x 3 grid, goals, and how well a picture meets a goal.

Convention of the world: a picture shows what its goal names *and nothing else*, so goals are closed. Only a
lenient reading of free text (`edits.read_mentions`) is open: it does not forbid what the text leaves
out.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import permutations

import numpy as np

SHAPES = ("circle", "square", "triangle")
COLOURS = ("red", "green", "blue", "yellow", "purple", "orange")
CELLS = ("top-left", "top", "top-right", "left", "centre", "right", "bottom-left", "bottom", "bottom-right")
RELATIONS = ("left of", "right of", "above", "below")
MAX_THINGS = 5
CONFIDENT = 0.5  # a thing read with less confidence does not count as drawn
_CLUTTER = 6  # more seen things than this and the least confident ones only count as extras


@dataclass(frozen=True, order=True)
class Thing:
    """One shape of one colour in cell 0..8 (row by row from the top-left)."""

    shape: str
    colour: str
    cell: int


@dataclass(frozen=True)
class SeenThing:
    """What the reader makes of one cell; `confidence` in (0, 1]."""

    shape: str
    colour: str
    cell: int
    confidence: float = 1.0

    @property
    def thing(self) -> Thing:
        return Thing(self.shape, self.colour, self.cell)


Scene = tuple[Thing, ...]


@dataclass(frozen=True)
class Spec:
    """`count` things that share what is given of shape, colour and cell. `None` leaves it free."""

    count: int = 1
    shape: str | None = None
    colour: str | None = None
    cell: int | None = None

    def fits(self, thing: Thing | SeenThing) -> bool:
        """Whether the thing has every attribute that is given."""
        return (
            self.shape in (None, thing.shape)
            and self.colour in (None, thing.colour)
            and self.cell in (None, thing.cell)
        )


@dataclass(frozen=True)
class Goal:
    """Specs, relations between specs and negations.

    `relations` holds (i, kind, j): every thing of spec i is `kind` every thing of spec j. `bans` holds (i,
    word): no thing of spec i has that colour or shape. `closed`: the picture shows nothing else.
    """

    specs: tuple[Spec, ...]
    relations: tuple[tuple[int, str, int], ...] = ()
    bans: tuple[tuple[int, str], ...] = ()
    closed: bool = True

    @property
    def num_things(self) -> int:
        return sum(spec.count for spec in self.specs)

def expand(goal: Goal) -> Goal:
    """The same goal with one slot a thing: every spec counts 1, relations and bans are repeated for each."""
    slots: list[Spec] = []
    members: list[range] = []
    for spec in goal.specs:
        members.append(range(len(slots), len(slots) + spec.count))
        slots += [Spec(1, spec.shape, spec.colour, spec.cell)] * spec.count
    relations = tuple((a, kind, b) for i, kind, j in goal.relations for a in members[i] for b in members[j])
    bans = tuple((a, word) for i, word in goal.bans for a in members[i])
    return Goal(tuple(slots), relations, bans, goal.closed)


def holds(kind: str, cell: int, other: int) -> bool:
    """Whether a thing in `cell` is `kind` a thing in `other`; columns count, or rows for above and below."""
    (row, column), (other_row, other_column) = divmod(cell, 3), divmod(other, 3)
    if kind == "left of":
        return column < other_column
    if kind == "right of":
        return column > other_column
    return row < other_row if kind == "above" else row > other_row


@lru_cache(maxsize=64)
def _assignments(slots: int, things: int) -> np.ndarray:
    """Every way to give distinct things to slots, (ways, slots); indices >= things mean: no thing."""
    return np.array(list(permutations(range(max(slots, things)), slots)), dtype=np.int64).reshape(-1, slots)


@dataclass(frozen=True)
class Fit:
    """The best assignment: `score` in [0, 1], `complete` if all is met, and for each slot a thing (or -1)."""

    score: float
    complete: bool
    chosen: tuple[int, ...]


def best_fit(goal: Goal, things: Sequence[Thing | SeenThing]) -> Fit:
    """Assign things to the goal's slots so that the most atoms hold.

    Atoms: presence, and shape, colour and cell where the goal gives them, relations and negations. An atom
    counts the confidence of the things it is about; the score is the mean over atoms. In a closed goal a thing
    too many then costs 1 / (number of things), as much as one too few: whoever is not sure of the number does
    best to draw the likeliest one.
    """
    slots = expand(goal)
    ranked = sorted(things, key=lambda thing: -getattr(thing, "confidence", 1.0))
    order = [things.index(thing) for thing in ranked[:_CLUTTER]]
    seen = [things[i] for i in order]
    n, m = len(slots.specs), len(seen)
    confidence = np.array([getattr(thing, "confidence", 1.0) for thing in seen] + [0.0] * n)
    unary, atoms = np.zeros((n, m + n)), 0
    for s, spec in enumerate(slots.specs):
        banned = [word for i, word in slots.bans if i == s]
        given = [("shape", spec.shape), ("colour", spec.colour), ("cell", spec.cell)]
        wanted = [(name, value) for name, value in given if value is not None]
        atoms += 1 + len(wanted) + len(banned)
        for t, thing in enumerate(seen):
            hits = 1 + sum(getattr(thing, name) == value for name, value in wanted)
            hits += sum(word not in (thing.shape, thing.colour) for word in banned)
            unary[s, t] = hits * confidence[t]
    ways = _assignments(n, m)
    total = unary[np.arange(n), ways].sum(axis=1)
    for i, kind, j in slots.relations:
        table = np.zeros((m + n, m + n))
        for a, first in enumerate(seen):
            for b, second in enumerate(seen):
                table[a, b] = holds(kind, first.cell, second.cell) * confidence[a] * confidence[b]
        total = total + table[ways[:, i], ways[:, j]]
    scores = total / (atoms + len(slots.relations))
    if goal.closed:
        extras = sum(getattr(thing, "confidence", 1.0) for thing in things) - confidence[ways].sum(axis=1)
        scores = scores - np.maximum(extras, 0.0) / n
    best = int(np.argmax(scores))
    score = min(1.0, max(0.0, float(scores[best])))
    chosen = tuple(order[t] if t < m else -1 for t in ways[best])
    return Fit(score, bool(score > 1.0 - 1e-9), chosen)


def satisfied(goal: Goal, scene: Sequence[Thing]) -> bool:
    """Whether the scene meets the goal exactly."""
    return best_fit(goal, tuple(Thing(t.shape, t.colour, t.cell) for t in scene)).complete


def match(goal: Goal, seen: Sequence[SeenThing]) -> float:
    """Partial credit in [0, 1] of what was read from a picture, continuous in the reader's confidence."""
    return best_fit(goal, tuple(seen)).score


def passes(goal: Goal, seen: Sequence[SeenThing]) -> bool:
    """Whether the goal is met and everything seen was read confidently."""
    return all(thing.confidence >= CONFIDENT for thing in seen) and satisfied(goal, seen)


def _slot_key(slots: Goal, s: int) -> tuple:
    """What slot `s` asks for, without bans that its own shape or colour already implies."""
    spec = slots.specs[s]
    bans = sorted(
        word for i, word in slots.bans if i == s and (spec.colour if word in COLOURS else spec.shape) is None
    )
    return spec.shape or "-", spec.colour or "-", -1 if spec.cell is None else spec.cell, tuple(bans)


def canonical(goal: Goal) -> str:
    """A text that two goals share exactly when they ask for the same: free of order, wording and implied
    relations.

    Counts are spread over slots, "right of" and "below" become their converses, relations are closed under
    transitivity and those that given cells imply are dropped, and the slots are put in the least order.
    """
    slots = expand(goal)
    keys = [_slot_key(slots, s) for s in range(len(slots.specs))]
    converse = {"right of": "left of", "below": "above"}
    pairs = {(j, converse[kind], i) if kind in converse else (i, kind, j) for i, kind, j in slots.relations}
    grown = True
    while grown:
        new = {
            (a, kind, d) for a, kind, b in pairs for c, other, d in pairs if b == c and kind == other
        } - pairs
        pairs |= new
        grown = bool(new)
    pairs = {
        (a, kind, b)
        for a, kind, b in pairs
        if keys[a][2] < 0 or keys[b][2] < 0 or not holds(kind, keys[a][2], keys[b][2])
    }
    least = sorted(keys)
    if not pairs:
        return repr((least, [], goal.closed))
    best = None
    for order in permutations(range(len(keys))):
        if [keys[s] for s in order] == least:
            place = {s: position for position, s in enumerate(order)}
            edges = sorted((place[a], kind, place[b]) for a, kind, b in pairs)
            best = edges if best is None else min(best, edges)
    return repr((least, best, goal.closed))
