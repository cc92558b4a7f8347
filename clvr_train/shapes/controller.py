"""The scripted controller: writes whole trajectories (plan, draw, look, repair, stop) from a goal and a seed.

It looks at its pictures through the reader only. Now and then the drawing tool slips (a wrong colour, shape
or place, a thing too few or too many, what the goal rules out, a picture half way between two, an edit not done) or the
plan misreads the goal; the next round notices and repairs it. Verdicts compare the picture with the goal alone, so they
can be learnt from goal and picture.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from random import Random

from PIL import Image

from clvr_train.method.trajectory import Step, Trajectory
from clvr_train.shapes.edits import Edit, apply_edits
from clvr_train.shapes.goals import sample_goals
from clvr_train.shapes.language import parse_goal
from clvr_train.shapes.layout import repair, sample_scene
from clvr_train.shapes.plans import BRIEF, START, PlanStyle, can_write, first_slots, write_plan
from clvr_train.shapes.render import confident_scene, render
from clvr_train.shapes.reports import ALL_FINE, DONE, write_advice, write_go_back, write_seen
from clvr_train.shapes.world import COLOURS, MAX_THINGS, SHAPES, Goal, Scene, Thing, expand, satisfied

MAX_WORDS = 40  # of one reasoning
MAX_IMAGES = 8  # the paper's budget (CLVR A.8)
_TRIES = 30


@dataclass(frozen=True)
class Habits:
    """Chances in [0, 1] that shape the trajectories; `ValueError` for one outside."""

    draw_slip: float = 0.25  # a first image is drawn wrongly
    edit_slip: float = 0.1  # an edit is drawn wrongly
    smudge: float = 0.0  # a picture comes out half way between two: for controllers, not as a target to draw
    plan_slip: float = 0.1  # the plan misreads an attribute
    brief: float = 0.3  # the first round says no more than to draw the goal
    incremental: float = 0.45  # goals of three or more things are drawn bit by bit
    two_edits: float = 0.3  # two repairs in one round
    verify: float = 0.25  # a verify round before an edit or before stopping
    go_back: float = 0.5  # after an edit that made nothing better: build on the picture before it
    indirect: float = 0.5  # an instruction that needs its context

    def __post_init__(self) -> None:
        for name, chance in vars(self).items():
            if not 0 <= chance <= 1:
                raise ValueError(f"habits.{name}={chance}: a chance in [0, 1]")


def mutate(scene: Scene, rng: Random) -> Scene:
    """The scene with one thing recoloured, reshaped, moved, left out or added."""
    kinds = ["colour", "shape", "cell"] * (len(scene) > 0)
    kinds += ["less"] * (len(scene) > 1) + ["more"] * (len(scene) < MAX_THINGS)
    kind = rng.choice(kinds)
    free = [cell for cell in range(9) if all(thing.cell != cell for thing in scene)]
    if kind == "more":
        return (*scene, Thing(rng.choice(SHAPES), rng.choice(COLOURS), rng.choice(free)))
    at = rng.randrange(len(scene))
    if kind == "less":
        return scene[:at] + scene[at + 1 :]
    choices = {"colour": COLOURS, "shape": SHAPES, "cell": free}[kind]
    value = rng.choice([value for value in choices if value != getattr(scene[at], kind)])
    return (*scene[:at], replace(scene[at], **{kind: value}), *scene[at + 1 :])


def _spoil(scene: Scene, goal: Goal, rng: Random) -> Scene:
    """A mutation that no longer meets the goal (the scene itself if none is found).

    Every second time in the colour that the goal rules out, if it does: drawing models tend to draw what they read.
    """
    banned = [(slot, word) for slot, word in expand(goal).bans if word in COLOURS and slot < len(scene)]
    if banned and rng.random() < 0.5:
        at, colour = rng.choice(banned)
        return (*scene[:at], replace(scene[at], colour=colour), *scene[at + 1 :])
    for _ in range(_TRIES):
        wrong = mutate(scene, rng)
        if not satisfied(goal, wrong):
            return wrong
    return scene


class ScriptedController:
    """Writes trajectories; `discarded` counts those given up because the budget of images did not suffice."""

    def __init__(self, habits: Habits | None = None) -> None:
        self.habits = habits or Habits()
        self.discarded = 0

    def trajectory(self, goal: str, seed: object, name: str) -> Trajectory | None:
        """The trajectory of one goal, the same for the same goal and seed; `None` if it was discarded.

        Raises:
            ValueError: if the goal cannot be read or no picture can meet it.
        """
        run = _Run(goal, self.habits, Random(f"controller {seed} {goal}"))
        steps = run.steps()
        if steps is None:
            self.discarded += 1
            return None
        return Trajectory(name, goal, tuple(steps))


class _Run:
    """One trajectory in the making."""

    def __init__(self, text: str, habits: Habits, rng: Random) -> None:
        self.goal = parse_goal(text)
        self.slots = expand(self.goal)
        self.habits = habits
        self.rng = rng
        self.scenes: list[Scene] = []  # read from the pictures
        self.done: list[Step] = []

    def chance(self, probability: float) -> bool:
        return self.rng.random() < probability

    def steps(self) -> list[Step] | None:
        self._first_round()
        while not satisfied(self.goal, self.scenes[-1]):
            if len(self.scenes) == MAX_IMAGES or not self._edit_round():
                return None
        seen = write_seen(self.scenes[-1])
        if self.chance(self.habits.verify):
            self.done += [Step(f"{seen} {self.rng.choice(ALL_FINE)}", "verify"), Step(DONE, "stop")]
        else:
            self.done.append(Step(f"{seen} {self.rng.choice(ALL_FINE)} {DONE}", "stop"))
        return self.done

    def _draw(self, reasoning: str, action: str, scene: Scene) -> None:
        image = render(scene)
        if self.chance(self.habits.smudge):
            image = Image.blend(image, render(mutate(scene, self.rng)), self.rng.uniform(0.3, 0.7))
        self.scenes.append(confident_scene(image))
        self.done.append(Step(reasoning, action, image))

    def _first_round(self) -> None:
        things = sample_scene(self.goal, self.rng)
        if things is None:
            raise ValueError("no picture can meet the goal")
        count = len(things)
        if count >= 3 and self.chance(self.habits.incremental):
            count = self.rng.choice([1, *[2] * 3, *range(2, count)])
        unfinished = count < len(things)
        part = first_slots(self.slots, count)
        if self.chance(self.habits.brief) and (not unfinished or (count in START and can_write(part))):
            text, planned = START[count] if unfinished else self.rng.choice(BRIEF), things[:count]
        else:
            text, planned = self._plan(things[:count], part, unfinished)
        drawn = planned
        if satisfied(part, planned) and self.chance(self.habits.draw_slip):
            drawn = _spoil(planned, part, self.rng)
        self._draw(text, "generate", drawn)

    def _plan(self, things: Scene, part: Goal, unfinished: bool) -> tuple[str, Scene]:
        """Words of a plan and the scene that it describes, which a slip of attention may make differ from
        the goal."""
        if self.chance(self.habits.plan_slip):
            for _ in range(_TRIES):
                wrong = mutate(things, self.rng)
                if len(wrong) == len(things) and not satisfied(part, wrong):
                    things = wrong
                    break
        style = PlanStyle(unfinished=unfinished)
        for _ in range(_TRIES):
            text = write_plan(self.goal, things, style, self.rng)
            if len(text.split()) <= MAX_WORDS:
                return text, things
            style = replace(style, correct=0.0)
        raise ValueError(f"no plan of {MAX_WORDS} words: {text!r}")

    def _edit_round(self) -> bool:
        """One round that edits, perhaps with a verify round before it; False when no way on is found."""
        source, number = self.scenes[-1], len(self.scenes)
        went_wrong = number > 1 and self._faults(self.scenes[-1]) >= self._faults(self.scenes[-2])
        back = went_wrong and self.chance(self.habits.go_back)
        if back:
            number -= 1
            source = self.scenes[number - 1]
        try:
            edits = repair(self.goal, source, self.rng)
        except ValueError:
            return False
        edits = edits[: 2 if self.chance(self.habits.two_edits) else 1]
        opening = write_go_back(number) if back else write_seen(source)
        text, verdict = self._advise(source, edits, opening)
        if verdict and not back and self.chance(self.habits.verify):
            self.done.append(Step(f"{opening} {verdict}", "verify"))
            text = text.removeprefix(f"{opening} {verdict} ")
        target = self._drawn(source, edits)
        self._draw(text, "edit", target)
        return True

    def _faults(self, scene: Scene) -> int:
        try:
            return len(repair(self.goal, scene, Random(0)))
        except ValueError:
            return 99

    def _advise(self, source: Scene, edits: list[Edit], opening: str) -> tuple[str, str]:
        """The words of the round, and the verdict alone if there is just one; `edits` is cut if words run
        out."""
        for attempt in range(_TRIES):
            scene, sentences, verdict = source, [], ""
            for edit in edits:
                indirect = self.chance(self.habits.indirect)
                advice = write_advice(self.goal, scene, edit, indirect, self.rng)
                sentences += [advice.verdict, advice.instruction]
                verdict = advice.verdict
                scene = apply_edits(scene, [edit])
            text = " ".join((opening, *sentences))
            if len(text.split()) <= MAX_WORDS:
                return text, verdict if len(edits) == 1 else ""
            if attempt > _TRIES // 4:
                del edits[1:]
        raise ValueError(f"no advice of {MAX_WORDS} words: {text!r}")

    def _drawn(self, source: Scene, edits: list[Edit]) -> Scene:
        """What the drawing tool makes of the edits."""
        intended = apply_edits(source, edits)
        if not self.chance(self.habits.edit_slip):
            return intended
        return source if self.chance(0.3) else mutate(intended, self.rng)


def make_trajectories(
    num: int,
    seed: int,
    split: str = "train",
    controller: ScriptedController | None = None,
    sizes: tuple[int, ...] = (1, 2, 3, 4, 5),
) -> Iterator[Trajectory]:
    """`num` trajectories over goals of the split, in equal shares of the numbers of things; ids
    "shapes-<split>-<seed>-<n>".

    Discarded ones are replaced; `controller.discarded` counts them.
    """
    controller = controller or ScriptedController()
    written, batch = 0, 0
    while written < num:
        for i, goal in enumerate(sample_goals(split, num - written, seed + 1_000_003 * batch, sizes=sizes)):
            name = f"shapes-{split}-{seed}-{written:05d}"
            trajectory = controller.trajectory(goal, (seed, batch, i), name)
            if trajectory is not None:
                written += 1
                yield trajectory
        batch += 1
