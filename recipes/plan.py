"""What a training takes, before it starts: parameters, bytes on every GPU, FLOPs, seconds, and what to change if it
does not fit.

    python recipes/plan.py experiment=klein_4b_sft
    python recipes/plan.py experiment=klein_9b_sft gpus=1 engine=single engine.optimizer=adamw8bit gpu=h200
    python recipes/plan.py recipe=train_vlm controller.folder=qwen3vl_8b engine=zero2 engine.precision=bf16
    python recipes/plan.py experiment=klein_4b_pprl

Experiments and keys are those of the training. Only shapes are computed: no weights are read, no GPU is needed, nothing
is written. docs/performance.md says what is counted.
"""

import functools
import json
import math
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

import torch
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from clvr_train.data.images import reference_size
from clvr_train.models.plan import CHOICES, GPUS, Settings, bytes_per_gpu, cheapest_fit, micro_batches, model_bytes
from clvr_train.models.trace import (
    Trace,
    count_parameters,
    encoder_flops,
    klein_shapes,
    trace_transformer,
    trace_vlm,
    vlm_shapes,
)
from recipes._config import check_job, experiments
from recipes._plan import NODE, key_of, model_name
from recipes._plan_pprl import plan_pprl
from recipes._plan_pprl import rows as pprl_rows
from recipes._recipe import CONF, recipe

RECIPES = ("train_dit", "train_vlm", "train_pprl")
FORMATS = ("text", "json")
# Keys that the training does not have.
OWN = ("recipe", "format", "gpu", "gpus", "mfu", "reserve_gb", "references", "reference_px", "cached", "tokens")
OWN += ("images", "image_px")


@dataclass
class Job:
    """A training as the plan sees it.

    `trace`: of a forward, by micro-batch and dtype. `calls`: texts and images that a step encodes without a cache.
    `encoder_flops`: those of a step as asked for.
    """

    models: list[torch.nn.Module]  # the first is trained
    trained: list[torch.nn.Parameter]
    trace: Callable[[int, torch.dtype], Trace]
    calls: dict[str, int]
    encoder_flops: int


def training_config(cfg: DictConfig) -> tuple[str, DictConfig]:
    """The recipe that is planned and its config, composed and checked as it would be for itself."""
    job = HydraConfig.get()
    owners = [name for name in RECIPES if job.runtime.choices["experiment"] in experiments(name, CONF)]
    name = cfg.recipe or (owners or RECIPES)[0]
    if name not in RECIPES:
        raise ValueError(f"recipe={name!r} is not one of {', '.join(RECIPES)}")
    GlobalHydra.instance().clear()  # it composes one config at a time, and that of this job is composed
    overrides = [text for text in job.overrides.task if text.lstrip("+").partition("=")[0] not in OWN]
    return name, check_job(name, CONF, overrides)


def dit_job(cfg: DictConfig, training: DictConfig) -> Job:
    window = training.model.window
    parts = klein_shapes(model_name(training.model), training.model.layers, window)
    transformer = parts["transformer"]
    token_px = 2 ** len(parts["vae"].config.block_out_channels)
    target_px = tuple(training.model.size_px)
    if any(side % token_px for side in target_px):
        raise ValueError(f"model.size_px={list(target_px)}: both sides must be multiples of {token_px}")
    number = 1 if cfg.references is None else cfg.references
    reference_px = reference_size(tuple(cfg.reference_px or target_px), token_px)
    target, reference = ((height // token_px, width // token_px) for height, width in (target_px, reference_px))
    references = [reference] * number

    def trace(micro_batch: int, dtype: torch.dtype) -> Trace:
        return trace_transformer(transformer, dtype, micro_batch, window, target, references)

    batch = training.train.batch
    calls = {"text_encoder": batch, "vae": batch * (1 + number)}
    flops = 0
    if not cfg.cached:
        text, one_target, one_reference = encoder_flops(parts, window, (target_px, reference_px))
        flops = batch * (text + one_target + number * one_reference)
    return Job(list(parts.values()), list(transformer.parameters()), functools.cache(trace), calls, flops)


def vlm_job(cfg: DictConfig, training: DictConfig) -> Job:
    if training.controller.folder == "untrained":
        raise ValueError("controller.folder=untrained: its size is not known yet; give a folder")
    model = vlm_shapes(training.controller.folder)
    image_px = tuple(cfg.image_px)
    if training.controller.max_pixels:
        shrink = min(1.0, math.sqrt(training.controller.max_pixels / math.prod(image_px)))
        image_px = tuple(int(side * shrink) for side in image_px)

    def trace(micro_batch: int, dtype: torch.dtype) -> Trace:
        return trace_vlm(model, dtype, micro_batch, cfg.tokens, cfg.images, image_px, training.train.vision)

    frozen = set() if training.train.vision else set(model.model.visual.parameters())
    trained = [p for p in model.parameters() if p not in frozen]
    return Job([model], trained, functools.cache(trace), {"text_encoder": 0, "vae": 0}, 0)


def settings_of(cfg: DictConfig, training: DictConfig) -> Settings:
    """The plan's settings: those of the training, on `gpus` GPUs, or on one or a node as its engine has it."""
    engine, train = training.engine, training.train
    gpus = cfg.gpus or (1 if engine.name == "single" else NODE)
    choices = {key: engine["name" if key == "engine" else key] for key in CHOICES}
    settings = Settings(gpus=gpus, ema=train.get("ema_decay") is not None, **choices)
    micro_batches(train.batch, settings)
    return replace(settings, micro_batch=min(train.micro_batch, train.batch // gpus))


def make_plan(cfg: DictConfig, name: str, training: DictConfig) -> dict:
    """All that is printed; numbers of a step are over all GPUs, bytes of one GPU."""
    if name == "train_pprl":
        return plan_pprl(cfg, training)
    gpu, settings, batch = GPUS[cfg.gpu], settings_of(cfg, training), training.train.batch
    job = (dit_job if name == "train_dit" else vlm_job)(cfg, training)
    limit = gpu.memory_bytes - int(cfg.reserve_gb * 1e9)
    num_trained = sum(p.numel() for p in job.trained)
    whole_bytes = sum(model_bytes(model, settings.dtype) for model in job.models)
    frozen_bytes = whole_bytes - num_trained * settings.dtype.itemsize

    def held(chosen: Settings) -> tuple[dict[str, int], int]:
        return bytes_per_gpu(job.trained, frozen_bytes, job.trace(chosen.micro_batch, chosen.dtype), chosen)

    trace = job.trace(settings.micro_batch, settings.dtype)
    forward, frozen, recomputed = (
        flops * batch // settings.micro_batch
        for flops in (trace.flops, trace.frozen_flops, trace.recomputed_flops(settings.checkpointing))
    )
    total = 3 * (forward - frozen) + frozen
    peak = (gpu.fp32 if settings.precision == "fp32" else gpu.bf16) * settings.gpus
    parts, host = held(settings)
    change = cheapest_fit(settings, lambda chosen: held(chosen)[0]["total"] <= limit)
    return {
        "recipe": name,
        "settings": asdict(settings) | {"batch": batch, "gpu": cfg.gpu, "mfu": cfg.mfu},
        "parameters": count_parameters(job.models[0]),
        "trained_parameters": num_trained,
        "frozen_parameters": sum(map(count_parameters, job.models)) - num_trained,
        "bytes_per_gpu": parts,
        "host_bytes_per_gpu": host,
        "gpu_bytes": gpu.memory_bytes,
        "reserve_bytes": int(cfg.reserve_gb * 1e9),
        "flops_per_step": total,
        "recomputed_flops_per_step": recomputed,
        "encoder_flops_per_step": job.encoder_flops,
        "forwards_per_step": settings.gpus * micro_batches(batch, settings),
        "encodings_per_step": {"cached": dict.fromkeys(job.calls, 0), "uncached": job.calls},
        "seconds_per_step": (total + recomputed + job.encoder_flops) / (peak * cfg.mfu),
        "fits": parts["total"] <= limit,
        "change": change and {key_of(setting): value for setting, value in change.items()},
    }


def table(plan: dict) -> str:
    """A plan as lines of text."""
    settings, held = plan["settings"], plan["bytes_per_gpu"]
    calls = plan["encodings_per_step"]["uncached"]
    limit = f"{plan['gpu_bytes'] / 1e9:.1f} GB, {plan['reserve_bytes'] / 1e9:.1f} of them kept free"
    rows = [
        ("setting", ", ".join(f"{key}={value}" for key, value in settings.items())),
        ("parameters", f"{plan['trained_parameters']:,} trained, {plan['frozen_parameters']:,} frozen"),
        *((kind, f"{number / 1e9:10.3f} GB per GPU") for kind, number in held.items()),
        *([("host", f"{plan['host_bytes_per_gpu'] / 1e9:10.3f} GB per GPU")] if plan["host_bytes_per_gpu"] else []),
        ("FLOPs", f"{plan['flops_per_step'] / 1e12:10.3f} T per step, {plan['recomputed_flops_per_step'] / 1e12:.3f} T"
         f" recomputed, {plan['encoder_flops_per_step'] / 1e12:.3f} T of encoders"),
        ("forwards", f"{plan['forwards_per_step']} per step; without a cache {calls['text_encoder']} texts and"
         f" {calls['vae']} images are encoded"),
        *(pprl_rows(plan) if "evaluations_per_step" in plan else ()),
        ("time", f"{plan['seconds_per_step']:.3g} s per step at {settings['mfu']:.0%} of {settings['gpu']}'s peak"),
        ("fits", f"{'yes' if plan['fits'] else 'no'}: {limit}"),
    ]  # fmt: skip
    if not plan["fits"]:
        change = plan["change"]
        rows.append(("change", "none helps" if change is None else " ".join(f"{k}={v}" for k, v in change.items())))
    return "\n".join(f"{name:12}{value}" for name, value in rows)


@recipe("plan")
def main(cfg: DictConfig) -> None:
    for key, choices in (("format", FORMATS), ("gpu", tuple(GPUS))):
        if cfg[key] not in choices:
            raise ValueError(f"{key}={cfg[key]!r} is not one of {', '.join(choices)}")
    if (cfg.gpus is not None and cfg.gpus < 1) or cfg.mfu <= 0:
        raise ValueError(f"gpus={cfg.gpus}, mfu={cfg.mfu}: both must be above 0")
    plan = make_plan(cfg, *training_config(cfg))
    sys.stdout.write((json.dumps(plan, indent=2) if cfg.format == "json" else table(plan)) + "\n")


if __name__ == "__main__":
    main()
