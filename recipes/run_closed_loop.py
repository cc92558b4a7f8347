"""Closed-loop inference: the controller reasons, looks and decides, the diffusion model draws (CLVR 3.3, A.8).

Writes runs/<run>/{config.yaml, trajectories.jsonl, images/, closed_loop.json, pages/}: the trajectories have the format
that training reads, the summary says for every goal why it ended and what it cost, and `pages/` shows each to people.
"""

import json
import logging
import sys
from pathlib import Path

import torch
import transformers
from omegaconf import DictConfig
from tqdm import tqdm

from clvr_train.data.sharegpt import write_trajectories
from clvr_train.evaluation.html import trajectory_gallery, write_report
from clvr_train.inference.closed_loop import run_closed_loop
from clvr_train.models.qwen_vl import load_controller
from clvr_train.models.sampler import Sampler
from clvr_train.runtime.files import write_atomic
from recipes._build import build_budget, build_conditioner, build_klein
from recipes._recipe import recipe, run_folder

logger = logging.getLogger(__name__)
MAX_GOAL = 20_000  # characters; more than any controller's window holds
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


def read_goals(cfg: DictConfig) -> list[tuple[str, str]]:
    """(id, text) of every goal that the config names.

    Raises:
        ValueError: there is none, one is too long, or the file is no text.
    """
    texts = [(f"goals[{number}]", str(goal).strip()) for number, goal in enumerate(cfg.goals)]
    if cfg.goals_file is not None:
        try:
            content = sys.stdin.buffer.read() if cfg.goals_file == "-" else Path(cfg.goals_file).read_bytes()
            lines = content.decode().splitlines()
        except UnicodeDecodeError as error:
            raise ValueError(f"{cfg.goals_file}: not a text file in UTF-8") from error
        texts += [(f"{cfg.goals_file}:{number}", line.strip()) for number, line in enumerate(lines, start=1)]
    for place, text in texts:
        if len(text) > MAX_GOAL:
            raise ValueError(f"{place}: a goal of {len(text):,} characters; at most {MAX_GOAL:,} are read")
    texts = [text for _, text in texts if text]
    if not texts:
        raise ValueError("there is no goal; give goals=[...] or goals_file=...")
    return [(f"goal-{number:04d}", text) for number, text in enumerate(texts, start=1)]


@recipe("run_closed_loop")
def main(cfg: DictConfig) -> None:
    if cfg.controller.precision not in PRECISIONS:
        raise ValueError(f"controller.precision={cfg.controller.precision!r} is not one of {', '.join(PRECISIONS)}")
    goals, budget = read_goals(cfg), build_budget(cfg)
    run = run_folder(cfg)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    controller = load_controller(
        Path(cfg.controller.folder),
        device=cfg.controller.device,
        dtype=PRECISIONS[cfg.controller.precision],
        max_pixels=cfg.controller.max_pixels,
        max_new_tokens=cfg.controller.max_new_tokens,
        batch=cfg.controller.batch,
    )
    klein = build_klein(cfg.model, expect=None)
    sampler = Sampler(build_conditioner(klein, cfg.model), steps=cfg.steps, cfg=cfg.cfg, batch=cfg.batch)
    with tqdm(total=len(goals), desc="run_closed_loop") as bar:
        results = run_closed_loop(
            controller,
            sampler.draw,
            goals,
            budget=budget,
            retries=cfg.retries,
            seed=cfg.seed,
            nfe_per_image=sampler.nfe_per_image,
            on_done=bar.update,
        )
    drawn = [result.trajectory for result in results if result.trajectory is not None]
    write_trajectories(run, drawn)
    rows = [
        {"id": name, "goal": text, "stop_reason": r.stop_reason, "nfe": r.nfe, "seconds": round(r.seconds, 3),
         "turn_seconds": [round(seconds, 3) for seconds in r.turn_seconds],
         "images": len(r.trajectory.images) if r.trajectory else 0}
        for (name, text), r in zip(goals, results, strict=True)
    ]  # fmt: skip
    (run / "pages").mkdir(exist_ok=True)
    for row, result in zip(rows, results, strict=True):
        note = "{stop_reason}: {images} images, {nfe} network evaluations, {seconds} s".format(**row)
        galleries = [trajectory_gallery(result.trajectory, note)] if result.trajectory else []
        page = run / "pages" / f"{row['id']}.html"
        write_report(page, title=row["goal"], summary={}, curves={}, galleries=galleries, notes=[note])
    write_atomic(run / "closed_loop.json", json.dumps(rows, indent=2, ensure_ascii=False) + "\n")
    logger.info("%d of %d goals drawn, in %s", len(drawn), len(goals), run)


if __name__ == "__main__":
    main()
