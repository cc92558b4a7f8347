"""What several recipes build from the same config groups: models, samples, judges."""

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path

from omegaconf import DictConfig

from clvr_train.data.readers import read_trajectories
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


def build_conditioner(klein: Klein, model: DictConfig) -> Conditioner:
    return Conditioner(klein, tuple(model.size_px))


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
