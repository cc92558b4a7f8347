"""Edit instructions: add, remove, recolour, reshape, move. One grammar, written, read and applied here.

edits  = edit {(", then" | "and" | ".") edit} ["."]
edit   = "add" thing place | "remove" ref | "make" ref colour | "turn" ref "into" shape
       | "move" ref "to the" cell
ref    = "the" [colour] (shape | "thing") [place]
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from clvr_train.shapes.language import GoalReader, article, parse_goal, read_clauses, tokens, write_thing
from clvr_train.shapes.world import CELLS, COLOURS, SHAPES, Goal, Scene, Spec, Thing

KINDS = ("add", "remove", "recolour", "reshape", "move")
MAX_MENTIONS = 5  # a picture holds five things at most; further mentions are not read


@dataclass(frozen=True)
class Edit:
    """One change. `target` says which thing (for "add": the new thing, all attributes given); `value` is
    the new colour, shape or cell for "recolour", "reshape" and "move"."""

    kind: str
    target: Spec
    value: str | int | None = None


def spec_of(thing: Thing) -> Spec:
    return Spec(1, thing.shape, thing.colour, thing.cell)


def write_ref(target: Spec) -> str:
    """Such as "the red circle in the top", as far as the attributes are given."""
    words = f"the {target.colour} " if target.colour else "the "
    words += target.shape or "thing"
    return words if target.cell is None else f"{words} in the {CELLS[target.cell]}"


def write_edit(edit: Edit) -> str:
    """The explicit instruction for one edit."""
    ref = write_ref(edit.target)
    if edit.kind == "add":
        thing = write_thing(edit.target.shape, edit.target.colour)
        return f"add {thing} in the {CELLS[edit.target.cell]}"
    if edit.kind == "remove":
        return f"remove {ref}"
    if edit.kind == "recolour":
        return f"make {ref} {edit.value}"
    if edit.kind == "reshape":
        return f"turn {ref} into {article(edit.value)} {edit.value}"
    return f"move {ref} to the {CELLS[edit.value]}"


def write_edits(edits: Sequence[Edit]) -> str:
    return " , then ".join(write_edit(edit) for edit in edits)


def read_ref(reader: GoalReader) -> Spec | None:
    """A definite reference at the cursor, or `None` (and no move)."""
    start = reader.at
    if reader.take("the") and reader.peek() not in ("a", "an", "one", "two", "three", "four", "five"):
        spec = reader.read_thing()
        if spec is not None:
            return replace(spec, cell=reader.read_place(("in the", "at the")))
    reader.at = start
    return None


def read_edit(reader: GoalReader) -> Edit | None:
    """One explicit edit at the cursor, or `None` (and no move)."""
    start = reader.at
    edit = _read_edit(reader)
    if edit is None:
        reader.at = start
    return edit


def _read_edit(reader: GoalReader) -> Edit | None:
    if reader.take("add"):
        spec = reader.read_thing()
        cell = reader.read_place() if spec else None
        full = spec is not None and spec.count == 1 and None not in (spec.shape, spec.colour, cell)
        return Edit("add", replace(spec, cell=cell)) if full else None
    verb = next((word for word in ("remove", "make", "turn", "move") if reader.take(word)), None)
    target = read_ref(reader) if verb else None
    if target is None:
        return None
    if verb == "remove":
        return Edit("remove", target)
    if verb == "move":
        cell = reader.read_place(("to the",))
        return None if cell is None else Edit("move", target, cell)
    if verb == "turn" and not reader.take("into"):
        return None
    word = reader.read_banned()
    if word in COLOURS:
        return Edit("recolour", target, word)
    return Edit("reshape", target, word) if word in SHAPES else None


def parse_edits(text: str) -> list[Edit]:
    """Read instructions; every word must be understood.

    Raises:
        ValueError: naming the phrase that is not of the grammar.
    """
    reader = GoalReader(tokens(text))
    edits = []
    while True:
        edit = read_edit(reader)
        if edit is None:
            raise ValueError(
                f"cannot read {reader.peek(6) or 'the end of the instruction'!r} in the edit {text!r}"
            )
        edits.append(edit)
        reader.take(".")
        if reader.at == len(reader.words):
            return edits
        reader.take(",")
        if not reader.take("then"):
            reader.take("and")


def find_edits(text: str) -> list[Edit]:
    """Lenient: the explicit edits that occur anywhere in the text, in order; the rest is ignored."""
    reader = GoalReader(tokens(text))
    edits = []
    while reader.at < len(reader.words):
        edit = read_edit(reader)
        if edit is None:
            reader.at += 1
        else:
            edits.append(edit)
    return edits


def find_target(scene: Scene, target: Spec) -> Thing:
    """The one thing the reference is about.

    Raises:
        ValueError: when nothing, or more than one thing, fits.
    """
    found = [thing for thing in scene if target.fits(thing)]
    if len(found) != 1:
        raise ValueError(f"{len(found)} things fit {write_ref(target)!r}")
    return found[0]


def edited(thing: Thing, edit: Edit) -> Thing:
    """The thing after a recolour, reshape or move."""
    field = {"recolour": "colour", "reshape": "shape", "move": "cell"}[edit.kind]
    return replace(thing, **{field: edit.value})


def apply_edits(scene: Scene, edits: Sequence[Edit]) -> Scene:
    """The scene after the edits, in order of cells.

    Raises:
        ValueError: when a reference is not unique or a cell is taken.
    """
    things = list(scene)
    for edit in edits:
        if edit.kind == "add":
            new = Thing(edit.target.shape, edit.target.colour, edit.target.cell)
        else:
            old = find_target(tuple(things), edit.target)
            things.remove(old)
            new = None if edit.kind == "remove" else edited(old, edit)
        if new and any(thing.cell == new.cell for thing in things):
            raise ValueError(f"the {CELLS[new.cell]} is taken")
        things += [new] if new else []
    return tuple(sorted(things, key=lambda thing: thing.cell))


def read_mentions(text: str) -> Goal | None:
    """Lenient: the wish that a reader who knows only explicit clauses takes from any text; `None` if there
    is none.

    Text that is wholly a goal or description is read as `parse_goal` reads it (closed). Otherwise every
    noun phrase is a wish; an explicit edit is the wish for its result (what is removed is no wish); at most
    `MAX_MENTIONS` are kept.
    """
    words = tokens(text)
    try:
        goal = parse_goal(text)
    except ValueError:
        goal = read_clauses(words, _skip_edit)
    if goal is None or goal.num_things <= MAX_MENTIONS:
        return goal
    return _first_things(goal)


def _skip_edit(reader: GoalReader) -> bool:
    """Read an explicit edit at the cursor as a wish for its result."""
    start = reader.at
    edit = read_edit(reader)
    if edit is None:
        return False
    wish = edit.target
    if edit.kind in ("recolour", "reshape", "move"):
        wish = edited(wish, edit)
    if edit.kind != "remove":
        reader.specs.append(wish)
    return reader.at > start


def _first_things(goal: Goal) -> Goal:
    """The goal cut to its first specs that together count at most `MAX_MENTIONS` things."""
    kept, total = 0, 0
    for spec in goal.specs:
        if total + spec.count > MAX_MENTIONS:
            break
        kept, total = kept + 1, total + spec.count
    relations = tuple((i, kind, j) for i, kind, j in goal.relations if max(i, j) < kept)
    bans = tuple((i, word) for i, word in goal.bans if i < kept)
    return Goal(goal.specs[:kept], relations, bans, goal.closed)
