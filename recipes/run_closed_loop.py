"""Closed-loop inference: the controller reasons, looks and decides, the diffusion model draws (CLVR 3.3, A.8).

Writes runs/<run>/{config.yaml, trajectories.jsonl, images/, closed_loop.json}: the trajectories have the format that
training reads, the summary says for every goal why it ended and what it cost.
"""

import json
import logging
from pathlib import Path

import torch
import transformers
from omegaconf import DictConfig
from tqdm import tqdm

from clvr_train.data.sharegpt import write_trajectories
from clvr_train.inference.closed_loop import run_closed_loop
from clvr_train.models.qwen_vl import load_controller
from clvr_train.models.sampler import Sampler
from clvr_train.runtime.files import write_atomic
from recipes._build import build_conditioner, build_klein
from recipes._recipe import recipe, run_folder

logger = logging.getLogger(__name__)
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


def read_goals(cfg: DictConfig) -> list[tuple[str, str]]:
    """(id, text) of every goal that the config names.

    Raises:
        ValueError: there is none, or the file is no text.
    """
    texts = [str(goal).strip() for goal in cfg.goals]
    if cfg.goals_file is not None:
        try:
            lines = Path(cfg.goals_file).read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError as error:
            raise ValueError(f"{cfg.goals_file}: not a text file in UTF-8") from error
        texts += [line.strip() for line in lines]
    texts = [text for text in texts if text]
    if not texts:
        raise ValueError("there is no goal; give goals=[...] or goals_file=...")
    return [(f"goal-{number:04d}", text) for number, text in enumerate(texts, start=1)]


@recipe("run_closed_loop")
def main(cfg: DictConfig) -> None:
    if cfg.controller.precision not in PRECISIONS:
        raise ValueError(f"controller.precision={cfg.controller.precision!r} is not one of {', '.join(PRECISIONS)}")
    goals = read_goals(cfg)
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
            max_rounds=cfg.max_rounds,
            max_verify=cfg.max_verify,
            retries=cfg.retries,
            seed=cfg.seed,
            nfe_per_image=sampler.nfe_per_image,
            on_done=bar.update,
        )
    drawn = [result.trajectory for result in results if result.trajectory is not None]
    write_trajectories(run, drawn)
    rows = [
        {"id": name, "goal": text, "stop_reason": r.stop_reason, "nfe": r.nfe, "seconds": round(r.seconds, 3),
         "images": len(r.trajectory.images) if r.trajectory else 0}
        for (name, text), r in zip(goals, results, strict=True)
    ]  # fmt: skip
    write_atomic(run / "closed_loop.json", json.dumps(rows, indent=2, ensure_ascii=False) + "\n")
    logger.info("%d of %d goals drawn, in %s", len(drawn), len(goals), run)


if __name__ == "__main__":
    main()
