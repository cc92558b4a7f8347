"""Full-parameter SFT of the VLM controller on trajectories, loss on the assistant's turns (CLVR A.6).

Writes runs/<run>/{config.yaml, metrics.jsonl, checkpoints/, model/}; `model/` is a transformers folder. To resume, run
the same command again.
"""

import logging
import math
from pathlib import Path

import torch
import transformers
from omegaconf import DictConfig
from tqdm import tqdm

from clvr_train.data.refusals import Refusals
from clvr_train.method.protocol import format_turn
from clvr_train.method.trajectory import Trajectory
from clvr_train.models.qwen_vl import load_vlm, make_tiny_controller
from clvr_train.sft.vlm import sft_config, train_controller
from recipes._data import read_folder
from recipes._recipe import recipe, run_folder

logger = logging.getLogger(__name__)
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


def untrained(cfg: DictConfig, trajectories: list[Trajectory], run: Path) -> Path:
    """Folder of a tiny controller with random weights whose tokenizer is trained on the trajectories."""
    folder = run / "untrained"
    if not folder.exists():
        texts = [text for t in trajectories for text in (t.goal, *(format_turn(step, 1) for step in t.steps))]
        make_tiny_controller(folder, texts, cfg.seed, width=cfg.controller.width, layers=cfg.controller.layers)
    return folder


@recipe("train_vlm")
def main(cfg: DictConfig) -> None:
    if cfg.controller.precision not in PRECISIONS:
        raise ValueError(f"controller.precision={cfg.controller.precision!r} is not one of {', '.join(PRECISIONS)}")
    run = run_folder(cfg)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    data = cfg.data
    trajectories = read_folder(data.folder, Refusals(data.folder, data.max_refused), data.limit)
    start = cfg.controller.folder
    folder = untrained(cfg, trajectories, run) if start == "untrained" else Path(start)
    dtype = PRECISIONS[cfg.controller.precision]
    model, processor = load_vlm(folder, dtype=dtype, max_pixels=cfg.controller.max_pixels)
    steps = cfg.train.steps or math.ceil(cfg.train.epochs * len(trajectories) / cfg.train.batch)
    logger.info("%d trajectories, %d steps", len(trajectories), steps)
    config = sft_config(
        run,
        steps=steps,
        lr=cfg.train.lr,
        batch=cfg.train.batch,
        micro_batch=cfg.train.micro_batch,
        schedule=cfg.train.schedule,
        warmup_ratio=cfg.train.warmup_ratio,
        weight_decay=cfg.train.weight_decay,
        clip=cfg.train.clip,
        seed=cfg.seed,
        device=cfg.controller.device,
        bf16=cfg.controller.precision == "bf16",
        gradient_checkpointing=cfg.train.gradient_checkpointing,
        workers=cfg.train.workers,
        log_every=cfg.train.log_every,
        save_every=cfg.train.save_every,
    )
    with tqdm(total=steps, desc="train_vlm", disable=config.process_index != 0) as bar:

        def on_step(step: int) -> None:
            bar.update(step - bar.n)

        train_controller(model, processor, trajectories, run, config, wandb=cfg.logger.wandb, on_step=on_step)
    logger.info("the controller is in %s", run / "model")


if __name__ == "__main__":
    main()
