"""What the `data` part of the benchmark measures: reading ahead against bare Pillow, resume, memory of reading.

Times are seconds of CPU, of this process and of its workers, in interleaved pairs: "per core" is then the same on a
machine that does other things too. Medians are taken over the pairs.
"""

import gc
import io
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
from omegaconf import DictConfig
from PIL import Image
from tqdm import tqdm

from clvr_train.data.images import target_image
from clvr_train.data.loader import Mapped, read_ahead
from clvr_train.data.order import Order
from clvr_train.data.parquet import write_parquet
from clvr_train.data.readers import read_trajectories
from clvr_train.data.shards import write_shards
from clvr_train.data.sharegpt import write_trajectories
from clvr_train.data.stored import in_memory
from clvr_train.method.trajectory import Step, Trajectory
from recipes._bench import Row

EARLY, LATE = 10, 10_000_000  # samples before the resume
CORPUS = 6_000_000  # samples of the order that is resumed
MEBIBYTE = 1 << 20
# Decode and resize, nothing else; the first file is read once before, so that Pillow has loaded its decoders.
BARE = """
import sys, time
from PIL import Image
side, files = int(sys.argv[1]), sys.argv[2:]
for number, file in enumerate([files[0], *files]):
    if number == 1:
        start = time.process_time()
    with Image.open(file) as image:
        image.convert("RGB").resize((side, side), Image.Resampling.LANCZOS)
sys.stdout.write(str(time.process_time() - start))
"""


def bench_data(cfg: DictConfig, folder: Path, seed: int) -> list[Row]:
    """All rows; memory first, while nothing else has been held.

    Raises:
        ValueError: the numbers of `cfg` leave nothing to measure.
    """
    if min(cfg.files, cfg.batch, cfg.pairs, cfg.memory_mib) < 1 or cfg.samples < cfg.batch:
        raise ValueError(f"data.samples={cfg.samples}, data.batch={cfg.batch}: at least one of all, and one batch")
    rows = memory_rows(folder / "memory", cfg.memory_mib)
    files = write_pictures(folder / "files", cfg.files, cfg.side_px, seed)
    return rows + loader_rows(files, cfg, seed) + resume_rows(files, cfg, seed)


def write_pictures(folder: Path, number: int, side_px: int, seed: int) -> list[Path]:
    """JPEG files with the detail of a photograph: smooth colours and fine noise (about 0.3 bytes a pixel)."""
    folder.mkdir(parents=True, exist_ok=True)
    source = np.random.default_rng(seed)
    files = [folder / f"{index:04d}.jpg" for index in range(number)]
    for file in tqdm(files, desc="write files"):
        colours = Image.fromarray(source.integers(0, 256, (32, 32, 3), dtype=np.uint8))
        smooth = np.asarray(colours.resize((side_px, side_px), Image.Resampling.BICUBIC), dtype=np.int16)
        noisy = smooth + source.integers(-12, 13, smooth.shape, dtype=np.int16)
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(file, quality=90)
    return files


# ---------------------------------------------------------------------------- reading ahead


def loader_rows(files: Sequence[Path], cfg: DictConfig, seed: int) -> list[Row]:
    """Samples a core and second, bare and through the loader, and the ratio by number of workers."""
    order = Order(len(files), cfg.batch, seed)
    steps = range(cfg.samples // cfg.batch)
    drawn = [files[index] for step in steps for _, index in order.batch(step)]
    rows, seconds = [], []
    for workers in cfg.workers:
        ratios = []
        for _ in tqdm(range(cfg.pairs), desc=f"{workers} workers"):
            seconds.append(_bare_s(drawn, cfg.size_px))
            ratios.append(seconds[-1] / _cpu_s(partial(_through_loader, files, order, steps, cfg.size_px, workers)))
        rows.append(Row(f"loader over bare Pillow per core, {workers} workers", median(ratios), "", at_least=0.9))
    samples = len(steps) * cfg.batch
    return [Row("bare Pillow, samples per core and second", samples / median(seconds), "1/s"), *rows]


def _bare_s(files: Sequence[Path], size_px: int) -> float:
    """Seconds of CPU; in a process of its own, for what an allocator has done before changes the time by a third."""
    command = [sys.executable, "-c", BARE, str(size_px), *map(str, files)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def _through_loader(files: Sequence[Path], order: Order, steps: range, size_px: int, workers: int) -> None:
    images = Mapped(files, partial(target_image, size_px=(size_px, size_px)))
    for _ in read_ahead(images, (order.batch(step) for step in steps), workers=workers):
        pass


def _cpu_s(work: Callable[[], None]) -> float:
    before = _spent_s()
    work()
    return _spent_s() - before


def _spent_s() -> float:
    """Seconds of CPU so far; children count once they have ended, as the loader's have when it is through."""
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


# ---------------------------------------------------------------------------- resume


def resume_rows(files: Sequence[Path], cfg: DictConfig, seed: int) -> list[Row]:
    """From nothing to the first batch after `LATE` samples against `EARLY` ones; and the order by itself."""
    early, late, ratios = [], [], []
    for _ in tqdm(range(cfg.pairs), desc="resume"):
        early.append(_first_batch_s(files, EARLY, cfg, seed))
        late.append(_first_batch_s(files, LATE, cfg, seed))
        ratios.append(late[-1] / early[-1])
    order, start = Order(CORPUS, 1, seed), time.process_time()
    for position in range(1000):
        order.at(LATE + position)
    return [
        Row("resume at ten million samples over resume at ten", median(ratios), "", at_most=1.5),
        Row("resume at ten million samples", median(late), "s"),
        Row("order, a sample", (time.process_time() - start) * 1e3, "us"),
    ]


def _first_batch_s(files: Sequence[Path], done: int, cfg: DictConfig, seed: int) -> float:
    start = time.process_time()
    order = Order(CORPUS, cfg.batch, seed)
    images = Mapped(range(CORPUS), partial(_numbered, files=files, size_px=cfg.size_px))
    next(read_ahead(images, (order.batch(step) for step in range(done // cfg.batch, CORPUS))))
    return time.process_time() - start


def _numbered(number: int, files: Sequence[Path], size_px: int) -> Image.Image:
    return target_image(files[number % len(files)], (size_px, size_px))


# ---------------------------------------------------------------------------- memory


def memory_rows(folder: Path, memory_mib: int) -> list[Row]:
    """Growth of the process over reading a file, as a share of the file."""
    writers = {"trajectories.jsonl": write_trajectories, "parquet": write_parquet, "tar": write_shards}
    rows = []
    for name, write in tqdm(writers.items(), desc="memory of reading"):
        if not (folder / name).exists():
            write(folder / name, _trajectories(memory_mib * MEBIBYTE, text=name.endswith("jsonl")))
        (file,) = (path for path in (folder / name).iterdir() if path.is_file())
        growth = _growth_bytes(partial(_read, file))
        share = growth / file.stat().st_size
        rows.append(Row(f"peak memory of reading over {file.stat().st_size / MEBIBYTE:.0f} MiB of {name}", share, ""))
    return rows


def _trajectories(num_bytes: int, text: bool) -> Iterator[Trajectory]:
    """Trajectories of about `num_bytes` on disk: long reasoning and a small image, or a large image (MiB each)."""
    side, buffer = (64 if text else 591), io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)).save(buffer, "PNG")
    image = in_memory("noise", buffer.getvalue())
    reasoning = "a red circle . " * (MEBIBYTE // 15 if text else 1)
    for number in range(-(-num_bytes // MEBIBYTE)):
        yield Trajectory(f"t{number}", "goal", (Step(reasoning.strip(), "generate", image), Step("done .", "stop")))


def _read(file: Path) -> None:
    for _ in read_trajectories(file):
        pass


def _growth_bytes(work: Callable[[], None]) -> int:
    """How far the resident memory rose above where it stood (Linux)."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = _status_bytes("VmRSS")
    work()
    return max(0, _status_bytes("VmHWM") - before)


def _status_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))
