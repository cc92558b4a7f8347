"""Validation within a training: fixed samples, their losses in the metrics and their images in `samples/`."""

import io
import logging
from pathlib import Path

from omegaconf import DictConfig
from tqdm import tqdm

from clvr_train.data.refusals import Refusals
from clvr_train.method.trajectory import Sample
from clvr_train.models.conditioning import Conditioner
from clvr_train.runtime.distributed import World
from clvr_train.runtime.engine import Engine
from clvr_train.runtime.files import write_atomic
from clvr_train.runtime.metrics import Metrics
from clvr_train.sft.validation import validation_grid, validation_images, validation_losses
from recipes._data import caption_samples, read_folder, truncated

logger = logging.getLogger(__name__)
KEYS = ("folder", "num", "captions", "every", "num_times", "steps", "cfg", "seed")
VALIDATION_KEYS = tuple(f"validation.{key}" for key in KEYS)  # play no part in the training


class Validation:
    """What the `validation` keys of a config name; without samples it does nothing."""

    def __init__(self, cfg: DictConfig, conditioner: Conditioner, world: World, run: Path) -> None:
        self.cfg, self.micro_batch = cfg.validation, cfg.train.micro_batch
        self.conditioner, self.world, self.run = conditioner, world, run
        self.samples = read_validation(cfg.validation, cfg.data.max_refused)
        if self.samples:
            logger.info("validation of %d samples every %d steps", len(self.samples), self.cfg.every)
            conditioner.prime(self.samples, lambda work: tqdm(work, desc="encode", mininterval=1))

    def at(self, engine: Engine, last: bool, metrics: Metrics | None) -> dict[str, float]:
        """The losses, if the engine has come to a step of validation; its grid is written by the rank of `metrics`.

        All ranks ask, and share the forwards.
        """
        if not self.samples or not (last or engine.steps % self.cfg.every == 0):
            return {}
        self.world.phase = f"step {engine.steps}: validation"
        common = engine.module, self.conditioner, self.samples, self.world
        options = {"seed": self.cfg.seed, "micro_batch": self.micro_batch}
        losses = validation_losses(*common, num_times=self.cfg.num_times, **options)
        images = validation_images(*common, steps=self.cfg.steps, cfg=self.cfg.cfg, **options)
        if metrics:
            file = self.run / "samples" / f"step-{engine.steps:06d}.png"
            file.parent.mkdir(exist_ok=True)
            content = io.BytesIO()
            validation_grid(self.samples, images).save(content, "PNG")
            write_atomic(file, content.getvalue())
            metrics.image(engine.steps, "samples", file)
        return losses


def read_validation(validation: DictConfig, max_refused: float) -> list[Sample]:
    """The fixed samples: every truncation of the first trajectories of a folder, or captions of the shapes world."""
    if validation.captions:
        if validation.folder is not None:
            given = f"validation.captions={validation.captions}, validation.folder={validation.folder}"
            raise ValueError(f"{given}: one or the other")
        return caption_samples(validation.captions, seed=1)
    if validation.folder is None:
        return []
    refusals = Refusals(validation.folder, max_refused)
    samples = truncated(read_folder(validation.folder, refusals, validation.num), validation.folder)
    refusals.finish()
    return samples
