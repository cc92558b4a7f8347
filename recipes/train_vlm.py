"""Full-parameter SFT of the VLM controller on trajectories, loss on the assistant's turns (CLVR A.6).

Writes runs/<run>/{config.yaml, metrics.jsonl, checkpoints/, model/}; `model/` is a transformers folder. On several
GPUs: torchrun --standalone --nproc_per_node N recipes/train_vlm.py ... engine=zero2. To resume, run the same command
again, on as many GPUs as there are.
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
from clvr_train.models.qwen_vl import add_image_tokens, load_vlm, make_tiny_controller, set_checkpointing
from clvr_train.runtime.distributed import World, start
from clvr_train.runtime.engine import Engine
from clvr_train.sft.chats import Fitted, chat_of, fit_chats
from clvr_train.sft.vlm import sft_config, train_controller
from clvr_train.shapes.controller import make_trajectories
from recipes._build import is_finished
from recipes._data import read_folder
from recipes._recipe import recipe, run_folder

logger = logging.getLogger(__name__)
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
DEVICES = ("cpu", "cuda", "auto")
MAY_CHANGE = ("train.log_every", "train.save_every", "train.workers", "validation.every", "validation.batch")
MAY_CHANGE += ("engine.name", "engine.offload", "engine.checkpointing", "engine.timeout_s")


@recipe("train_vlm")
def main(cfg: DictConfig) -> None:
    device = cfg.controller.device
    for key, value, choices in (
        ("controller.device", device, DEVICES),
        ("train.save_precision", cfg.train.save_precision, tuple(PRECISIONS)),
    ):
        if value not in choices:
            raise ValueError(f"{key}={value!r} is not one of {', '.join(choices)}")
    if cfg.engine.compile:
        raise ValueError("engine.compile=true: trajectories have all lengths, each would be compiled; choose false")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with start(device, timeout_s=cfg.engine.timeout_s, collectives=cfg.engine.name != "single") as world:
        train(cfg, world)


def train(cfg: DictConfig, world: World) -> None:
    run = run_folder(cfg, MAY_CHANGE, world)
    if is_finished(run):
        return
    section = cfg.train
    trajectories = read(cfg.data, "train", cfg.seed, cfg.data.max_refused, cfg.data.limit)
    folder = untrained(cfg, trajectories, run, world)
    dtype = torch.float32 if cfg.engine.precision == "fp32" else torch.bfloat16
    model, processor = load_vlm(folder, dtype=dtype, max_pixels=cfg.controller.max_pixels)
    check_image_tokens(trajectories, cfg.controller.image_tokens)
    add_image_tokens(model, processor, cfg.controller.image_tokens)
    model.model.visual.requires_grad_(section.vision)
    set_checkpointing(model, cfg.engine.checkpointing)

    def fitted(some: list[Trajectory]) -> Fitted:
        return fit_chats([chat_of(t) for t in some], processor, section.max_length, section.too_long)

    chats = told(fitted(trajectories), section.max_length)
    held_out = []
    if cfg.validation.folder is not None or cfg.validation.trajectories:
        held_out = read(cfg.validation, "eval", cfg.seed, 0.0, cfg.validation.num)
    whole = {t.id: t for t in held_out}
    validation = [(whole[chat.name], chat) for chat in fitted(held_out).chats] if held_out else []

    steps = section.steps or math.ceil(section.epochs * len(chats) / section.batch)
    logger.info("%d trajectories, %d steps", len(chats), steps)
    config = sft_config(
        run,
        steps=steps,
        batch=section.batch,
        micro_batch=section.micro_batch,
        world_size=world.size,
        seed=cfg.seed,
        device=world.device.type,
        workers=section.workers,
        log_every=section.log_every,
        save_every=section.save_every,
    )

    def make_engine(model: torch.nn.Module) -> Engine:
        return Engine(
            model,
            world,
            name=cfg.engine.name,
            precision=cfg.engine.precision,
            optimizer=cfg.engine.optimizer,
            offload=cfg.engine.offload,
            lr=section.lr,
            total_steps=steps,
            schedule=section.schedule,
            warmup_steps=math.ceil(section.warmup_ratio * steps),
            weight_decay=section.weight_decay,
            clip=section.clip,
            dump=run / "nonfinite",
        )

    with tqdm(total=steps, desc="train_vlm", disable=not world.first) as bar:
        train_controller(
            model,
            processor,
            chats,
            run,
            config,
            make_engine,
            save_dtype=PRECISIONS[section.save_precision],
            validation=validation,
            validate_every=cfg.validation.every,
            reply_batch=cfg.validation.batch,
            max_new_tokens=cfg.validation.max_new_tokens,
            wandb=cfg.logger.wandb,
            on_step=lambda step: bar.update(step - bar.n),
        )
    logger.info("the controller is in %s", run / "model")


def read(source: DictConfig, split: str, seed: int, max_refused: float, limit: int | None) -> list[Trajectory]:
    """The trajectories of a folder, or of the shapes world where `source.trajectories` asks for some."""
    if source.trajectories:
        return list(make_trajectories(source.trajectories, seed, split))
    return read_folder(source.folder, Refusals(source.folder, max_refused), limit)


def untrained(cfg: DictConfig, trajectories: list[Trajectory], run: Path, world: World) -> Path:
    """The folder to start from; for `untrained` a tiny controller with random weights is made there, whose tokenizer is
    trained on the trajectories.
    """
    if cfg.controller.folder != "untrained":
        return Path(cfg.controller.folder)
    folder = run / "untrained"
    if world.first and not folder.exists():
        texts = [text for t in trajectories for text in (t.goal, *(format_turn(step, 1) for step in t.steps))]
        make_tiny_controller(folder, texts, cfg.seed, width=cfg.controller.width, layers=cfg.controller.layers)
    world.barrier()
    return folder


def check_image_tokens(trajectories: list[Trajectory], number: int) -> None:
    """Raises a ValueError if a trajectory draws an image whose marker would be no token while others are."""
    for t in trajectories:
        if 0 < number < len(t.images):
            raise ValueError(f"trajectory {t.id!r} draws {len(t.images)} images: controller.image_tokens={number}")


def told(fitted: Fitted, max_length: int | None) -> list:
    """The chats of `fitted`; what was lost is logged."""
    if fitted.lost_turns:
        logger.warning(
            "of trajectories longer than train.max_length=%d, %d were shortened and %d left out: %d turns are lost",
            max_length, fitted.shortened, len(fitted.left_out), fitted.lost_turns,
        )  # fmt: skip
    return fitted.chats


if __name__ == "__main__":
    main()
