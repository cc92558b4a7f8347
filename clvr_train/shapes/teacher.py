"""The teacher: turns a context `C_k` into explicit, judgeable targets (CLVR 3.2), from the context alone.

It reads the goal, the reasonings and the history images; the target is not looked at. What a plan misreads,
the proxy prompt asks for as well: `I_k` should follow the reasoning.
"""

from clvr_train.data.images import open_image
from clvr_train.method.score import ProxyPrompt, TeacherRefusal
from clvr_train.method.trajectory import Sample
from clvr_train.shapes.edits import write_edits
from clvr_train.shapes.language import describe, parse_goal, write_goal
from clvr_train.shapes.plans import read_plan
from clvr_train.shapes.render import confident_scene
from clvr_train.shapes.reports import ReportReader
from clvr_train.shapes.world import Goal


class ShapesTeacher:
    """Writes proxy prompts for the shapes world."""

    name = "shapes 1"  # raise the number when it writes other prompts

    def proxy_prompt(self, sample: Sample) -> ProxyPrompt:
        """The proxy prompt of a sample.

        At k = 1: `p_t2i` describes the planned scene where the plan fixes all places, and else is the goal
        (or the part of it that is asked for). At k > 1: `p_i2i` lists the edits explicitly, `p_t2i` describes
        the scene after them, `idx` is the picture they build on.

        Raises:
            TeacherRefusal: with the reason, when the context cannot be resolved.
        """
        try:
            goal = parse_goal(sample.goal)
        except ValueError as error:
            raise TeacherRefusal(f"goal: {error}") from error
        if not sample.references:
            return ProxyPrompt(self._first(goal, sample))
        pictures = [confident_scene(open_image(reference)) for reference in sample.references]
        texts = sample.reasonings
        reader = self._read(goal, pictures, texts[-1:])
        if reader is None and len(texts) > 2:
            reader = self._read(goal, pictures, texts[-2:])  # a verify round names what the edit is about
        if reader is None:
            raise TeacherRefusal(f"step {sample.step}: cannot resolve the edit in {texts[-1]!r}")
        if not reader.edits:
            raise TeacherRefusal(f"step {sample.step}: no edit in {texts[-1]!r}")
        if not reader.scene:
            raise TeacherRefusal(f"step {sample.step}: the edit leaves an empty picture")
        return ProxyPrompt(describe(reader.scene), write_edits(reader.edits), (reader.source,))

    def _first(self, goal: Goal, sample: Sample) -> str:
        plan = read_plan(sample.reasonings[-1], goal)
        if plan is None:
            raise TeacherRefusal(f"step 1: cannot resolve the plan {sample.reasonings[-1]!r}")
        if plan == goal:
            return sample.goal
        specs = tuple(sorted(plan.specs, key=lambda spec: -1 if spec.cell is None else spec.cell))
        placed = not plan.relations and not plan.bans
        try:
            return write_goal(Goal(specs) if placed else plan) + " and nothing else"
        except ValueError as error:
            raise TeacherRefusal(f"step 1: {error}") from error

    def _read(self, goal: Goal, pictures: list, texts: tuple[str, ...]) -> ReportReader | None:
        """The reader after these texts, or `None` if a sentence needs something they do not say."""
        reader = ReportReader(goal, pictures)
        try:
            for text in texts:
                reader.read(text)
        except ValueError:
            return None
        return reader
