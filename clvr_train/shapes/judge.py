"""The judge of the shapes world: global score of a picture, and score of an edit. It reads text, not minds.

What it reads. `global_score` takes `edits.read_mentions` of its prompt. A prompt that is wholly of the goal
grammar (every proxy prompt is) is read to the last word, and closed: things it does not name count against
the picture. Any other text, such as raw reasoning, is read clause by clause: noun phrases with their
explicit colour, place and count ("red circle top-left", "two squares"), relations and negations next to
them, and explicit edits as wishes for their result.

What it cannot read, and therefore gets wrong when raw reasoning is the prompt (the "simple" reward):
  - references: "the other one", "another one", "of the same colour", "make it blue", "fix that" have no
    meaning to it; a thing placed "directly below it" is a thing without a place, or none at all;
  - the mood of a clause: what is *seen*, wrong things included ("i see green square centre"), or taken back
    ("a red circle , no , a blue circle") looks like a wish;
  - what is left out: such text is open, so extras go unpunished, and "draw the goal as it stands" holds no
    clause at all; then the score is missing, never zero.

`edit_score` likewise takes the explicit edits of its instruction and nothing else. A judge that sees only the
text of one round is noisier for these reasons alone; no constant makes it so.
"""

from collections.abc import Sequence

from PIL.Image import Image

from clvr_train.method.score import Score
from clvr_train.shapes.edits import Edit, apply_edits, edited, find_edits, find_target, read_mentions
from clvr_train.shapes.render import confident_scene, read_scene
from clvr_train.shapes.world import Scene, SeenThing, Thing, match


class ShapesJudge:
    """Scores pictures of the shapes world in [0, 1]."""

    def global_score(self, image: Image, prompt: str) -> Score:
        """How far the picture shows what the prompt says (`world.match`); missing when no clause can be
        read."""
        goal = read_mentions(prompt)
        if goal is None:
            return Score(None, f"no readable clause in {prompt!r}")
        value = match(goal, read_scene(image))
        return Score(value, parts={"match": value})

    def edit_score(self, source: Image, image: Image, instruction: str) -> Score:
        """How well `image` is `source` after the instruction.

        `success`: mean over edits of how far each is done; `preservation`: mean over kept things and kept
        attributes of how far they are unchanged, and of no new thing in the cells that should be empty. The
        value is the geometric mean, so doing nothing and redrawing everything both score low.
        """
        edits = find_edits(instruction)
        if not edits:
            return Score(None, f"no readable edit in {instruction!r}")
        before = confident_scene(source)
        try:
            expected = apply_edits(before, edits)
            success = _success(before, edits, read_scene(image))
        except ValueError as error:
            return Score(None, f"the edit does not fit the source: {error}")
        preservation = _preservation(before, expected, read_scene(image))
        value = (success * preservation) ** 0.5
        return Score(value, parts={"success": success, "preservation": preservation})


def _likeness(thing: Thing, seen: SeenThing | None) -> float:
    """How far the cell shows the thing: presence, shape, colour."""
    if seen is None:
        return 0.0
    return seen.confidence * (1 + (seen.shape == thing.shape) + (seen.colour == thing.colour)) / 3


def _gone(thing: Thing, now: SeenThing | None, refilled: bool) -> float:
    """How far the thing has left its cell, which by now should be empty or hold another thing."""
    if now is None or (refilled and now.thing != thing):
        return 1.0
    return 1.0 - now.confidence


def _success(before: Scene, edits: Sequence[Edit], seen: Sequence[SeenThing]) -> float:
    """Mean over edits; each is judged on the thing it is about, where the later edits leave that thing."""
    cells = {thing.cell: thing for thing in seen}
    expected = {thing.cell for thing in apply_edits(before, edits)}
    scene, fates = before, []
    for edit in edits:
        if edit.kind == "add":
            old, new = None, Thing(edit.target.shape, edit.target.colour, edit.target.cell)
        else:
            old = find_target(scene, edit.target)
            new = None if edit.kind == "remove" else edited(old, edit)
            fates = [(kind, first, new if last == old else last) for kind, first, last in fates]
        fates.append((edit.kind, old, new))
        scene = apply_edits(scene, [edit])
    done = []
    for kind, old, new in fates:
        if kind in ("remove", "move"):
            done.append(_gone(old, cells.get(old.cell), old.cell in expected))
        if kind in ("add", "move") and new:
            arrived = _likeness(new, cells.get(new.cell))
            done.append((done.pop() + arrived) / 2 if kind == "move" else arrived)
        if kind in ("recolour", "reshape") and new:
            now, attribute = cells.get(new.cell), "colour" if kind == "recolour" else "shape"
            right = now is not None and getattr(now, attribute) == getattr(new, attribute)
            done.append(now.confidence if right else 0.0)
    return sum(done) / len(done) if done else 1.0


def _preservation(before: Scene, expected: Scene, seen: Sequence[SeenThing]) -> float:
    """Kept things, kept attributes of changed things, and empty cells that stay empty (one atom for all)."""
    cells = {thing.cell: thing for thing in seen}
    old = {thing.cell: thing for thing in before}
    atoms = []
    for thing in expected:
        was, now = old.get(thing.cell), cells.get(thing.cell)
        if was == thing:
            atoms.append(_likeness(thing, now))
        elif was is not None:
            kept = [name for name in ("shape", "colour") if getattr(was, name) == getattr(thing, name)]
            atoms += [
                now.confidence * (getattr(now, name) == getattr(thing, name)) if now else 0.0 for name in kept
            ]
    allowed = {thing.cell for thing in (*before, *expected)}
    new = sum(thing.confidence for thing in seen if thing.cell not in allowed)
    atoms.append(max(0.0, 1.0 - new))
    return sum(atoms) / len(atoms)
