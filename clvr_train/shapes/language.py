"""One grammar for goals and descriptions: `parse_goal` reads what `write_goal` says, nothing hidden travels.

    goal     = clause {("," | "and") clause} ["and nothing else"] ["."]
    clause   = thing [place] [ban] [relation (thing [place] [ban] | "it" | "them" | "the" thing)]
    thing    = [number] [colour] (shape | "thing")
    place    = ["in the" | "at the"] cell
    ban      = ("that is not" | "that are not" | ", none of them") banned
    relation = "left of" | "right of" | "above" | "below"

"it" is the thing named just before the clause; "the blue square" after a relation is the one already named.
Every comma and full stop is a word of its own.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

from clvr_train.shapes.world import CELLS, COLOURS, RELATIONS, SHAPES, Goal, Scene, Spec, Thing, canonical

NUMBERS = ("a", "two", "three", "four", "five")
_NUMBER_OF = {"a": 1, "an": 1, "one": 1, **{word: n for n, word in enumerate(NUMBERS, start=1) if n > 1}}
_SHAPE_OF = {**{shape: shape for shape in SHAPES}, **{f"{shape}s": shape for shape in SHAPES}}
_THING_WORDS = {**_SHAPE_OF, "thing": None, "things": None}


def tokens(text: str) -> list[str]:
    """Lower-case words; commas and full stops stand alone."""
    return text.lower().replace(",", " , ").replace(".", " . ").split()


def article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def write_thing(shape: str | None, colour: str | None, count: int = 1) -> str:
    """A noun phrase with its article or number: "an orange circle", "two things"."""
    noun = (shape or "thing") + ("s" if count > 1 else "")
    words = f"{colour} {noun}" if colour else noun
    return f"{NUMBERS[count - 1] if count > 1 else article(words)} {words}"


def describe(scene: Sequence[Thing]) -> str:
    """The full description of a scene, in the order of its cells: a goal that only this scene meets."""
    if not scene:
        raise ValueError("an empty scene has no description")
    ordered = sorted(scene, key=lambda thing: thing.cell)
    named = [f"{write_thing(thing.shape, thing.colour)} in the {CELLS[thing.cell]}" for thing in ordered]
    return " , ".join(named) + " and nothing else"


def list_things(things: Sequence[Thing]) -> str:
    """The compact list used in reports of what is seen: "red circle top-left , blue square centre" or
    "nothing"."""
    ordered = sorted(things, key=lambda thing: thing.cell)
    return " , ".join(f"{t.colour} {t.shape} {CELLS[t.cell]}" for t in ordered) or "nothing"


def write_goal(goal: Goal) -> str:
    """The goal in plain words; `parse_goal` gives back a goal of the same meaning.

    Raises:
        ValueError: when the grammar has no words for it (e.g. a relation to one of two alike things).
    """
    text, related = "", False
    for i in range(len(goal.specs)):
        noun = _noun(goal, i)
        earlier = [relation for relation in goal.relations if max(relation[0], relation[2]) == i]
        if len(earlier) > 1:
            raise ValueError(f"no words for two relations of {noun!r}")
        if earlier and earlier[0][0] == i - 1 and not related:
            text += f" {earlier[0][1]} {noun}"
        else:
            text += (" and " if i == len(goal.specs) - 1 else " , ") * (i > 0) + noun
            text += _relation_phrase(goal, i, *earlier[0]) if earlier else ""
        related = bool(earlier)
    if canonical(parse_goal(text)) != canonical(replace(goal, closed=True)):
        raise ValueError(f"no unambiguous words for the goal; tried {text!r}")
    return text


def _relation_phrase(goal: Goal, i: int, first: int, kind: str, second: int) -> str:
    """The relation as said after spec `i`: " above it", " left of the blue square"."""
    converse = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    other, kind = (second, kind) if first == i else (first, converse[kind])
    pronoun = "it" if goal.specs[other].count == 1 else "them"
    return f" {kind} {pronoun if other == i - 1 else _definite(goal, other)}"


def _noun(goal: Goal, i: int) -> str:
    spec = goal.specs[i]
    words = write_thing(spec.shape, spec.colour, spec.count)
    if spec.cell is not None:
        words += f" in the {CELLS[spec.cell]}"
    bans = [ban for spec_index, ban in goal.bans if spec_index == i]
    for ban in bans:
        banned = f"{article(ban)} {ban}" if ban in SHAPES else ban
        words += f" , none of them {banned}" if spec.count > 1 else f" that is not {banned}"
    return words


def _definite(goal: Goal, i: int) -> str:
    spec = goal.specs[i]
    noun = (spec.shape or "thing") + ("s" if spec.count > 1 else "")
    return f"the {spec.colour} {noun}" if spec.colour else f"the {noun}"


class GoalReader:
    """A cursor over words that collects specs, relations and bans. Each `read_*` moves on only when it
    succeeds."""

    def __init__(self, words: Sequence[str]) -> None:
        self.words = list(words)
        self.at = 0
        self.specs: list[Spec] = []
        self.relations: list[tuple[int, str, int]] = []
        self.bans: list[tuple[int, str]] = []

    def peek(self, count: int = 1) -> str:
        return " ".join(self.words[self.at : self.at + count])

    def take(self, phrase: str) -> bool:
        """Move past the phrase if it comes next."""
        count = phrase.count(" ") + 1
        found = self.peek(count) == phrase
        self.at += count * found
        return found

    def read_thing(self) -> Spec | None:
        """[number] [colour] (shape | thing)"""
        start = self.at
        count = _NUMBER_OF.get(self.peek(), 0)
        self.at += count > 0
        colour = self.peek() if self.peek() in COLOURS else None
        self.at += colour is not None
        if self.peek() not in _THING_WORDS:
            self.at = start
            return None
        shape = _THING_WORDS[self.peek()]
        self.at += 1
        return Spec(count or 1, shape, colour)

    def read_place(self, prefixes: Sequence[str] = ("in the", "at the", "")) -> int | None:
        """A cell; a bare "left" or "right" followed by "of" is a relation, not a place."""
        for prefix in prefixes:
            start = self.at
            if (not prefix or self.take(prefix)) and self.peek() in CELLS and self.peek(2)[-3:] != " of":
                self.at += 1
                return CELLS.index(self.words[self.at - 1])
            self.at = start
        return None

    def read_banned(self) -> str | None:
        """[article] (colour | shape)"""
        start = self.at
        self.at += self.peek() in ("a", "an")
        word = _SHAPE_OF.get(self.peek(), self.peek())
        if word in COLOURS or word in SHAPES:
            self.at += 1
            return word
        self.at = start
        return None

    def read_modifiers(self, i: int, prefixes: Sequence[str] = ("in the", "at the", "")) -> None:
        """Places and bans of spec `i`."""
        while True:
            start = self.at
            cell = self.read_place(prefixes)
            if cell is not None:
                self.specs[i] = replace(self.specs[i], cell=cell)
            elif any(self.take(p) for p in ("that is not", "that are not", ", none of them", "none of them")):
                word = self.read_banned()
                if word is None:
                    self.at = start
                    return
                self.bans.append((i, word))
            else:
                return

    def read_relation(self) -> str | None:
        return next((kind for kind in RELATIONS if self.take(kind)), None)

    def find(self, wanted: Spec) -> int | None:
        """The one spec named so far that has the shape and colour of `wanted`."""
        found = [
            i
            for i, spec in enumerate(self.specs)
            if wanted.shape in (None, spec.shape) and wanted.colour in (None, spec.colour)
        ]
        return found[0] if len(found) == 1 else None

    def read_clause(self, prefixes: Sequence[str] = ("in the", "at the", "")) -> bool:
        """One clause; False (and no move) when none starts here."""
        spec = self.read_thing()
        if spec is None:
            return False
        self.specs.append(spec)
        current = len(self.specs) - 1
        self.read_modifiers(current, prefixes)
        start = self.at
        kind = self.read_relation()
        if kind and not self._read_other(current, kind, prefixes):
            self.at = start
        return True

    def _read_other(self, current: int, kind: str, prefixes: Sequence[str]) -> bool:
        if current > 0 and (self.take("it") or self.take("them")):
            self.relations.append((current, kind, current - 1))
            return True
        start = self.at
        definite = self.take("the")
        spec = self.read_thing()
        if spec is None:
            self.at = start
            return False
        if definite:
            other = self.find(spec)
            if other is None or other == current:
                self.at = start
                return False
            self.relations.append((current, kind, other))
            return True
        self.specs.append(spec)
        self.relations.append((current, kind, current + 1))
        self.read_modifiers(current + 1, prefixes)
        return True

    def goal(self, closed: bool) -> Goal:
        return Goal(tuple(self.specs), tuple(self.relations), tuple(self.bans), closed)


def parse_goal(text: str) -> Goal:
    """Read a goal or a scene description; every word must be understood.

    Raises:
        ValueError: naming the phrase that is not of the grammar.
    """
    reader = GoalReader(tokens(text))
    if not reader.words:
        raise ValueError("the goal is empty")
    while True:
        if not reader.read_clause():
            raise ValueError(f"cannot read {reader.peek(6) or 'the end of the goal'!r} in the goal {text!r}")
        reader.take("and nothing else")
        reader.take(".")
        if reader.at == len(reader.words):
            break
        if not (reader.take(",") or reader.take("and")):
            raise ValueError(f"cannot read {reader.peek(6)!r} in the goal {text!r}")
    return reader.goal(closed=True)


def read_clauses(words: Sequence[str], skip: Callable[[GoalReader], bool] | None = None) -> Goal | None:
    """The clauses that can be understood anywhere in the words, the rest ignored; `None` if there are none.

    A clause with "the" that fits a thing already mentioned adds to it; any other clause is a further thing.
    The result is open unless the words say "and nothing else".
    """
    reader = GoalReader(words)
    closed = False
    while reader.at < len(reader.words):
        if reader.take("and nothing else"):
            closed = True
        elif not (skip and skip(reader)):
            definite = reader.take("the")
            known = len(reader.specs)
            if not reader.read_clause(("in the", "at the", "to the", "")):
                reader.at += not definite
            elif definite and len(reader.specs) == known + 1:
                _merge_last(reader)
    return reader.goal(closed) if reader.specs else None


def _merge_last(reader: GoalReader) -> None:
    """Fold the last spec into the earliest one it does not contradict."""
    last = len(reader.specs) - 1
    new = reader.specs[last]
    if any(last in (i, j) for i, _, j in reader.relations) or any(i == last for i, _ in reader.bans):
        return
    for i, spec in enumerate(reader.specs[:last]):
        pairs = ((spec.shape, new.shape), (spec.colour, new.colour), (spec.cell, new.cell))
        if spec.count == new.count == 1 and all(a is None or b is None or a == b for a, b in pairs):
            reader.specs[i] = Spec(1, *(a if a is not None else b for a, b in pairs))
            reader.specs.pop()
            return


def goal_of(scene: Scene) -> Goal:
    """The goal that only this scene meets."""
    return Goal(
        tuple(Spec(1, t.shape, t.colour, t.cell) for t in sorted(scene, key=lambda thing: thing.cell))
    )
