"""Reading ahead of the loop: samples are opened and prepared in the order in which the loop asks for them."""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from multiprocessing.reduction import ForkingPickler
from typing import Generic, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from clvr_train.data.images import open_image
from clvr_train.method.trajectory import Sample

logger = logging.getLogger(__name__)

_POOL_BLOCKS = 4  # of 16 MiB
Drawn = tuple[int, int]  # (epoch, index), as `Order.batch` gives them
T = TypeVar("T")


class RefusedError(ValueError):
    """More samples cannot be read than the loop allows; the message names the last of them."""


class _Unreadable(str):
    """Why a sample cannot be read. A text, for it comes from a worker process, which not every exception survives."""


def open_images(sample: Sample) -> Sample:
    """The sample with its images decoded."""
    target = None if sample.target is None else open_image(sample.target)
    return replace(sample, references=tuple(open_image(image) for image in sample.references), target=target)


def read_ahead(
    samples: Sequence[Sample],
    batches: Iterable[list[Drawn]],
    prepare: Callable[[Sample], T] = open_images,
    *,
    workers: int = 0,
    max_refused: float = 0.0,
) -> Iterator[list[tuple[Drawn, T]]]:
    """The batches with what `prepare` makes of every sample, e.g. of `(order.batch(step) for step in range(n, last))`,
    which resumes at step n. The sequence is the same for any number of workers.

    A sample that cannot be read (`ValueError` or `OSError`) is left out of its batch, which may become empty, and
    logged.

    Args:
        prepare: a function that worker processes can be given.
        workers: processes that read ahead, two batches each; 0 reads when asked.
        max_refused: the share of the samples that may be left out.

    Raises:
        RefusedError: at the first sample beyond that share.
    """
    loader = DataLoader(
        _Prepared(samples, prepare),
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=list,
        worker_init_fn=_start_worker,
        generator=torch.Generator(),  # else it draws from the global one
    )
    refused: set[int] = set()
    for batch in loader:
        for (_, index), made in batch:
            if isinstance(made, _Unreadable) and index not in refused:
                refused.add(index)
                if len(refused) > max_refused * len(samples):
                    of = f"{len(refused)} of {len(samples)} samples refused, more than max_refused={max_refused}"
                    raise RefusedError(f"{made} ({of})")
                logger.warning("refused: %s", made)
        yield [(drawn, made) for drawn, made in batch if not isinstance(made, _Unreadable)]


class _Prepared(Dataset, Generic[T]):
    def __init__(self, samples: Sequence[Sample], prepare: Callable[[Sample], T]) -> None:
        self.samples, self.prepare = samples, prepare

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, drawn: Drawn) -> tuple[Drawn, T | _Unreadable]:
        try:
            return drawn, self.prepare(self.samples[drawn[1]])
        except (ValueError, OSError) as error:
            return drawn, _Unreadable(" ".join(str(error).split()))


def _start_worker(worker: int) -> None:
    """In a worker: Pillow keeps its memory for the next image instead of asking for fresh pages (a quarter of the time,
    measured), and images cross in shared memory, as tensors do. Through the pipe they would be copied twice, and a
    worker whose parent was killed would wait for ever to get rid of them.
    """
    Image.core.set_blocks_max(_POOL_BLOCKS)
    ForkingPickler.register(Image.Image, _reduced)


def _reduced(image: Image.Image) -> tuple:
    if image.mode != "RGB":
        return image.__reduce_ex__(2)
    return _restored, (torch.from_numpy(np.array(image)),)


def _restored(pixels: Tensor) -> Image.Image:
    return Image.fromarray(pixels.numpy())
