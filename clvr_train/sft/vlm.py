"""SFT of the VLM controller: full parameters, loss on the assistant's turns only (CLVR A.6). The loop is TRL's.

TRL tokenises and loads images on the fly; its own collator makes the loss mask from the `{% generation %}` marks of the
chat template. Its checkpoints hold the weights as safetensors, but optimiser, schedule and random state as `.pt` files:
transformers reads those with `weights_only=True`, which runs no code of theirs. Still, resume only runs you made.
"""

import contextlib
import functools
import json
import math
import os
import random
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

from datasets import Dataset
from transformers import (
    PrinterCallback,
    ProgressCallback,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    TrainerCallback,
)
from trl import SFTConfig, SFTTrainer

from clvr_train.data.images import open_image
from clvr_train.data.order import Order
from clvr_train.method.protocol import chat_messages
from clvr_train.method.trajectory import ImageLike, Trajectory
from clvr_train.models.qwen_vl import save_vlm
from clvr_train.runtime.metrics import Metrics

_LOGGED = ("loss", "grad_norm", "learning_rate", "mean_token_accuracy")


def chat_example(trajectory: Trajectory) -> dict:
    """A trajectory as TRL wants it: messages with an empty image part where each image goes, and the images in order.

    Plain strings would not do: TRL puts all images of such a chat before its first turn.
    """
    messages = [
        {**message, "content": [{"type": "image"} if "image" in part else part for part in message["content"]]}
        for message in chat_messages(trajectory.goal, trajectory.steps)
    ]
    return {"messages": messages, "images": list(trajectory.images)}


def training_order(sizes: list[tuple], steps: int, batch: int, seed: int, window: int = 16) -> list[int]:
    """The trajectory at every position of the training, a function of its arguments alone.

    Within `window` batches the trajectories are sorted by size, so that a batch is padded little, and the batches
    shuffled. Every epoch still visits every trajectory once.
    """
    order = Order(len(sizes), batch, seed)
    result: list[int] = []
    for start in range(0, steps, window):
        number = min(window, steps - start)
        indices = [index for step in range(start, start + number) for _, index in order.batch(step)]
        indices.sort(key=lambda index: sizes[index])
        batches = [indices[i : i + batch] for i in range(0, len(indices), batch)]
        random.Random(f"batches/{seed}/{start}").shuffle(batches)
        result += [index for one in batches for index in one]
    return result


def _chats(trajectories: list[Trajectory], order: list[int]) -> Dataset:
    """The examples in the order of training; images are opened when their turn comes."""
    examples = [chat_example(trajectory) for trajectory in trajectories]
    images = [example["images"] for example in examples]
    columns = {"chat": [json.dumps(example["messages"]) for example in examples], "row": list(range(len(examples)))}
    return Dataset.from_dict(columns).select(order).with_transform(functools.partial(_opened, images))


def _opened(images: list[list[ImageLike]], rows: dict[str, list]) -> dict[str, list]:
    return {
        "messages": [json.loads(chat) for chat in rows["chat"]],
        "images": [[open_image(image) for image in images[row]] for row in rows["row"]],
    }


class _Report(TrainerCallback):
    def __init__(self, metrics: Metrics | None, on_step: Callable[[int], None] | None) -> None:
        self.metrics, self.on_step = metrics, on_step

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        values = {("lr" if name == "learning_rate" else name): logs[name] for name in _LOGGED if name in logs}
        if self.metrics is not None and values:
            self.metrics.log(state.global_step, **values)

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if self.on_step is not None:
            self.on_step(state.global_step)


def last_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint of a run; one that a kill left unfinished is removed."""
    whole: list[tuple[int, Path]] = []
    for path in folder.glob("checkpoint-*"):
        try:
            state = json.loads((path / "trainer_state.json").read_text())  # the last file to be written
            whole.append((state["global_step"], path))
        except (OSError, ValueError, KeyError):
            shutil.rmtree(path)
    return max(whole)[1] if whole else None


def sft_config(
    run: Path,
    *,
    steps: int,
    lr: float,
    batch: int = 8,
    micro_batch: int = 1,
    schedule: str = "cosine",
    warmup_ratio: float = 0.03,
    weight_decay: float = 0.0,
    clip: float = 1.0,
    seed: int = 0,
    device: str = "cpu",
    bf16: bool = False,
    gradient_checkpointing: bool = False,
    workers: int = 0,
    log_every: int = 10,
    save_every: int = 500,
) -> SFTConfig:
    """TRL's settings for a controller: `batch` trajectories in an optimiser step over all processes, `micro_batch` of
    them in a forward of one process.

    Raises:
        ValueError: if `batch` is no multiple of `micro_batch` times the number of processes.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if batch % (micro_batch * world):
        raise ValueError(f"batch={batch}: must be a multiple of micro_batch={micro_batch} x {world} processes")
    with warnings.catch_warnings():
        # TRL sets this option by its old name whatever we do; its new name is younger than the oldest version we run.
        warnings.filterwarnings("ignore", message=".*gradient_checkpointing", category=FutureWarning)
        return SFTConfig(
            output_dir=str(run / "checkpoints"),
            assistant_only_loss=True,
            max_length=None,  # a cut would separate image tokens from their images
            max_steps=steps,
            per_device_train_batch_size=micro_batch,
            gradient_accumulation_steps=batch // (micro_batch * world),
            learning_rate=lr,
            lr_scheduler_type=schedule,
            warmup_steps=math.ceil(warmup_ratio * steps),
            weight_decay=weight_decay,
            max_grad_norm=clip,
            optim="adamw_torch",
            bf16=bf16,
            use_cpu=device == "cpu",
            gradient_checkpointing=gradient_checkpointing,
            seed=seed,
            train_sampling_strategy="sequential",  # the data set is already in training order
            remove_unused_columns=False,
            dataloader_num_workers=workers,
            dataloader_pin_memory=device != "cpu",
            logging_steps=log_every,
            save_steps=save_every,
            save_total_limit=1,
            report_to="none",
            disable_tqdm=True,
        )


def build_trainer(
    model: Qwen3VLForConditionalGeneration,
    processor: Qwen3VLProcessor,
    trajectories: list[Trajectory],
    config: SFTConfig,
) -> SFTTrainer:
    """TRL's trainer over the trajectories, silent, in an order that depends on the config's seed and batch alone."""
    batch = config.per_device_train_batch_size * config.gradient_accumulation_steps * config.world_size
    sizes = [(len(t.images), sum(len(step.reasoning) for step in t.steps)) for t in trajectories]
    order = training_order(sizes, config.max_steps, batch, config.seed)
    trainer = SFTTrainer(model, config, train_dataset=_chats(trajectories, order), processing_class=processor)
    for noise in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(noise)
    return trainer


def train_controller(
    model: Qwen3VLForConditionalGeneration,
    processor: Qwen3VLProcessor,
    trajectories: list[Trajectory],
    run: Path,
    config: SFTConfig,
    *,
    wandb: dict | None = None,
    on_step: Callable[[int], None] | None = None,
) -> Path:
    """Trains all parameters of the controller and returns the folder of the result, `<run>/model`.

    Called again after a kill it goes on from the last checkpoint of the run. Also writes `<run>/metrics.jsonl`.

    Args:
        trajectories: with images as pointers (`data.readers.read_trajectories`).
        config: of `sft_config`, with the same `run`.
        on_step: called after each step with the number of steps done.
    """
    checkpoint = last_checkpoint(run / "checkpoints")
    resume_step = int(checkpoint.name.rpartition("-")[2]) if checkpoint else None
    trainer = build_trainer(model, processor, trajectories, config)
    with contextlib.ExitStack() as stack:
        metrics = None
        if config.process_index == 0:
            metrics = stack.enter_context(Metrics(run, resume_step=resume_step, wandb=wandb))
        trainer.add_callback(_Report(metrics, on_step))
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if config.process_index == 0:
        save_vlm(trainer.accelerator.unwrap_model(trainer.model), processor, run / "model")
    return run / "model"
