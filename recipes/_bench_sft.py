"""What the `sft` parts of the benchmark measure: a step of train_dit against a bare loop, with and without a cache, and
against its plan.

Weights and images are random and made on the fly; a part that runs is of its real size.
"""

import gc
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
import torch
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf
from PIL import Image

from clvr_train.method.flow import flow_matching_loss, interpolate, sample_times
from clvr_train.method.trajectory import Sample
from clvr_train.models.blocks import blocks_of, compile_blocks, set_checkpointing
from clvr_train.models.conditioning import Conditioner, predict_velocity
from clvr_train.models.klein import Klein, encode_images, encode_text
from clvr_train.models.tiny import train_tokenizer
from clvr_train.models.trace import klein_shapes
from clvr_train.runtime.distributed import World
from clvr_train.runtime.engine import Engine
from clvr_train.sft.dit import backward_flow_matching
from recipes._bench import Row, gpu_name, on_gpu, seconds_of
from recipes._config import check_job
from recipes._recipe import CONF
from recipes.plan import make_plan, model_name

LR, CLIP = 1e-5, 1.0
GOAL = "a red circle left of a blue square"


def random_klein(model: DictConfig, dtype: torch.dtype, device: str) -> Klein:
    """A Klein of the real size of a `model` group with random weights; of a folder only the configurations are read."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        parts = klein_shapes(model_name(model), model.layers, model.window, device)
    finally:
        torch.set_default_dtype(before)
    for part in parts.values():
        part.requires_grad_(False).eval()
    tokenizer = train_tokenizer([GOAL] * 20, vocab_size=400)
    # without a folder there is no cache on disk, only memory
    return Klein(Path("random"), **parts, tokenizer=tokenizer, distilled=False, window=model.window,
                 layers=tuple(model.layers))  # fmt: skip


def random_samples(number: int, references: int, size_px: tuple[int, int]) -> list[Sample]:
    """Samples of one bucket, all of other texts and images."""
    source = np.random.default_rng(0)

    def image() -> Image.Image:
        return Image.fromarray(source.integers(0, 256, (*size_px, 3), dtype=np.uint8))

    return [
        Sample(f"{n}", references + 1, f"{GOAL} {n}", ("draw it",), tuple(image() for _ in range(references)), image())
        for n in range(number)
    ]


class Steps:
    """One step of train_dit, and the steps that it is held against, on the same samples."""

    def __init__(self, cfg: DictConfig, *, memory_gb: float) -> None:
        self.sft = cfg.sft
        self.device = torch.device(cfg.model.device)
        dtype = torch.float32 if cfg.engine.precision == "fp32" else torch.bfloat16
        self.klein = random_klein(cfg.model, dtype, cfg.model.device)
        self.conditioner = Conditioner(self.klein, tuple(cfg.model.size_px), memory_gb=memory_gb)
        self.samples = random_samples(self.sft.batch, self.sft.references, tuple(cfg.model.size_px))
        self.number = 0

    def start_engine(self, engine: DictConfig) -> None:
        transformer = self.klein.transformer.requires_grad_(True).train()
        set_checkpointing(transformer, engine.checkpointing)
        if engine.compile:
            compile_blocks(blocks_of(transformer))
        options = {"name": engine.name, "precision": engine.precision, "optimizer": engine.optimizer}
        world = World(device=self.device)
        self.engine = Engine(transformer, world, lr=LR, clip=CLIP, total_steps=10**9, schedule="constant", **options)

    def framework(self) -> None:
        """As train_dit does it."""
        self.number += 1
        seeds = [(0, self.number, *sample.key) for sample in self.samples]
        backward_flow_matching(
            self.conditioner, self.samples, seeds, engine=self.engine, text_dropout=0.0,
            micro_batch=self.sft.micro_batch,
        )  # fmt: skip
        self.engine.step()

    def start_bare(self) -> None:
        """What a bare loop holds: encoded samples on the device, AdamW."""
        transformer = self.klein.transformer.requires_grad_(True).train()
        fused = self.device.type == "cuda"
        self.optimizer = torch.optim.AdamW(transformer.parameters(), lr=LR, weight_decay=0.0, fused=fused)
        self.parts = [
            self.samples[i : i + self.sft.micro_batch] for i in range(0, len(self.samples), self.sft.micro_batch)
        ]
        self.x0 = [torch.stack([self.conditioner.target(sample) for sample in part]) for part in self.parts]
        self.cond = [self.conditioner.batch(part) for part in self.parts]

    def bare(self, encode: bool = False) -> None:
        """A loop as short as it can be written; with `encode` texts and images are encoded at every step, as in
        diffusers' example scripts.
        """
        transformer = self.klein.transformer
        for part, x0, cond in zip(self.parts, self.x0, self.cond, strict=True):
            if encode:
                encode_text(self.klein, [f"{sample.goal}\ndraw it" for sample in part])
                for _ in range(1 + self.sft.references):
                    encode_images(self.klein, torch.rand(len(part), 3, *self.conditioner.size_px, device=self.device))
            e = torch.randn(x0.shape, device=self.device)
            t = sample_times(len(part), cond.num_target, "flux_linear", torch.default_generator).to(self.device)
            v = predict_velocity(transformer, interpolate(x0, e, t), t, cond)
            (flow_matching_loss(v, x0, e).sum() / len(self.samples)).backward()
        torch.nn.utils.clip_grad_norm_(transformer.parameters(), CLIP).item()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def seconds(self, step: Callable[[], None]) -> float:
        """Of one step, to its end on the device."""
        return seconds_of(step, self.device)


def plan_of(cfg: DictConfig, gpu: str) -> dict:
    """What recipes/plan.py says of these steps."""
    GlobalHydra.instance().clear()
    asked = check_job("plan", CONF, [f"references={cfg.sft.references}", f"gpu={gpu}", "gpus=1"])
    train = {"batch": cfg.sft.batch, "micro_batch": cfg.sft.micro_batch}
    training = OmegaConf.merge(asked, {"model": cfg.model, "engine": cfg.engine, "train": train})
    return make_plan(asked, "train_dit", training)


def ratio(steps: Steps, one: Callable[[], None], other: Callable[[], None], pairs: int) -> float:
    """Median over pairs of the seconds of `one` over those of `other`, which take turns in going first."""
    ratios = []
    for pair in range(pairs):
        order = (one, other) if pair % 2 == 0 else (other, one)
        seconds = {step: steps.seconds(step) for step in order}
        ratios.append(seconds[one] / seconds[other])
    return median(ratios)


def bench_sft(cfg: DictConfig) -> list[Row]:
    """On a tiny model, where what the framework adds is seen best: ratios of seconds on one thread, and counts."""
    if cfg.sft.pairs < 1:
        raise ValueError(f"sft.pairs={cfg.sft.pairs}: at least one is needed")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return [*_speed_rows(cfg), *_count_rows(cfg)]
    finally:
        torch.set_num_threads(threads)


def _speed_rows(cfg: DictConfig) -> list[Row]:
    ours, theirs, uncached = (Steps(cfg, memory_gb=memory_gb) for memory_gb in (1.0, 1.0, 0.0))
    ours.start_engine(cfg.engine)
    theirs.start_bare()
    uncached.start_engine(cfg.engine)
    for _ in range(cfg.sft.warmup):
        for step in (ours.framework, theirs.bare, uncached.framework):
            step()
    pairs = cfg.sft.pairs
    return [
        Row("framework step over bare step", ratio(ours, ours.framework, theirs.bare, pairs), "", at_most=1.05),
        Row("cached step over uncached step", ratio(ours, ours.framework, uncached.framework, pairs), "", at_most=1.0),
    ]


def _count_rows(cfg: DictConfig) -> list[Row]:
    """Counted in a step, less what the plan says: nothing may be left."""
    plan = plan_of(cfg, "h100")
    rows = []
    for kind, memory_gb in (("cached", 1.0), ("uncached", 0.0)):
        steps = Steps(cfg, memory_gb=memory_gb)
        steps.start_engine(cfg.engine)
        if kind == "cached":
            steps.conditioner.prime(steps.samples)
        forwards = []
        steps.klein.transformer.register_forward_hook(lambda *_, forwards=forwards: forwards.append(1))
        conditioner = steps.conditioner
        before = conditioner.text_calls, conditioner.image_calls
        steps.framework()
        counted = {
            "forwards": len(forwards) - plan["forwards_per_step"],
            "texts": conditioner.text_calls - before[0] - plan["encodings_per_step"][kind]["text_encoder"],
            "images": conditioner.image_calls - before[1] - plan["encodings_per_step"][kind]["vae"],
        }
        rows += [Row(f"{what} counted beyond the plan, {kind}", n, "", 0, 0) for what, n in counted.items()]
    return rows


def bench_klein(cfg: DictConfig) -> list[Row]:
    """At full size: seconds of a step, share of the GPU's peak, memory against the plan, and against bare steps.

    On a CPU there is no peak and no peak memory: those rows are left out.
    """
    cuda = cfg.model.device == "cuda"
    plan = plan_of(cfg, gpu_name() if cuda else "h100")
    steps = Steps(cfg, memory_gb=64.0)
    steps.conditioner.prime(steps.samples)
    steps.start_engine(cfg.engine)
    first = steps.seconds(steps.framework)
    for _ in range(cfg.sft.warmup):
        steps.framework()
    if cuda:  # compiling may have taken more
        torch.cuda.reset_peak_memory_stats()
    ours = median(steps.seconds(steps.framework) for _ in range(cfg.sft.steps))
    per_second = plan["flops_per_step"] / ours
    rows = [
        Row("seconds of the first step, compilation included", first, "s"),
        Row("seconds of a step", ours, "s"),
        Row("samples a second", cfg.sft.batch / ours, "/s"),
        Row("TFLOP/s of the model", per_second / 1e12, "TFLOP/s"),
    ]
    if cuda:
        rows += on_gpu(per_second, 0.45, plan["bytes_per_gpu"]["total"])
    del steps  # the bare model takes its place
    return rows + _bare_rows(cfg, ours) if cfg.sft.bare else rows


def _bare_rows(cfg: DictConfig, ours: float) -> list[Row]:
    """The same model without what the framework does to be fast: not compiled; encoded samples, and encoding at every
    step. Its AdamW keeps no master weights, which is less to do.
    """
    gc.collect()
    if cfg.model.device == "cuda":
        torch.cuda.empty_cache()
    bare = Steps(cfg, memory_gb=64.0)
    set_checkpointing(bare.klein.transformer, cfg.engine.checkpointing)
    bare.start_bare()
    rows = []
    for encode, name, goal in ((False, "bare step", None), (True, "bare step that encodes, as in diffusers", 1.5)):
        for _ in range(cfg.sft.warmup):
            bare.bare(encode)
        seconds = median(bare.seconds(lambda encode=encode: bare.bare(encode)) for _ in range(cfg.sft.steps))
        rows += [Row(f"seconds of a {name}", seconds, "s"), Row(f"{name} over a step", seconds / ours, "", goal)]
    return rows
