"""Reading ahead of the loop: samples are opened and prepared in the order in which the loop asks for them."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from multiprocessing.reduction import ForkingPickler
from typing import Generic, TypeVar, overload

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from clvr_train.data.refusals import Refusals

_POOL_BLOCKS = 4  # of 16 MiB
Drawn = tuple[int, int]  # (epoch, index), as `Order.batch` gives them
S = TypeVar("S")
T = TypeVar("T")


class _Unreadable(str):
    """Why a sample cannot be read. A text, for it comes from a worker process, which not every exception survives."""


class Mapped(Sequence[T], Generic[S, T]):
    """What `function` makes of every sample, when it is indexed: in a worker, if the samples are read ahead."""

    def __init__(self, samples: Sequence[S], function: Callable[[S], T]) -> None:
        self.samples, self.function = samples, function

    def __len__(self) -> int:
        return len(self.samples)

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> list[T]: ...
    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self.function(sample) for sample in self.samples[index]]
        return self.function(self.samples[index])


def read_ahead(
    samples: Sequence[T], batches: Iterable[list[Drawn]], *, workers: int = 0, refusals: Refusals | None = None
) -> Iterator[list[tuple[Drawn, T]]]:
    """The batches with their samples, e.g. of `(order.batch(step) for step in range(n, last))`, which resumes at step
    n. The sequence is the same for any number of workers.

    A sample that cannot be read (`ValueError` or `OSError`) is left out of its batch, which may become empty.

    Args:
        samples: what worker processes can be given; indexing it is the work.
        workers: processes that read ahead, two batches each; 0 reads when asked.
        refusals: counts the samples that are drawn, and says how many of them may be left out; without it none.

    Raises:
        ValueError: more samples cannot be read than may be left out.
    """
    loader = DataLoader(
        _Reading(samples),
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=list,
        worker_init_fn=_start_worker,
        generator=torch.Generator(),  # else it draws from the global one
    )
    refusals = refusals or Refusals("samples")
    for batch in loader:
        for _, made in batch:
            if isinstance(made, _Unreadable):
                refusals.refuse(ValueError(made))
            else:
                refusals.accept()
        yield [(drawn, made) for drawn, made in batch if not isinstance(made, _Unreadable)]
    refusals.finish()


class _Reading(Dataset, Generic[T]):
    def __init__(self, samples: Sequence[T]) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, drawn: Drawn) -> tuple[Drawn, T | _Unreadable]:
        try:
            return drawn, self.samples[drawn[1]]
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
