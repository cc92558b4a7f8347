"""SFT of the VLM controller: full parameters, loss on the assistant's turns only (CLVR A.6). The loop is TRL's.

TRL tokenises, loads images on the fly, makes the loss mask from the `{% generation %}` marks of the chat template, and
computes the loss without the logits of whole sequences. What steps is `runtime.engine`, as in the other trainings: so
precision, optimisers, DeepSpeed, checkpoints (no pickle) and gradients that are not finite are the same everywhere.
"""

import contextlib
import functools
import json
import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from datasets import Dataset
from torch import Tensor
from transformers import (
    PrinterCallback,
    ProgressCallback,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    TrainerCallback,
)
from transformers.integrations import HfDeepSpeedConfig
from trl import SFTConfig, SFTTrainer
from trl.trainer.utils import add_fused_lm_head

from clvr_train.data.images import open_image
from clvr_train.data.order import Order
from clvr_train.method.trajectory import ImageLike, Trajectory
from clvr_train.models.qwen_vl import Controller, save_vlm
from clvr_train.models.utilisation import peak_of
from clvr_train.runtime.checkpoint import Saver
from clvr_train.runtime.clock import Clock, memory
from clvr_train.runtime.engine import Engine
from clvr_train.runtime.metrics import Metrics
from clvr_train.runtime.process import Deferral
from clvr_train.sft.chats import Chat
from clvr_train.sft.vlm_validation import validate

_LOGGED = ("loss", "grad_norm", "learning_rate", "mean_token_accuracy")


def training_order(sizes: Sequence[tuple], steps: int, batch: int, seed: int, window: int = 16) -> list[int]:
    """The chat at every position of the training, a function of its arguments alone.

    Within `window` batches the chats are sorted by size, so that a batch is padded little, and the batches shuffled.
    Every epoch still visits every chat once.
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


def chat_size(chat: Chat) -> tuple[int, int]:
    """What chats are sorted by: images, then characters."""
    return len(chat.images), sum(len(json.dumps(message["content"])) for message in chat.messages)


def _rows(chats: Sequence[Chat], order: list[int]) -> Dataset:
    """The chats in the order of training; images are opened when their turn comes."""
    columns = {"chat": [json.dumps(chat.messages) for chat in chats], "row": list(range(len(chats)))}
    opened = functools.partial(_opened, [chat.images for chat in chats])
    return Dataset.from_dict(columns).select(order).with_transform(opened)


def _opened(images: list[Sequence[ImageLike]], rows: dict[str, list]) -> dict[str, list]:
    return {
        "messages": [json.loads(chat) for chat in rows["chat"]],
        "images": [[open_image(image) for image in images[row]] for row in rows["row"]],
    }


class ControllerTrainer(SFTTrainer):
    """TRL's trainer over chats, silent, in an order that depends on seed and batch alone; `engine` does the steps.

    Give it the engine with `take` before `train`: an engine wants the model where the trainer has put it.
    """

    engine: Engine

    def __init__(
        self,
        model: Qwen3VLForConditionalGeneration,
        processor: Qwen3VLProcessor,
        chats: Sequence[Chat],
        config: SFTConfig,
    ) -> None:
        self.batch = config.per_device_train_batch_size * config.gradient_accumulation_steps * config.world_size
        order = training_order([chat_size(chat) for chat in chats], config.max_steps, self.batch, config.seed)
        super().__init__(model, config, train_dataset=_rows(chats, order), processing_class=processor)
        for noise in (PrinterCallback, ProgressCallback):
            self.remove_callback(noise)
        # The loss is a mean over the batch's tokens, however it is cut into micro-batches. Transformers would not count
        # them for this class, whose own loss takes no such number; TRL's does.
        self.model_accepts_loss_kwargs = True
        self._names = [chats[index].name for index in order]
        self._lr, self._losses = 0.0, []
        self.clock, self._tokens = Clock(), torch.zeros((), dtype=torch.long)
        self._num_chats, self._num_parameters = len(chats), sum(p.numel() for p in model.parameters())
        self._turns: Iterator[None] = iter(())

    def take(self, engine: Engine, saver: Saver) -> None:
        """Steps with this engine, from the batch that it has come to."""
        self.engine, self.saver = engine, saver
        rows = self.train_dataset
        self.train_dataset = rows.select(range(engine.batches * self.batch, len(rows)))

    def inputs(self, chats: Sequence[Chat]) -> dict[str, Tensor]:
        """The model's inputs and labels for chats, on its device."""
        rows = [
            {"messages": list(chat.messages), "images": [open_image(image) for image in chat.images]} for chat in chats
        ]
        return self._prepare_inputs(self.data_collator(rows))

    # ----------------------------------------------------------------- what the engine does instead of accelerate

    def _init_training_state(self, max_steps, num_update_steps, num_epochs, resume_from_checkpoint, trial):
        super()._init_training_state(max_steps, num_update_steps, num_epochs, None, trial)
        self.state.global_step = self.engine.batches
        return 0, 0  # the data set begins where the engine has come to

    def _prepare_for_training(self, max_steps, train_dataloader, resume_from_checkpoint):
        self.optimizer = self.lr_scheduler = _Still()
        self.model_wrapped = self.engine.module
        self.callback_handler.model = self.model
        return self.engine.module, train_dataloader

    def training_step(self, model, inputs, num_items_in_batch=None) -> Tensor:
        model.train()
        inputs = self._prepare_inputs(inputs)
        if next(self._turns, "over") == "over":
            self._turns = self.engine.turns([None] * self.args.gradient_accumulation_steps)
            next(self._turns)
        with self.clock.phase("forward_backward"):
            loss = self.compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
            # TRL's is the part of the global mean times the number of ranks, whose mean it takes for the log.
            self.engine.backward(loss / self.args.world_size)
        self._losses.append(loss.detach())
        self._tokens = self._tokens.to(loss.device) + inputs["attention_mask"].sum()
        return loss.detach()

    def measured(self) -> dict[str, float]:
        """Of the steps since the last call: where in the data they have come to, seconds by phase, memory, and on a GPU
        the MFU of this rank, at 6 FLOPs a parameter and token.
        """
        engine, seconds = self.engine, self.clock.take()
        trained = seconds["seconds_total"] - seconds.get("seconds_validation", 0.0)
        tokens, self._tokens = int(self._tokens), torch.zeros_like(self._tokens)
        peak = peak_of(engine.world.device, next(self.model.parameters()).dtype)
        use = {} if peak is None else {"mfu": 6 * self._num_parameters * tokens / trained / peak}
        position = {"data_batch": engine.batches, "data_epoch": engine.batches * self.batch / self._num_chats}
        return position | seconds | memory(engine.world.device) | use

    def _clip_grad_norm(self, model) -> float:
        first = self.engine.batches * self.batch
        names, losses = self._names[first : first + self.batch], [str(loss.item()) for loss in self._losses]
        with self.clock.phase("update"):
            values = self.engine.step({"trajectories": names, "losses": losses})
        self._lr, self._losses = values["lr"], []
        return values["grad_norm"]

    def _get_grad_norm(self, model, grad_norm=None) -> float:
        return grad_norm

    def _get_learning_rate(self) -> float:
        return self._lr

    def _save_checkpoint(self, model, trial) -> None:
        if self.state.global_step < self.state.max_steps:  # at the end there is the model
            self.engine.save(self.saver, self.state.global_step)

    def _send_telemetry(self) -> None:
        """Nothing is told to anyone."""


def add_loss_head(model: Qwen3VLForConditionalGeneration) -> None:
    """The head that TRL's trainer gives a model, for a benchmark of the step without the trainer."""
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))


class _Still:
    """Stands where TRL expects an optimiser and a schedule: the engine has its own."""

    param_groups: tuple = ()

    def step(self) -> None: ...


class _Report(TrainerCallback):
    """Writes metrics, validates, and stops the loop when the process is asked to end."""

    def __init__(
        self,
        trainer: ControllerTrainer,
        metrics: Metrics | None,
        sigterm: Deferral,
        validation: Callable[[], dict[str, float]] | None,
        validate_every: int,
        on_step: Callable[[int], None] | None,
    ) -> None:
        self.trainer, self.metrics, self.sigterm, self.on_step = trainer, metrics, sigterm, on_step
        self.validation, self.validate_every = validation, validate_every
        self.stopped = False

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        values = {("lr" if name == "learning_rate" else name): logs[name] for name in _LOGGED if name in logs}
        if self.metrics is not None and values:
            values |= {"skipped": self.trainer.engine.skipped} | self.trainer.measured()
            self.metrics.log(state.global_step, **values)

    def on_step_end(self, args, state, control, **kwargs) -> None:
        last = state.global_step == state.max_steps
        if self.validation is not None and (last or state.global_step % self.validate_every == 0):
            self.trainer.engine.world.phase = f"step {state.global_step}: validating"
            with self.trainer.clock.phase("validation"):
                values = self.validation()
            if self.metrics is not None:
                self.metrics.log(state.global_step, **values)
        if self.on_step is not None:
            self.on_step(state.global_step)
        if self.sigterm.asked() and not last:
            self.stopped = control.should_save = control.should_training_stop = True


@contextlib.contextmanager
def _known_to_transformers(model: torch.nn.Module) -> Iterator[None]:
    """Within the block transformers and TRL know of weights that ZeRO-3 holds in parts: ranks then write replies for as
    many tokens as the longest, and the head is put together where it is used without a call.
    """
    parts = any("ds_id" in vars(parameter) for parameter in model.parameters())
    known = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}}) if parts else None
    yield
    del known  # it holds as long as it lives


def sft_config(
    run: Path,
    *,
    steps: int,
    batch: int = 8,
    micro_batch: int = 1,
    world_size: int = 1,
    seed: int = 0,
    device: str = "cpu",
    workers: int = 0,
    log_every: int = 10,
    save_every: int = 500,
) -> SFTConfig:
    """TRL's settings for a controller: `batch` chats in an optimiser step over all ranks, `micro_batch` of them in a
    forward of one rank.

    Raises:
        ValueError: if `batch` is no multiple of `micro_batch` times the number of ranks.
    """
    if batch % (micro_batch * world_size):
        raise ValueError(f"batch={batch}: must be a multiple of micro_batch={micro_batch} x {world_size} processes")
    with warnings.catch_warnings():
        # TRL sets this option by its old name whatever we do; its new name is younger than the oldest version we run.
        warnings.filterwarnings("ignore", message=".*gradient_checkpointing", category=FutureWarning)
        config = SFTConfig(
            output_dir=str(run / "checkpoints"),
            assistant_only_loss=True,
            max_length=None,  # a cut would separate image tokens from their images; `chats.fit_chats` shortens
            max_steps=steps,
            per_device_train_batch_size=micro_batch,
            gradient_accumulation_steps=batch // (micro_batch * world_size),
            bf16=False,  # the engine's precision is that of the weights, not autocast
            # The engine knows when ranks have to sum their gradients.
            accelerator_config={"gradient_accumulation_kwargs": {"sync_each_batch": True}},
            use_cpu=device == "cpu",
            gradient_checkpointing=False,  # `models.qwen_vl.set_checkpointing`
            use_cache=True,  # of the model that is saved; a forward with a loss keeps none
            seed=seed,
            train_sampling_strategy="sequential",  # the data set is already in training order
            remove_unused_columns=False,
            dataloader_num_workers=workers,
            dataloader_pin_memory=device != "cpu",
            logging_steps=log_every,
            logging_nan_inf_filter=False,
            save_steps=save_every,
            report_to="none",
            disable_tqdm=True,
        )
    config._n_gpu = min(config.n_gpu, 1)  # the engine's ranks, not DataParallel over whatever is visible
    return config


def train_controller(
    model: Qwen3VLForConditionalGeneration,
    processor: Qwen3VLProcessor,
    chats: Sequence[Chat],
    run: Path,
    config: SFTConfig,
    make_engine: Callable[[Qwen3VLForConditionalGeneration], Engine],
    *,
    save_dtype: torch.dtype = torch.float32,
    validation: Sequence[tuple[Trajectory, Chat]] = (),
    validate_every: int = 500,
    reply_batch: int = 16,
    max_new_tokens: int = 128,
    wandb: dict | None = None,
    on_step: Callable[[int], None] | None = None,
) -> Path:
    """Trains what asks for a gradient and returns the folder of the result, `<run>/model`.

    Called again after a kill it goes on from the last whole checkpoint of the run. Also writes `<run>/metrics.jsonl`.

    Args:
        config: of `sft_config`, with the same `run`.
        make_engine: called with the model once it is where it is trained.
        save_dtype: of the weights in the result.
        validation: trajectories with their chats, validated every `validate_every` steps and at the end, with
            `reply_batch` replies in a forward of at most `max_new_tokens`.
        on_step: called after each step with the number of steps done.
    """
    trainer = ControllerTrainer(model, processor, chats, config)
    engine = make_engine(model)
    with contextlib.ExitStack() as stack:
        saver = stack.enter_context(Saver(run / "checkpoints"))
        sigterm = stack.enter_context(Deferral(engine.world))
        resumed = engine.resume(saver) is not None
        metrics = None
        if engine.world.first:
            metrics = stack.enter_context(Metrics(run, engine.batches if resumed else None, wandb=wandb))
        trainer.take(engine, saver)
        controller = Controller(model, processor, max_new_tokens=max_new_tokens, batch=reply_batch)
        check = functools.partial(
            validate, model, controller, validation, trainer.inputs, engine.world
        ) if validation else None  # fmt: skip
        report = _Report(trainer, metrics, sigterm, check, validate_every, on_step)
        trainer.add_callback(report)
        with _known_to_transformers(model):
            if engine.batches < config.max_steps:
                trainer.train()
        if report.stopped:
            saver.wait()
            sigterm.deliver()
        weights = engine.full_weights()
        if engine.world.first:
            names = dict(model.named_parameters())  # a head that shares its weight with the embedding is not named
            weights = {name: weights[name].to(save_dtype) for name in names}
            save_vlm(model, processor, run / "model", weights)
    return run / "model"
