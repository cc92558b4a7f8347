"""What several recipes build from the same config groups: models and what conditions them."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch.nn import Module

from clvr_train.data.buckets import Size
from clvr_train.data.cache import TensorCache
from clvr_train.inference.closed_loop import Budget, Replies
from clvr_train.inference.loop import ClosedLoop, open_controller, sampling_of
from clvr_train.models.blocks import blocks_of, compile_blocks, set_checkpointing
from clvr_train.models.conditioning import Conditioner
from clvr_train.models.klein import Klein, load_klein
from clvr_train.models.sampler import Sampler
from clvr_train.runtime.distributed import World
from clvr_train.runtime.engine import Engine
from clvr_train.services.options import checked_url

logger = logging.getLogger(__name__)
CACHE_KEYS = ("cache.folder", "cache.texts", "cache.memory_gb")  # play no part in the result


def is_finished(run: Path) -> bool:
    """Whether an earlier command on this run came to its end: then there is nothing to do."""
    finished = (run / "model").exists()
    if finished:
        logger.info("%s is finished: %s is there", run, run / "model")
    return finished


def build_klein(
    model: DictConfig,
    expect: str | None,
    folder: str | Path | None = None,
    precision: str = "fp32",
    device: torch.device | None = None,
) -> Klein:
    """The Klein model of a `model` group, from `folder` if given; `expect` is `base`, `distilled` or None for
    either.
    """
    return load_klein(
        folder or model.folder,
        expect=expect,
        window=model.window,
        layers=model.layers,
        device=device or model.device,
        dtype=torch.float32 if precision == "fp32" else torch.bfloat16,
    )


def build_conditioner(
    klein: Klein, model: DictConfig, cache: DictConfig | None = None, target_sizes: Sequence[Size] = ()
) -> Conditioner:
    """The conditioner of a `model` group, with the `cache` keys of a recipe that has them, for targets of
    `target_sizes`.
    """
    if cache is None:
        return Conditioner(klein, tuple(model.size_px), overflow=model.overflow)
    store = TensorCache(Path(cache.folder)) if cache.folder else None
    if cache.texts and store is None:
        raise ValueError("cache.texts=true: a cache.folder is needed")
    options = {"cache": store, "cache_texts": cache.texts, "memory_gb": cache.memory_gb, "overflow": model.overflow}
    return Conditioner(klein, tuple(model.size_px), target_sizes=target_sizes, **options)


def trained_transformer(klein: Klein, engine: DictConfig) -> Module:
    """The transformer, ready to be trained whole, its blocks checkpointed and compiled as an `engine` group says."""
    transformer = klein.transformer.requires_grad_(True).train()
    set_checkpointing(transformer, engine.checkpointing)
    if engine.compile:
        compile_blocks(blocks_of(transformer))
    return transformer


def build_engine(
    module: Module, world: World, engine: DictConfig, cfg: DictConfig, total_steps: int, **options: Any
) -> Engine:
    """An engine for what is trained of a module; `cfg` is a section with `lr`, `schedule`, `warmup_steps`,
    `weight_decay` and `clip`; `options` are those of `Engine` that not every recipe has.
    """
    return Engine(
        module,
        world,
        name=engine.name,
        precision=engine.precision,
        optimizer=engine.optimizer,
        offload=engine.offload,
        lr=cfg.lr,
        total_steps=total_steps,
        schedule=cfg.schedule,
        warmup_steps=cfg.warmup_steps,
        weight_decay=cfg.weight_decay,
        clip=cfg.clip,
        **options,
    )


def build_budget(cfg: DictConfig) -> Budget:
    """The thinking budget of a config that has its keys."""
    return Budget(**{name: cfg[name] for name in Budget.__dataclass_fields__})


def build_controller(section: DictConfig) -> Replies:
    """The controller of a `controller` section: of a folder, or behind a chat server.

    Raises:
        ValueError: neither is named, or both; as `inference.loop.open_controller`.
    """
    if (section.folder is None) == (section.url is None):
        raise ValueError("controller: give controller.folder=FOLDER, or controller.url=URL of a chat server")
    options = {name: section[name] for name in ("device", "precision", "max_pixels", "max_new_tokens", "batch")}
    if section.url is not None:
        options |= {"name": section.model, **section.chat}
        checked_url(section.url)
    return open_controller(section.url or section.folder, **options)


def build_loop(cfg: DictConfig, controller: Replies) -> ClosedLoop:
    """Controller and drawing model of a config with the keys of `run_closed_loop`."""
    klein = build_klein(cfg.model, expect=None)
    options = sampling_of(klein, cfg.steps, cfg.cfg)
    sampler = Sampler(build_conditioner(klein, cfg.model), batch=cfg.batch, share=True, **options)
    return ClosedLoop(controller, sampler, retries=cfg.retries, seed=cfg.seed)
