"""Scores of a system on a list of goals, with intervals: by tag, by number of objects, with network evaluations."""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

from PIL.Image import Image
from tqdm import tqdm

from clvr_train.evaluation.checkout import Item
from clvr_train.evaluation.drawing import Drawn
from clvr_train.method.statistics import mean_se, wilson
from clvr_train.method.trajectory import Sample
from clvr_train.models.sampler import Sampler


@dataclass(frozen=True)
class Goal:
    """One prompt of a benchmark; `level` is its number of objects."""

    id: str
    tag: str
    text: str
    level: int


@dataclass(frozen=True)
class Outcome:
    """What a system made of a goal. `rounds` counts images drawn, `nfe` network evaluations, `stop` says why it
    ended.
    """

    id: str
    tag: str
    level: int
    goal: str
    passed: bool
    score: float
    rounds: int
    nfe: int
    seconds: float
    stop: str = ""


Grade = Callable[[str, Image], tuple[bool, float]]


def outcome(goal: Goal, image: Image | None, grade: Grade, **facts) -> Outcome:
    """Grades the final image of a goal; no image fails with score 0."""
    passed, score = (False, 0.0) if image is None else grade(goal.text, image)
    return Outcome(goal.id, goal.tag, goal.level, goal.text, bool(passed), float(score), **facts)


def draw_single(sampler: Sampler, items: Sequence[Item | Goal], seed: int) -> list[Drawn]:
    """One drawing from each text, all together; its noise depends on (seed, id)."""
    before = time.monotonic()
    images = sampler.draw([Sample(i.id, 1, i.text, ()) for i in items], [("evaluate", seed, i.id, 1) for i in items])
    seconds = (time.monotonic() - before) / max(1, len(items))
    return [Drawn(image, rounds=1, nfe=sampler.nfe_per_image, seconds=seconds) for image in images]


def single_step(
    sampler: Sampler, goals: Sequence[Goal], grade: Grade, seed: int, batch: int
) -> tuple[list[Outcome], list[Image]]:
    """One drawing from each goal's text; its noise depends on (seed, id of the goal)."""
    outcomes, images = [], []
    for start in tqdm(range(0, len(goals), batch), desc="evaluate"):
        part = goals[start : start + batch]
        for goal, one in zip(part, draw_single(sampler, part, seed), strict=True):
            images.append(one.image)
            facts = {"rounds": one.rounds, "nfe": one.nfe, "seconds": one.seconds}
            outcomes.append(outcome(goal, one.image, grade, **facts))
    return outcomes, images


def summarise(outcomes: Sequence[Outcome], *, steps: int, cfg: float, mode: str) -> dict:
    """The row of a system: pass rate with Wilson's 95 % interval, mean partial score, tags, levels, NFEs, seconds."""
    if not outcomes:
        raise ValueError("no outcomes to summarise")
    n, passes = len(outcomes), sum(o.passed for o in outcomes)
    mean, se = mean_se([o.score for o in outcomes])
    return {
        "pass_rate": passes / n,
        "mean_score": mean,
        "mean_score_se": se,
        "ci95": list(wilson(passes, n)),
        "n": n,
        "steps": steps,
        "cfg": cfg,
        "mode": mode,
        "tags": {tag: _rate([o for o in outcomes if o.tag == tag]) for tag in dict.fromkeys(o.tag for o in outcomes)},
        "levels": {str(k): _rate([o for o in outcomes if o.level == k]) for k in sorted({o.level for o in outcomes})},
        "nfe_per_goal": sum(o.nfe for o in outcomes) / n,
        "rounds_per_goal": sum(o.rounds for o in outcomes) / n,
        "seconds_per_goal": sum(o.seconds for o in outcomes) / n,
    }


def rows(outcomes: Sequence[Outcome]) -> list[dict]:
    return [asdict(o) for o in outcomes]


def _rate(outcomes: Sequence[Outcome]) -> dict:
    passes, n = sum(o.passed for o in outcomes), len(outcomes)
    return {"pass_rate": passes / n, "n": n, "ci95": list(wilson(passes, n))}


def table(systems: dict[str, dict]) -> str:
    """A plain-text table of `summarise` rows, a system a line."""
    head = f"{'system':<22}{'pass rate':>10}  {'95 % interval':<16}{'score':>7}{'n':>6}{'steps':>7}{'cfg':>5}{'NFE':>7}"
    lines = [head, "-" * len(head)]
    for name, row in systems.items():
        lo, hi = row["ci95"]
        lines.append(
            f"{name:<22}{row['pass_rate']:>10.3f}  [{lo:.3f}, {hi:.3f}]  {row['mean_score']:>7.3f}{row['n']:>6}"
            f"{row['steps']:>7}{row['cfg']:>5g}{row['nfe_per_goal']:>7.1f}"
        )
    return "\n".join(lines)
