"""What thinking is worth: pass rate, network evaluations and seconds by budget and by rounds, from one evaluation.

The noise of an image depends on its place in its trajectory alone, so a loop that may draw k images draws the first k
of one that may draw more, and ends with the last of them. One evaluation with the largest budget therefore holds the
results of all smaller ones.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from clvr_train.method.statistics import mean_se, wilson


@dataclass(frozen=True)
class Canvases:
    """A goal's images, graded: whether each passes, its score, and the seconds until it was there.

    `level` is the goal's number of objects, `seconds` is the time to the end of the loop.
    """

    level: int
    passed: tuple[bool, ...]
    scores: tuple[float, ...]
    ready: tuple[float, ...]
    seconds: float


def by_budget(goals: Sequence[Canvases], max_rounds: int, nfe_per_image: int) -> list[dict[str, Any]]:
    """For every number of images up to `max_rounds` a row: pass rate with Wilson's 95 % interval, mean score, means of
    images, network evaluations and seconds, and the pass rate by level. A goal without an image fails.

    Raises:
        ValueError: no goals.
    """
    if not goals:
        raise ValueError("no goals to summarise")
    table = []
    for budget in range(1, max_rounds + 1):
        drawn = [min(budget, len(goal.passed)) for goal in goals]
        passed = [k > 0 and goal.passed[k - 1] for goal, k in zip(goals, drawn, strict=True)]
        scores = [goal.scores[k - 1] if k else 0.0 for goal, k in zip(goals, drawn, strict=True)]
        # Who needs fewer images than allowed also takes the time to say that it is done.
        seconds = [goal.ready[budget - 1] if len(goal.ready) >= budget else goal.seconds for goal in goals]
        levels = sorted({goal.level for goal in goals})
        table.append({
            "max_rounds": budget,
            **_rate(passed),
            "mean_score": sum(scores) / len(goals),
            "rounds_per_goal": sum(drawn) / len(goals),
            "nfe_per_goal": nfe_per_image * sum(drawn) / len(goals),
            "seconds_per_goal": sum(seconds) / len(goals),
            "levels": {
                str(level): _rate([p for p, goal in zip(passed, goals, strict=True) if goal.level == level])
                for level in levels
            },
        })  # fmt: skip
    return table


def by_rounds(goals: Sequence[Canvases], nfe_per_image: int) -> list[dict[str, Any]]:
    """For every number of images that goals took a row: how many, pass rate, network evaluations, seconds with the
    standard error of their mean (None for one goal), as the paper's table 8 has them.
    """
    table = []
    for rounds in sorted({len(goal.passed) for goal in goals}):
        same = [goal for goal in goals if len(goal.passed) == rounds]
        mean, se = mean_se([goal.seconds for goal in same]) if len(same) > 1 else (same[0].seconds, None)
        passed = [bool(goal.passed) and goal.passed[-1] for goal in same]
        row = {"rounds": rounds, **_rate(passed), "nfe": nfe_per_image * rounds}
        table.append(row | {"seconds": mean, "seconds_se": se})
    return table


def _rate(passed: Sequence[bool]) -> dict[str, Any]:
    return {"pass_rate": sum(passed) / len(passed), "n": len(passed), "ci95": list(wilson(sum(passed), len(passed)))}
