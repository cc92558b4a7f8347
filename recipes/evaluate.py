"""Scores one system on a benchmark: the shapes world's, whose goals no training saw, or an outside one's checkout.

`mode=single_step` draws once from the goal alone; `mode=closed_loop` lets the controller plan, look and edit. Writes
runs/<run>/{config.yaml, evaluation.json, outcomes.jsonl}, with benchmark=shapes samples.png and, in closed loop, the
trajectories drawn; with another benchmark images/, what was drawn, in the layout of its scorer, and verdicts.jsonl or
scorer/. Several processes (launch/torchrun.sh) share the goals out. docs/evaluation.md has the commands.
"""

import json
import logging
import shutil
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path

from omegaconf import DictConfig
from PIL import Image
from tqdm import tqdm

from clvr_train.data.images import open_image
from clvr_train.data.readers import read_trajectories
from clvr_train.data.sharegpt import write_trajectories
from clvr_train.evaluation.checkout import Item
from clvr_train.evaluation.drawing import Drawn
from clvr_train.evaluation.runner import Goal, Outcome, draw_single, outcome, rows, single_step, summarise
from clvr_train.inference.closed_loop import Result, run_closed_loop
from clvr_train.inference.loop import open_controller
from clvr_train.models.sampler import Sampler
from clvr_train.runtime.distributed import World, start
from clvr_train.runtime.files import write_atomic
from clvr_train.shapes.benchmark import benchmark_goals, grade
from recipes._benchmarks import MAY_CHANGE, build_benchmark, draw_benchmark, score_benchmark
from recipes._build import build_budget, build_conditioner, build_klein
from recipes._recipe import recipe, run_folder

logger = logging.getLogger(__name__)
MODES = ("single_step", "closed_loop")
Loop = Callable[[Sequence[tuple[str, str]], Callable[[int], None] | None], list[Result]]


def build_loop(cfg: DictConfig, sampler: Sampler, world: World) -> Loop:
    """The controller's rounds over (id, text) pairs."""
    chat = {name: cfg[f"controller_{name}"] for name in ("name", "key_env") if cfg[f"controller_{name}"] is not None}
    controller = open_controller(cfg.controller, device=world.device, max_pixels=None, max_new_tokens=128, **chat)
    budget = build_budget(cfg)

    def loop(goals: Sequence[tuple[str, str]], on_done: Callable[[int], None] | None = None) -> list[Result]:
        options = {"budget": budget, "seed": cfg.seed, "nfe_per_image": sampler.nfe_per_image, "on_done": on_done}
        results = run_closed_loop(controller, sampler.draw, goals, **options)
        lost = [result.stop_reason for result in results if result.stop_reason.startswith("controller: ")]
        if lost:  # no fault of what is evaluated
            raise OSError(f"{len(lost)} of {len(goals)} goals got no reply ({lost[0]}); run the same command again")
        return results

    return loop


def shapes_outcomes(cfg: DictConfig, run: Path, world: World, sampler: Sampler) -> tuple[list[Outcome], list]:
    """This rank's goals, graded, and their images; in closed loop writes the trajectories of all ranks."""
    goals = [Goal(f"eval-{i:04d}", *row) for i, row in enumerate(benchmark_goals(cfg.num, seed=cfg.benchmark_seed))]
    goals = world.share([goal for goal in goals if goal.level >= cfg.min_level])
    if cfg.mode == "single_step":
        return single_step(sampler, goals, grade, cfg.seed, cfg.batch)
    loop = build_loop(cfg, sampler, world)
    with tqdm(total=len(goals), desc="evaluate") as bar:
        results = loop([(goal.id, goal.text) for goal in goals], bar.update)
    drawn = [result.trajectory for result in results if result.trajectory is not None]
    write_trajectories(run if world.size == 1 else run / f"rank-{world.rank}", drawn)
    world.barrier()
    if world.first and world.size > 1:
        parts = [run / f"rank-{rank}" for rank in range(world.size)]
        write_trajectories(run, chain.from_iterable(read_trajectories(part) for part in parts if _any(part)))
        for part in parts:
            shutil.rmtree(part)
    images = [_last(result) for result in results]
    outcomes = []
    for goal, result, image in zip(goals, results, images, strict=True):
        outcomes.append(outcome(goal, image, grade, **_facts(result)))
    return outcomes, images


def shapes(cfg: DictConfig, run: Path, world: World, sampler: Sampler) -> None:
    """The benchmark of the shapes world, graded by the exact reader."""
    outcomes, images = shapes_outcomes(cfg, run, world, sampler)
    outcomes = [Outcome(**row) for part in world.gather(rows(outcomes)) for row in part]
    if not world.first:
        return
    save_grid([image for image in images if image is not None][:64], run / "samples.png")
    write_atomic(run / "outcomes.jsonl", "".join(json.dumps(row) + "\n" for row in rows(outcomes)))
    summary = summarise(outcomes, steps=cfg.steps, cfg=cfg.cfg, mode=cfg.mode)
    write_atomic(run / "evaluation.json", json.dumps(summary, indent=2) + "\n")
    logger.info("%s: pass rate %.3f (95 %%: %.3f to %.3f)", cfg.run, summary["pass_rate"], *summary["ci95"])


def outside_draw(cfg: DictConfig, sampler: Sampler, world: World) -> Callable[[Sequence[Item]], list[Drawn]]:
    """Draws items of an outside benchmark; noise depends on the seed and on prompt and sample, which an id names."""
    if cfg.mode == "single_step":
        return lambda items: draw_single(sampler, items, cfg.seed)
    loop = build_loop(cfg, sampler, world)

    def draw(items: Sequence[Item]) -> list[Drawn]:
        results = loop([(item.id, item.text) for item in items])
        return [Drawn(image=_last(result), **_facts(result)) for result in results]

    return draw


@recipe("evaluate")
def main(cfg: DictConfig) -> None:
    if cfg.mode not in MODES:
        raise ValueError(f"mode={cfg.mode!r} is not one of {', '.join(MODES)}")
    if cfg.mode == "closed_loop" and cfg.controller is None:
        raise ValueError("mode=closed_loop needs controller=FOLDER, the model of a recipes/train_vlm.py run")
    benchmark = None if cfg.benchmark.name == "shapes" else build_benchmark(cfg)
    with start(cfg.model.device) as world:
        run = run_folder(cfg, MAY_CHANGE, world)
        if (run / "evaluation.json").exists():
            logger.info("%s is there already; remove it to evaluate again", run / "evaluation.json")
            return
        klein = build_klein(cfg.model, expect=None, device=world.device)
        sampler = Sampler(build_conditioner(klein, cfg.model), steps=cfg.steps, cfg=cfg.cfg, batch=cfg.batch)
        if benchmark is None:
            shapes(cfg, run, world, sampler)
        else:
            draw_benchmark(benchmark, run, world, outside_draw(cfg, sampler, world), cfg.batch)
        if sampler.conditioner.texts_cut:
            logger.info("%d texts were cut to the window of %d tokens", sampler.conditioner.texts_cut, klein.window)
    if benchmark is not None and world.first:  # the others are not kept waiting for a scorer
        score_benchmark(cfg, benchmark, run)


def _any(folder: Path) -> bool:
    return (folder / "trajectories.jsonl").stat().st_size > 0


def _last(result: Result) -> Image.Image | None:
    return open_image(result.trajectory.images[-1]) if result.trajectory is not None else None


def _facts(result: Result) -> dict:
    rounds = len(result.trajectory.images) if result.trajectory is not None else 0
    return {"rounds": rounds, "nfe": result.nfe, "seconds": result.seconds, "stop": result.stop_reason}


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
