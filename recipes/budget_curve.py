"""The effect of the thinking budget on the shapes benchmark: one evaluation in closed loop gives the whole curve.

Writes runs/<run>/{config.yaml, budget_curve.json, budget_curve.html} beside what run_closed_loop writes: pass rate,
network evaluations and seconds for every number of images up to `max_rounds`, and by the number that goals took. The
same command again goes on after an interruption.
"""

import json
import logging
from itertools import accumulate

from omegaconf import DictConfig

from clvr_train.data.images import open_image
from clvr_train.evaluation.budget import Canvases, by_budget, by_rounds
from clvr_train.evaluation.html import write_report
from clvr_train.evaluation.runner import Goal
from clvr_train.inference.closed_loop import Result
from clvr_train.runtime.files import write_atomic
from clvr_train.shapes.benchmark import benchmark_goals, grade
from recipes._build import build_budget
from recipes._closed_loop import draw_goals
from recipes._recipe import recipe, run_folder

logger = logging.getLogger(__name__)


def canvases(goal: Goal, result: Result) -> Canvases:
    """The images of a goal, graded by the exact reader."""
    steps = result.trajectory.steps if result.trajectory else ()
    grades = [grade(goal.text, open_image(step.image)) for step in steps if step.draws]
    ready = tuple(s for step, s in zip(steps, accumulate(result.turn_seconds), strict=False) if step.draws)
    passed, scores = tuple(bool(each) for each, _ in grades), tuple(float(score) for _, score in grades)
    return Canvases(goal.level, passed, scores, ready, result.seconds)


@recipe("budget_curve")
def main(cfg: DictConfig) -> None:
    budget = build_budget(cfg)
    run = run_folder(cfg)
    goals = [Goal(f"eval-{i:04d}", *row) for i, row in enumerate(benchmark_goals(cfg.num, seed=cfg.benchmark_seed))]
    goals = [goal for goal in goals if goal.level >= cfg.min_level]
    results, nfe_per_image = draw_goals(cfg, run, [(goal.id, goal.text) for goal in goals])
    lost = sum(result.stop_reason.startswith("controller: ") for result in results.values())
    if lost:
        raise OSError(f"{lost} of {len(goals)} goals got no reply from the controller; run the same command again")
    graded = [canvases(goal, results[goal.id]) for goal in goals]
    rows = by_budget(graded, budget.max_rounds, nfe_per_image)
    found = {"by_budget": rows, "by_rounds": by_rounds(graded, nfe_per_image), "nfe_per_image": nfe_per_image}
    curves = {
        title: [(row["max_rounds"], row[key]) for row in rows]
        for title, key in (
            ("pass rate by most images", "pass_rate"),
            ("mean score by most images", "mean_score"),
            ("network evaluations a goal by most images", "nfe_per_goal"),
            ("seconds a goal by most images", "seconds_per_goal"),
        )
    }
    title = f"Thinking budget: {cfg.run}"
    write_report(run / "budget_curve.html", title=title, summary={}, curves=curves, galleries=[])
    write_atomic(run / "budget_curve.json", json.dumps(found, indent=2) + "\n")
    for row in rows:
        lo, hi = row["ci95"]
        logger.info(
            "at most %d images: pass rate %.3f [%.3f, %.3f], %.1f network evaluations and %.2f s a goal",
            row["max_rounds"], row["pass_rate"], lo, hi, row["nfe_per_goal"], row["seconds_per_goal"],
        )  # fmt: skip


if __name__ == "__main__":
    main()
