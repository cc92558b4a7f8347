"""Later rounds: what is seen, what is wrong and what to do, in words; and how the edits are resolved from
them.

A round reads "i see <list> . <verdict> . <instruction> ." The instruction may be explicit
(`edits.write_edit`) or need the verdict ("make it blue", "fix that"), the goal ("give it the colour of the
second one") or the picture ("move it directly below the red circle"). "go back to the first picture ."
changes the picture that is built on.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random

from clvr_train.shapes.edits import (
    Edit,
    apply_edits,
    find_target,
    read_edit,
    read_ref,
    spec_of,
    write_edit,
    write_ref,
)
from clvr_train.shapes.language import GoalReader, article, list_things, tokens, write_thing
from clvr_train.shapes.plans import ORDINALS, beside, direction, read_ordinal, read_step, write_ordinal
from clvr_train.shapes.world import CELLS, COLOURS, SHAPES, Goal, Scene, Spec, Thing, expand

ALL_FINE = ("everything is there .", "it shows the goal .", "nothing is wrong .")
DONE = "done ."
WENT_WRONG = "the last edit went wrong ."


def write_seen(scene: Scene) -> str:
    return f"i see {list_things(scene)} ."


def write_go_back(picture: int) -> str:
    """`picture` counts from 1."""
    return f"{WENT_WRONG} go back to the {ORDINALS[picture - 1]} picture ."


def short_ref(thing: Thing, scene: Scene, rng: Random) -> str:
    """A reference that only this thing of the scene fits: mostly the shortest one."""
    full = spec_of(thing)
    options = (Spec(1, thing.shape), Spec(1, thing.shape, thing.colour), full)
    unique = [spec for spec in options if sum(spec.fits(other) for other in scene) == 1]
    return write_ref(unique[0] if rng.random() < 0.6 else full)


@dataclass(frozen=True)
class Advice:
    """Verdict and instruction for one edit."""

    verdict: str
    instruction: str


def write_advice(goal: Goal, scene: Scene, edit: Edit, indirect: bool, rng: Random) -> Advice:
    """Words for one edit of the scene."""
    if edit.kind == "add":
        return _write_addition(goal, scene, edit, indirect, rng)
    thing = find_target(scene, edit.target)
    ref = short_ref(thing, scene, rng)
    should, wrong, pronouns = _phrases(edit)
    if not indirect:
        target = read_ref(GoalReader(tokens(ref)))
        return Advice(f"{ref} {rng.choice(wrong)} .", f"{write_edit(replace(edit, target=target))} .")
    if should and rng.random() < 0.3:
        return Advice(f"{ref} {should} .", "fix that .")
    pronouns = [*pronouns, *_comparisons(goal, scene, thing, edit, rng)]
    words = rng.choice(pronouns)
    if edit.kind == "recolour" and rng.random() < 0.12:
        words += f" , not {rng.choice([c for c in COLOURS if c != edit.value])} as i thought"
    return Advice(f"{ref} {rng.choice(wrong)} .", f"{words} .")


def _phrases(edit: Edit) -> tuple[str, list[str], list[str]]:
    """(what it should be, ways to say that it is wrong, instructions about "it")."""
    if edit.kind == "recolour":
        return f"should be {edit.value}", ["has the wrong colour"], [f"make it {edit.value}"]
    if edit.kind == "reshape":
        value = f"{article(edit.value)} {edit.value}"
        return f"should be {value}", ["has the wrong shape"], [f"turn it into {value}"]
    if edit.kind == "move":
        cell = CELLS[edit.value]
        return f"belongs in the {cell}", ["is in the wrong place"], [f"move it to the {cell}"]
    return "", ["is too much"], ["take it away", "fix that"]


def _comparisons(goal: Goal, scene: Scene, thing: Thing, edit: Edit, rng: Random) -> list[str]:
    """Instructions that lean on another thing, of the goal or of the picture."""
    slots = expand(goal)
    others = [other for other in scene if other != thing]
    words = []
    if edit.kind in ("recolour", "reshape"):
        field = "colour" if edit.kind == "recolour" else "shape"
        alike = [s for s, spec in enumerate(slots.specs) if getattr(spec, field) == edit.value]
        seen = [other for other in others if getattr(other, field) == edit.value]
        if alike:
            words.append(f"give it the {field} of {write_ordinal(rng.choice(alike), len(slots.specs), rng)}")
        if seen:
            words.append(f"give it the {field} of {short_ref(rng.choice(seen), scene, rng)}")
    if edit.kind == "move":
        words += [f"move it {place}" for place in _beside_others(edit.value, others, scene, rng)]
    return words


def _beside_others(cell: int, others: Sequence[Thing], scene: Scene, rng: Random) -> list[str]:
    steps = [(direction(cell, other.cell), other) for other in others]
    return [f"{step} {short_ref(other, scene, rng)}" for step, other in steps if step]


def _write_addition(goal: Goal, scene: Scene, edit: Edit, indirect: bool, rng: Random) -> Advice:
    new = edit.target
    thing = write_thing(new.shape, new.colour)
    if not indirect:
        return Advice(
            rng.choice(["something is missing .", f"{thing} is missing ."]), f"{write_edit(edit)} ."
        )
    slots = expand(goal)
    fixed = [s for s, spec in enumerate(slots.specs) if (spec.shape, spec.colour) == (new.shape, new.colour)]
    name = write_ordinal(fixed[-1], len(slots.specs), rng) if fixed and rng.random() < 0.6 else thing
    places = _beside_others(new.cell, scene, scene, rng)
    place = rng.choice(places) if places and rng.random() < 0.6 else f"in the {CELLS[new.cell]}"
    return Advice(f"{name} is missing .", f"add it {place} .")


class ReportReader:
    """Resolves the sentences of one round, or of a verify round and the round after it, against a picture."""

    def __init__(self, goal: Goal, pictures: Sequence[Scene]) -> None:
        self.slots = expand(goal)
        self.pictures = pictures
        self.source = len(pictures)  # number of the picture built on, from 1
        self.scene = pictures[-1]
        self.edits: list[Edit] = []
        self.it: Spec | None = None
        self.should: tuple[str, str | int] | None = None

    def read(self, text: str) -> None:
        """Take in one reasoning.

        Raises:
            ValueError: naming the sentence that cannot be resolved.
        """
        for sentence in " ".join(tokens(text)).split(" ."):
            words = sentence.split()
            if words and not self._read_sentence(GoalReader(words)):
                raise ValueError(f"cannot resolve {' '.join(words)!r}")

    def _read_sentence(self, reader: GoalReader) -> bool:
        sentence = " ".join(reader.words)
        if f"{sentence} ." in (*ALL_FINE, DONE, WENT_WRONG, "something is missing .") or sentence.startswith(
            "i see "
        ):
            return True
        if reader.take("go back to the"):
            number = ORDINALS.index(reader.peek()) + 1 if reader.peek() in ORDINALS else 0
            if not 0 < number <= len(self.pictures):
                return False
            self.source, self.scene = number, self.pictures[number - 1]
            return True
        edit = read_edit(reader) or self._read_indirect(reader)
        if edit is None:
            return self._read_verdict(reader)
        if edit.kind != "add":
            edit = replace(edit, target=spec_of(find_target(self.scene, edit.target)))
        self.scene = apply_edits(self.scene, [edit])
        self.edits.append(edit)
        self.it = self.should = None
        return True

    def _read_verdict(self, reader: GoalReader) -> bool:
        """Names "it", and what it should be."""
        self.should = None
        slot = read_ordinal(reader, self.slots)
        if slot is not None or (reader.peek() in ("a", "an")):
            self.it = reader.read_thing() if slot is None else replace(self.slots.specs[slot], cell=None)
            return self.it is not None and reader.take("is missing")
        ref = read_ref(reader)
        if ref is None:
            return False
        self.it = spec_of(find_target(self.scene, ref))
        if reader.take("should be"):
            word = reader.read_banned()
            self.should = ("recolour" if word in COLOURS else "reshape", word) if word else None
            return word is not None
        if reader.take("belongs in the"):
            self.should = ("move", CELLS.index(reader.peek()))
            return True
        self.should = ("remove", 0) if reader.peek(3) == "is too much" else None
        phrases = ("has the wrong colour", "has the wrong shape", "is in the wrong place", "is too much")
        return any(reader.take(phrase) for phrase in phrases)

    def _read_indirect(self, reader: GoalReader) -> Edit | None:
        """An instruction about "it" or "that"."""
        if self.it is None:
            return None
        if reader.take("fix that"):
            kind, value = self.should or (None, None)
            return Edit(kind, self.it, None if kind == "remove" else value) if kind else None
        if reader.take("take it away"):
            return Edit("remove", self.it)
        if reader.take("make it") or reader.take("turn it into"):
            word = reader.read_banned()
            return Edit("recolour" if word in COLOURS else "reshape", self.it, word) if word else None
        for field, kind in (("colour", "recolour"), ("shape", "reshape")):
            if reader.take(f"give it the {field} of"):
                model = self._read_model(reader)
                value = getattr(model, field) if model else None
                return Edit(kind, self.it, value) if value in COLOURS or value in SHAPES else None
        if reader.take("move it"):
            cell = self._read_cell(reader)
            return None if cell is None else Edit("move", self.it, cell)
        if reader.take("add it"):
            cell = self._read_cell(reader)
            full = None not in (cell, self.it.shape, self.it.colour)
            return Edit("add", replace(self.it, cell=cell, count=1)) if full else None
        return None

    def _read_model(self, reader: GoalReader) -> Spec | Thing | None:
        """The thing of the goal or of the picture that is named."""
        slot = read_ordinal(reader, self.slots)
        if slot is not None:
            return self.slots.specs[slot]
        ref = read_ref(reader)
        return find_target(self.scene, ref) if ref else None

    def _read_cell(self, reader: GoalReader) -> int | None:
        step = read_step(reader)
        if step is None:
            return reader.read_place(("in the", "to the"))
        ref = read_ref(reader)
        return beside(find_target(self.scene, ref).cell, step) if ref else None
