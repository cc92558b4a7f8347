"""Scores one system on the shapes benchmark: goals that no training saw, graded by the exact reader.

`mode=single_step` draws once from the goal alone; `mode=closed_loop` lets the controller plan, look and edit. Writes
runs/<run>/{config.yaml, evaluation.json, outcomes.jsonl, samples.png} and, in closed loop, the trajectories drawn.
"""

import json
import logging
from pathlib import Path

from omegaconf import DictConfig
from PIL import Image
from tqdm import tqdm

from clvr_train.data.images import open_image
from clvr_train.data.sharegpt import write_trajectories
from clvr_train.evaluation.runner import Goal, Outcome, outcome, rows, single_step, summarise
from clvr_train.models.sampler import Sampler
from clvr_train.runtime.files import write_atomic
from clvr_train.shapes.benchmark import benchmark_goals, grade
from recipes._build import build_budget, build_conditioner, build_klein
from recipes._recipe import recipe, run_folder

logger = logging.getLogger(__name__)
MODES = ("single_step", "closed_loop")


def closed_loop(cfg: DictConfig, sampler: Sampler, goals: list[Goal], run: Path) -> tuple[list[Outcome], list]:
    """The controller's rounds; the last image is the result."""
    from clvr_train.inference.closed_loop import run_closed_loop
    from clvr_train.models.qwen_vl import load_controller

    controller = load_controller(Path(cfg.controller), device=cfg.model.device)
    with tqdm(total=len(goals), desc="evaluate") as bar:
        results = run_closed_loop(
            controller,
            sampler.draw,
            [(goal.id, goal.text) for goal in goals],
            budget=build_budget(cfg),
            seed=cfg.seed,
            nfe_per_image=sampler.nfe_per_image,
            on_done=bar.update,
        )
    write_trajectories(run, [result.trajectory for result in results if result.trajectory is not None])
    outcomes, images = [], []
    for goal, result in zip(goals, results, strict=True):
        drawn = result.trajectory.images if result.trajectory is not None else ()
        image = open_image(drawn[-1]) if drawn else None
        images.append(image)
        facts = {"rounds": len(drawn), "nfe": result.nfe, "seconds": result.seconds, "stop": result.stop_reason}
        outcomes.append(outcome(goal, image, grade, **facts))
    return outcomes, images


@recipe("evaluate")
def main(cfg: DictConfig) -> None:
    if cfg.mode not in MODES:
        raise ValueError(f"mode={cfg.mode!r} is not one of {', '.join(MODES)}")
    if cfg.mode == "closed_loop" and cfg.controller is None:
        raise ValueError("mode=closed_loop needs controller=FOLDER, the model of a recipes/train_vlm.py run")
    run = run_folder(cfg)
    if (run / "evaluation.json").exists():
        logger.info("%s is there already; remove it to evaluate again", run / "evaluation.json")
        return
    klein = build_klein(cfg.model, expect=None)
    sampler = Sampler(build_conditioner(klein, cfg.model), steps=cfg.steps, cfg=cfg.cfg, batch=cfg.batch)
    goals = [Goal(f"eval-{i:04d}", *row) for i, row in enumerate(benchmark_goals(cfg.num, seed=cfg.benchmark_seed))]
    goals = [goal for goal in goals if goal.level >= cfg.min_level]
    if cfg.mode == "single_step":
        outcomes, images = single_step(sampler, goals, grade, cfg.seed, cfg.batch)
    else:
        outcomes, images = closed_loop(cfg, sampler, goals, run)
    if sampler.conditioner.texts_cut:
        logger.info("%d texts were cut to the window of %d tokens", sampler.conditioner.texts_cut, klein.window)
    save_grid([image for image in images if image is not None][:64], run / "samples.png")
    write_atomic(run / "outcomes.jsonl", "".join(json.dumps(row) + "\n" for row in rows(outcomes)))
    summary = summarise(outcomes, steps=cfg.steps, cfg=cfg.cfg, mode=cfg.mode)
    write_atomic(run / "evaluation.json", json.dumps(summary, indent=2) + "\n")
    logger.info("%s: pass rate %.3f (95 %%: %.3f to %.3f)", cfg.run, summary["pass_rate"], *summary["ci95"])


def save_grid(images: list[Image.Image], path: Path, columns: int = 8) -> None:
    """The images side by side, as a PNG."""
    if not images:
        return
    width, height = images[0].size
    grid = Image.new("RGB", (columns * (width + 4), -(-len(images) // columns) * (height + 4)), "white")
    for i, image in enumerate(images):
        grid.paste(image, (i % columns * (width + 4), i // columns * (height + 4)))
    grid.save(path)


if __name__ == "__main__":
    main()
