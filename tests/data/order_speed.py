"""What block order is worth: an epoch over a small parquet file like FLUX-Reason-6M's, in free order and by block.

`python -m tests.data.order_speed [side_px [rows]]` prints samples per second of CPU (this process and its workers), of
2,000 JPEGs of 256 x 256 px in row groups of 100, brought to 256 x 256 px: medians of interleaved rounds.
"""

import io
import resource
import sys
import tempfile
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
from PIL import Image

from clvr_train.data.captions import FluxReason, fit_target
from clvr_train.data.loader import Mapped, read_ahead
from clvr_train.data.order import Order
from tests.data.corpora import flux_reason_rows, write_flux_reason

GROUP, SIZE_PX, WINDOW, BATCH, ROUNDS = 100, (256, 256), 8, 50, 5


def photograph(row: int, side_px: int) -> bytes:
    """A JPEG with the detail of a photograph: smooth colours and fine noise, about 0.3 bytes a pixel."""
    source, buffer = np.random.default_rng(row), io.BytesIO()
    colours = Image.fromarray(source.integers(0, 256, (32, 32, 3), dtype=np.uint8))
    smooth = np.asarray(colours.resize((side_px, side_px), Image.Resampling.BICUBIC), dtype=np.int16)
    noisy = smooth + source.integers(-12, 13, smooth.shape, dtype=np.int16)
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def spent_s() -> float:
    """Seconds of CPU so far; children count once they have ended, as the loader's have when it is through."""
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def epoch_rate(path: Path, by_block: bool, workers: int) -> float:
    corpus = FluxReason(path, window=WINDOW if by_block else 1)
    order = Order(len(corpus), BATCH, seed=0, blocks=corpus.blocks if by_block else (), window=WINDOW)
    samples = Mapped(corpus, partial(fit_target, size_px=SIZE_PX))
    batches = map(order.batch, range(len(corpus) // BATCH))
    before = spent_s()
    read = sum(map(len, read_ahead(samples, batches, workers=workers)))
    return read / (spent_s() - before)


def main(side_px: int = 256, rows: int = 2000) -> None:
    with tempfile.TemporaryDirectory() as folder:
        records = flux_reason_rows(range(rows), partial(photograph, side_px=side_px))
        path = write_flux_reason(Path(folder) / "a.parquet", records, group=GROUP)
        sys.stdout.write(f"{path.stat().st_size / rows / 1e3:.1f} kB a row\n")
        for workers in (0, 2):
            rates = [[epoch_rate(path, by_block, workers) for by_block in (False, True)] for _ in range(ROUNDS)]
            free, block = (median(one) for one in zip(*rates, strict=True))
            sys.stdout.write(f"{workers} workers: free {free:.0f}, by block {block:.0f} samples per second of CPU\n")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
