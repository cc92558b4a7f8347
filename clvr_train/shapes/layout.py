"""Arranging a goal's things on the grid, and the edits that repair a picture."""

from dataclasses import replace
from itertools import combinations
from random import Random

from clvr_train.shapes.edits import Edit, apply_edits, spec_of
from clvr_train.shapes.world import (
    COLOURS,
    SHAPES,
    Goal,
    Scene,
    Thing,
    best_fit,
    expand,
    holds,
    satisfied,
)


def arrange(
    slots: Goal, taken: dict[int, int], rng: Random, blocked: frozenset[int] = frozenset()
) -> dict | None:
    """A cell for every slot of an expanded goal, random among those that meet cells and relations.

    Args:
        slots: an expanded goal (one thing a slot).
        taken: slots that have their cell already.
        blocked: cells that must stay free.

    Returns:
        Slot -> cell, or `None` when there is no arrangement.
    """
    cells = dict(taken)
    if len(set(cells.values())) < len(cells) or not all(_fits(slots, s, cells) for s in cells):
        return None
    order = sorted(
        (s for s in range(len(slots.specs)) if s not in cells), key=lambda s: slots.specs[s].cell is None
    )
    return cells if _place(slots, order, cells, rng, blocked) else None


def _place(
    slots: Goal, order: list[int], cells: dict[int, int], rng: Random, blocked: frozenset[int]
) -> bool:
    if not order:
        return True
    slot = order[0]
    wanted = slots.specs[slot].cell
    free = [
        c
        for c in ([wanted] if wanted is not None else range(9))
        if c not in blocked and c not in cells.values()
    ]
    rng.shuffle(free)
    for cell in free:
        cells[slot] = cell
        if _fits(slots, slot, cells) and _place(slots, order[1:], cells, rng, blocked):
            return True
        del cells[slot]
    return False


def _fits(slots: Goal, slot: int, cells: dict[int, int]) -> bool:
    """Whether the slot's cell is the wanted one and agrees with the relations to slots placed so far."""
    wanted = slots.specs[slot].cell
    return wanted in (None, cells[slot]) and all(
        holds(kind, cells[a], cells[b])
        for a, kind, b in slots.relations
        if slot in (a, b) and a in cells and b in cells
    )


def complete_thing(slots: Goal, slot: int, cell: int, rng: Random) -> Thing:
    """A thing for the slot: what the goal leaves free is drawn at random, negations respected."""
    spec, bans = slots.specs[slot], {word for i, word in slots.bans if i == slot}
    shape = spec.shape or rng.choice([word for word in SHAPES if word not in bans])
    colour = spec.colour or rng.choice([word for word in COLOURS if word not in bans])
    return Thing(shape, colour, cell)


def sample_scene(goal: Goal, rng: Random) -> tuple[Thing, ...] | None:
    """A random scene that meets the goal, things in the order of the goal's slots; `None` if none exists."""
    slots = expand(goal)
    cells = arrange(slots, {}, rng)
    if cells is None:
        return None
    return tuple(complete_thing(slots, s, cells[s], rng) for s in range(len(slots.specs)))


def repair(goal: Goal, scene: Scene, rng: Random) -> list[Edit]:
    """Few edits that make the scene meet the goal, in an order in which they can be done; [] if it does
    already.

    Things are first assigned to slots as `best_fit` does; then what is too many is removed, wrong colours
    and shapes are changed, the fewest things that allow an arrangement are moved, and what is missing is
    added.

    Raises:
        ValueError: when the goal has no arrangement or things stand in each other's way.
    """
    slots = expand(goal)
    if satisfied(slots, scene):
        return []
    chosen = best_fit(slots, scene).chosen
    edits = [Edit("remove", spec_of(thing)) for t, thing in enumerate(scene) if t not in chosen]
    held = {s: scene[t] for s, t in enumerate(chosen) if t >= 0}
    for s, thing in held.items():
        changes = _attribute_edits(slots, s, thing, rng)
        edits += changes
        for edit in changes:
            thing = replace(thing, **{"colour" if edit.kind == "recolour" else "shape": edit.value})
        held[s] = thing
    cells = _rearrange(slots, {s: thing.cell for s, thing in held.items()}, rng)
    moves = [Edit("move", spec_of(thing), cells[s]) for s, thing in held.items() if cells[s] != thing.cell]
    edits += _order_moves(moves)
    missing = [s for s in range(len(slots.specs)) if s not in held]
    edits += [Edit("add", spec_of(complete_thing(slots, s, cells[s], rng))) for s in missing]
    if not satisfied(slots, apply_edits(scene, edits)):
        raise ValueError("the edits found do not meet the goal")
    return edits


def _attribute_edits(slots: Goal, slot: int, thing: Thing, rng: Random) -> list[Edit]:
    spec, bans = slots.specs[slot], {word for i, word in slots.bans if i == slot}
    edits = []
    if spec.colour not in (None, thing.colour) or thing.colour in bans:
        colour = spec.colour or rng.choice([word for word in COLOURS if word not in bans])
        edits.append(Edit("recolour", spec_of(thing), colour))
        thing = replace(thing, colour=colour)
    if spec.shape not in (None, thing.shape) or thing.shape in bans:
        shape = spec.shape or rng.choice([word for word in SHAPES if word not in bans])
        edits.append(Edit("reshape", spec_of(thing), shape))
    return edits


def _rearrange(slots: Goal, cells: dict[int, int], rng: Random) -> dict[int, int]:
    """Cells for all slots that keep as many of the given ones as possible."""
    for count in range(len(cells) + 1):
        for moved in combinations(cells, count):
            kept = {s: cell for s, cell in cells.items() if s not in moved}
            found = arrange(slots, kept, rng)
            if found is not None:
                return found
    raise ValueError("the goal has no arrangement")


def _order_moves(moves: list[Edit]) -> list[Edit]:
    """Moves into free cells first."""
    ordered: list[Edit] = []
    left = list(moves)
    while left:
        ready = next(
            (m for m in left if all(m.value != other.target.cell for other in left if other is not m)), None
        )
        if ready is None:
            raise ValueError("things stand in each other's way")
        ordered.append(ready)
        left.remove(ready)
    return ordered
