"""What several recipes build from the same config groups: models and what conditions them."""

import logging
from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig

from clvr_train.data.buckets import Size
from clvr_train.data.cache import TensorCache
from clvr_train.models.conditioning import Conditioner
from clvr_train.models.klein import Klein, load_klein

logger = logging.getLogger(__name__)
CACHE_KEYS = ("cache.folder", "cache.texts", "cache.memory_gb")  # play no part in the result


def is_finished(run: Path) -> bool:
    """Whether an earlier command on this run came to its end: then there is nothing to do."""
    finished = (run / "model").exists()
    if finished:
        logger.info("%s is finished: %s is there", run, run / "model")
    return finished


def build_klein(model: DictConfig, expect: str | None, folder: str | Path | None = None) -> Klein:
    """The Klein model of a `model` group, from `folder` if given; `expect` is `base`, `distilled` or None for
    either.
    """
    return load_klein(
        folder or model.folder, expect=expect, window=model.window, layers=model.layers, device=model.device
    )


def build_conditioner(
    klein: Klein, model: DictConfig, cache: DictConfig | None = None, target_sizes: Sequence[Size] = ()
) -> Conditioner:
    """The conditioner of a `model` group, with the `cache` keys of a recipe that has them, for targets of
    `target_sizes`.
    """
    if cache is None:
        return Conditioner(klein, tuple(model.size_px))
    store = TensorCache(Path(cache.folder)) if cache.folder else None
    if cache.texts and store is None:
        raise ValueError("cache.texts=true: a cache.folder is needed")
    options = {"cache": store, "cache_texts": cache.texts, "memory_gb": cache.memory_gb}
    return Conditioner(klein, tuple(model.size_px), target_sizes=target_sizes, **options)
