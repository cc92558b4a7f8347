"""First rounds: how a plan is put into words, and how it is resolved again from the words and the goal.

A plan places things one after the other, partly explicitly ("red circle top-left"), partly by what was said
before: "the first one" is the first thing of the goal, "it" the thing placed last, "another one" one like
it, "a square of the same colour" and "a blue one" take its colour or its shape; "x , no , y" takes x back.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random

from clvr_train.shapes.language import GoalReader, article, tokens, write_goal, write_thing
from clvr_train.shapes.world import CELLS, COLOURS, SHAPES, Goal, Spec, Thing, expand

ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth")
BRIEF = (
    "draw the goal as it stands .",
    "just draw what is asked .",
    "nothing to plan , draw it .",
    "all at once , as the goal says .",
)
START = {1: "start with the first one .", 2: "start with the first two .", 3: "start with the first three ."}
_OPENERS = ("plan :", "let me see ,", "")
_STEPS = {"directly above": -3, "directly below": 3, "directly left of": -1, "directly right of": 1}


def beside(cell: int, words: str) -> int | None:
    """The cell next to `cell` in the direction of the words; `None` beyond the edge."""
    target = cell + _STEPS[words]
    same_row = target // 3 == cell // 3
    return target if 0 <= target < 9 and (same_row or abs(_STEPS[words]) == 3) else None


def direction(cell: int, other: int) -> str | None:
    """Where `cell` lies from `other`, such as "directly below"; `None` if they do not touch."""
    return next((words for words in _STEPS if beside(other, words) == cell), None)


def read_step(reader: GoalReader) -> str | None:
    return next((words for words in _STEPS if reader.take(words)), None)


def read_ordinal(reader: GoalReader, slots: Goal) -> int | None:
    """The slot that "the first one", "the last one" or (of two) "the other one" means, or `None` (and no
    move)."""
    start = reader.at
    count = len(slots.specs)
    if reader.take("the last one"):
        return count - 1
    if count == 2 and reader.take("the other one"):
        return 1
    for slot in range(count):
        if reader.take(f"the {ORDINALS[slot]} one"):
            return slot
    reader.at = start
    return None


def write_ordinal(slot: int, count: int, rng: Random) -> str:
    if count == 2 and slot == 1:
        return "the other one"
    return "the last one" if slot == count - 1 > 0 and rng.random() < 0.4 else f"the {ORDINALS[slot]} one"


@dataclass(frozen=True)
class PlanStyle:
    """How a plan is worded."""

    indirect: float = 0.5  # chance of an indirect reference, and of an indirect place, where one exists
    correct: float = 0.1  # chance that a thing is first named wrongly and taken back
    unfinished: bool = False  # the plan places only part of the goal


def write_plan(goal: Goal, things: Sequence[Thing], style: PlanStyle, rng: Random) -> str:
    """Words for placing `things`, thing i being meant for slot i of the expanded goal (fewer things: the
    first ones)."""
    slots = expand(goal)
    said: list[Spec] = []
    items = []
    for slot, thing in enumerate(things):
        ref, spec = _write_ref(slots, slot, thing, said, style, rng)
        items.append(f"{ref} {_write_place(thing, said, style, rng)}")
        said.append(replace(spec, cell=thing.cell))
    opener = "first" if style.unfinished else rng.choice(_OPENERS)
    ending = " , the rest later ." if style.unfinished else " ."
    return f"{opener} {' , '.join(items)}{ending}".strip()


def _write_ref(
    slots: Goal, slot: int, thing: Thing, said: list[Spec], style: PlanStyle, rng: Random
) -> tuple[str, Spec]:
    """Words for a thing, and the attributes they fix."""
    spec = slots.specs[slot]
    banned = any(i == slot for i, _ in slots.bans)
    states = banned or rng.random() < 0.5
    shape, colour = spec.shape or thing.shape, spec.colour or (thing.colour if states else None)
    if not spec.fits(replace(thing, cell=spec.cell if spec.cell is not None else thing.cell)):
        shape, colour = thing.shape, thing.colour  # a misread goal can only be said explicitly
        banned = True
    full = Spec(1, shape, colour)
    options: list[tuple[str, Spec]] = []
    if not banned and len(slots.specs) > 1:
        options.append((write_ordinal(slot, len(slots.specs), rng), Spec(1, spec.shape, spec.colour)))
    if said:
        last = said[-1]
        if (last.shape, last.colour) == (shape, colour):
            options += [("another one", full)] * 2
        elif last.colour == colour and colour:
            options.append((f"a {shape} of the same colour", full))
        elif last.shape == shape and colour:
            options.append((f"{article(colour)} {colour} one", full))
    if options and rng.random() < style.indirect:
        return rng.choice(options)
    words = write_thing(shape, colour)
    if rng.random() < 0.5:
        words = words.split(" ", 1)[1]
    if rng.random() < style.correct and colour:
        wrong = rng.choice([word for word in COLOURS if word != colour])
        words = f"{write_thing(shape, wrong)} , no , {words}"
    return words, full


def _write_place(thing: Thing, said: list[Spec], style: PlanStyle, rng: Random) -> str:
    options = []
    for i, other in enumerate(said):
        name = "it" if i == len(said) - 1 else f"the {ORDINALS[i]} one"
        step = direction(thing.cell, other.cell)
        if step:
            options.append(f"{step} {name}")
        if name == "it" and thing.cell == 8 - other.cell:
            options.append("across from it")
    if options and rng.random() < style.indirect:
        return options[-1]
    cell = CELLS[thing.cell]
    return f"in the {cell}" if rng.random() < 0.4 else cell


def read_plan(text: str, goal: Goal) -> Goal | None:
    """What a first round asks to be drawn, or `None` when the words are not of a plan.

    Brief rounds ask for the goal itself (or for its first things); a plan gives a goal in which all cells
    are fixed.
    """
    slots = expand(goal)
    if text in BRIEF:
        return goal
    for count, words in START.items():
        if text == words and count < len(slots.specs):
            return first_slots(slots, count)
    reader = GoalReader(tokens(text))
    unfinished = reader.take("first")
    for opener in _OPENERS:
        if opener and reader.take(opener):
            break
    said: list[Spec] = []
    while True:
        spec = _read_ref(reader, slots, said)
        if spec is not None and reader.take(", no ,"):
            spec = _read_ref(reader, slots, said)
        cell = _read_target(reader, said) if spec else None
        if cell is None:
            return None
        said.append(replace(spec, cell=cell))
        if reader.take(", the rest later .") and unfinished or reader.take("."):
            break
        if not reader.take(","):
            return None
    cells = {spec.cell for spec in said}
    return Goal(tuple(said)) if reader.at == len(reader.words) and len(cells) == len(said) else None


def _read_ref(reader: GoalReader, slots: Goal, said: list[Spec]) -> Spec | None:
    slot = read_ordinal(reader, slots)
    if slot is not None:
        return Spec(1, slots.specs[slot].shape, slots.specs[slot].colour)
    last = said[-1] if said else Spec()
    if said and reader.take("another one"):
        return replace(last, cell=None)
    for colour in COLOURS:
        if said and reader.take(f"{article(colour)} {colour} one"):
            return Spec(1, last.shape, colour)
    for shape in SHAPES:
        if said and reader.take(f"a {shape} of the same colour"):
            return Spec(1, shape, last.colour)
    return reader.read_thing()


def _read_target(reader: GoalReader, said: list[Spec]) -> int | None:
    """The cell of a place phrase."""
    if said and reader.take("across from it"):
        return 8 - said[-1].cell
    step = read_step(reader)
    if step is None:
        return reader.read_place()
    if said and reader.take("it"):
        return beside(said[-1].cell, step)
    for i, spec in enumerate(said):
        if reader.take(f"the {ORDINALS[i]} one"):
            return beside(spec.cell, step)
    return None


def first_slots(slots: Goal, count: int) -> Goal:
    """The goal of the first `count` things only."""
    return Goal(
        slots.specs[:count],
        tuple((i, kind, j) for i, kind, j in slots.relations if max(i, j) < count),
        tuple((i, word) for i, word in slots.bans if i < count),
    )


def can_write(goal: Goal) -> bool:
    """Whether `write_goal` has words for the goal."""
    try:
        write_goal(goal)
    except ValueError:
        return False
    return True
