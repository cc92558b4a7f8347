"""What several recipes build from the same config groups: models, samples, judges."""

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path

from omegaconf import DictConfig

from clvr_train.data.cache import TensorCache
from clvr_train.data.captions import Captions, FineT2I, FluxReason
from clvr_train.data.readers import Refusals, read_trajectories
from clvr_train.data.records import DataError
from clvr_train.method.trajectory import Sample, Trajectory
from clvr_train.method.truncation import truncate
from clvr_train.models.conditioning import Conditioner
from clvr_train.models.klein import Klein, load_klein
from clvr_train.shapes.base import captions
from clvr_train.shapes.render import render

logger = logging.getLogger(__name__)


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


def build_conditioner(klein: Klein, model: DictConfig, cache: DictConfig | None = None) -> Conditioner:
    """The conditioner of a `model` group, with the `cache` keys of a recipe that has them."""
    if cache is None:
        return Conditioner(klein, tuple(model.size_px))
    store = TensorCache(Path(cache.folder)) if cache.folder else None
    if cache.texts and store is None:
        raise ValueError("cache.texts=true: a cache.folder is needed")
    options = {"cache": store, "cache_texts": cache.texts, "memory_gb": cache.memory_gb}
    return Conditioner(klein, tuple(model.size_px), **options)


def read_samples(folder: str | Path | None, limit: int | None = None, max_refused: float = 0.0) -> list[Sample]:
    """Every truncation of every trajectory of a folder (of the first `limit` trajectories).

    Up to the share `max_refused` of bad records is left out.
    """
    return [sample for trajectory in _trajectories(folder, limit, max_refused) for sample in truncate(trajectory)]


def read_direct_samples(
    folder: str | Path | None, limit: int | None = None, max_refused: float = 0.0
) -> list[Sample]:
    """One sample a trajectory without reasoning or history: from the goal to the last image, which it ended on.

    Training on traces alone forgets how to draw from a bare prompt.
    """
    return [
        Sample(trajectory.id, len(trajectory.images), trajectory.goal, (), (), trajectory.images[-1])
        for trajectory in _trajectories(folder, limit, max_refused)
        if trajectory.images
    ]


def read_corpus(data: DictConfig) -> Captions:
    """The captions of `data.folder` in the form `data.format`: `flux_reason` or `fine_t2i`."""
    if data.folder is None:
        raise ValueError("data.folder: a folder or file of captions is needed")
    if data.format == "flux_reason":
        corpus = FluxReason(Path(data.folder), data.caption, data.limit)
        logger.info("%d captions, %d records have none", len(corpus), corpus.num_without_caption)
        return corpus
    if data.format == "fine_t2i":
        corpus = FineT2I(Path(data.folder), data.limit)
        logger.info("%d captions", len(corpus))
        return corpus
    raise ValueError(f"format={data.format!r} is not one of flux_reason, fine_t2i")


def read_prompts(data: DictConfig, max_refused: float = 0.0) -> list[Sample]:
    """The samples of a corpus of captions, whose goals are prompts to draw. Their captions are read, no image is."""
    corpus = read_corpus(data)
    samples, refusals = [], Refusals(data.folder, max_refused)
    for index in range(len(corpus)):
        try:
            samples.append(corpus[index])
        except DataError as error:
            refusals.refuse(error)
        else:
            refusals.accept()
    refusals.finish()
    return samples


def _trajectories(folder: str | Path | None, limit: int | None, max_refused: float) -> Iterator[Trajectory]:
    if folder is None:
        raise ValueError("data.folder: a folder of trajectories is needed")
    return read_trajectories(Path(folder), max_refused=max_refused, limit=limit)


def caption_samples(num: int, seed: int, kinds: Mapping[str, float] | None = None) -> list[Sample]:
    """Caption and single-edit pairs of the shapes world as samples without reasoning, for training a base model.

    `kinds`: weights of descriptions, goals and edits, alike by default.
    """
    samples = []
    for number, caption in enumerate(captions(num, seed, kinds)):
        references = () if caption.source is None else (render(caption.source),)
        step = 1 + len(references)
        samples.append(Sample(f"caption-{seed}-{number}", step, caption.text, (), references, render(caption.scene)))
    return samples
