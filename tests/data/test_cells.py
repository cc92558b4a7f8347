"""Row groups are read forwards: by block every reader decodes each once, in memory that the window bounds."""

import os
import pickle
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clvr_train.data import cells
from clvr_train.data.cells import BLOCK_BYTES, Cells
from clvr_train.data.flux_reason import FluxReason
from clvr_train.data.loader import Mapped, read_ahead
from clvr_train.data.mixing import Mix
from clvr_train.data.order import Order
from clvr_train.method.trajectory import Sample
from tests.data.corpora import FLUX_REASON, flux_reason_rows, write_flux_reason

FILES, ROWS, BATCH = (5, 7), 20, 8  # row groups of the files, rows of a row group
CAPTION, IMAGE = "caption_detail", "image.bytes"
GROUPS = [(groups, group) for groups in FILES for group in range(groups)]
started: Counter = Counter()  # in this process, how often every column of a row group was begun
decoded: Counter = Counter()  # and its blocks that were read


def noise(row: int, size: int = 1000) -> bytes:
    return np.random.default_rng(row).bytes(size)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path, first = tmp_path_factory.mktemp("flux_reason"), 0
    for groups in FILES:
        rows = range(first, first + groups * ROWS)
        write_flux_reason(path / f"{groups}.parquet", flux_reason_rows(rows, noise), group=ROWS)
        first += len(rows)
    return path


@pytest.fixture
def counts(monkeypatch):
    """Blocks are of 4 images, or of all captions of a row group."""
    started.clear()
    decoded.clear()
    read = cells._Column._read

    def counted(column):
        key = (column._file.metadata.num_row_groups, column._group, column._column)
        started[key] += 1
        for block in read(column):
            decoded[key] += 1
            yield block

    monkeypatch.setattr(cells._Column, "_read", counted)
    monkeypatch.setattr(cells, "BLOCK_BYTES", 5000)


def look(sample: Sample) -> tuple[str, bytes, int, Counter]:
    return sample.goal, sample.target.read(), os.getpid(), Counter(started)


def read_epochs(corpus: FluxReason, order: Order | Mix, workers: int = 0, epochs: int = 1) -> list[Counter]:
    """What every reading process has started. The samples are those of the order."""
    of_process = {}
    batches = map(order.batch, range(epochs * len(corpus) // BATCH))
    for batch in read_ahead(Mapped(corpus, look), batches, workers=workers):
        for (_, index), (goal, image, process, counted) in batch:
            assert goal == f"detail of picture {index}" and image == noise(index)
            of_process[process] = counted
    return list(of_process.values())


@pytest.mark.parametrize("window", [1, 3, 8, 12])
def test_an_epoch_by_block_decodes_every_row_group_once(folder, counts, window):
    corpus = FluxReason(folder, window=window)
    order = Order(len(corpus), BATCH, seed=3, blocks=corpus.blocks, window=window)
    assert read_epochs(corpus, order) == [started]
    assert started == {(*group, column): 1 for group in GROUPS for column in (CAPTION, IMAGE)}
    assert decoded == {(*group, column): blocks for group in GROUPS for column, blocks in ((CAPTION, 1), (IMAGE, 5))}


def test_two_epochs_decode_every_row_group_twice(folder, counts):
    corpus = FluxReason(folder, window=5)
    read_epochs(corpus, Order(len(corpus), BATCH, seed=3, blocks=corpus.blocks, window=5), epochs=2)
    assert all(started[*group, IMAGE] == 2 and decoded[*group, IMAGE] == 10 for group in GROUPS)


def test_a_free_order_decodes_row_groups_again_and_again(folder, counts):
    corpus = FluxReason(folder, window=3)
    read_epochs(corpus, Order(len(corpus), BATCH, seed=3))
    assert all(started[*group, IMAGE] >= 5 for group in GROUPS)
    assert sum(started[*group, IMAGE] for group in GROUPS) > 0.6 * len(corpus)


def test_a_reader_that_keeps_fewer_open_than_the_order_mixes_would_thrash_and_is_refused(folder, counts):
    corpus = FluxReason(folder, window=3)
    with pytest.raises(ValueError, match="^window=4, but the corpus keeps 3 blocks open: open it with this window$"):
        Order(len(corpus), BATCH, seed=3, blocks=corpus.blocks, window=4)
    with pytest.raises(ValueError, match="^window=4, but the corpus keeps 3 blocks open"):
        Mix({"a": range(240)}, {"a": 1}, BATCH, 3, blocks={"a": corpus.blocks}, window=4)
    read_epochs(corpus, Order(len(corpus), BATCH, seed=3, blocks=tuple(corpus.blocks), window=4))
    assert min(started[*group, IMAGE] for group in GROUPS) >= 2, "what the refusal keeps away"
    for window in (0, -1):
        with pytest.raises(ValueError, match=f"^window={window}: must be at least 1$"):
            FluxReason(folder, window=window)


@pytest.mark.parametrize("workers", [1, 2])
def test_every_worker_decodes_a_row_group_at_most_once(folder, counts, workers):
    corpus = FluxReason(folder, window=4)
    order = Order(len(corpus), BATCH, seed=3, blocks=corpus.blocks, window=4)
    readers = read_epochs(corpus, order, workers)
    assert len(readers) == workers and not started, "the reading is theirs"
    assert all(max(reader.values()) == 1 for reader in readers)
    total = sum(readers, Counter())
    assert all(1 <= total[*group, IMAGE] <= workers for group in GROUPS)


def test_corpora_that_are_mixed_do_not_close_each_others_row_groups(folder, counts):
    """Each is read through an order of its own, with a window of its own."""
    corpora = {groups: FluxReason(folder / f"{groups}.parquet", window=3) for groups in FILES}
    members = {groups: range(len(corpus)) for groups, corpus in corpora.items()}
    blocks = {groups: corpus.blocks for groups, corpus in corpora.items()}
    mix = Mix(members, {5: 5, 7: 7}, BATCH, 3, blocks=blocks, window=3)
    for position in range(sum(FILES) * ROWS):
        name, _ = mix.shares.at(position)
        corpora[name][mix.at(position)[1]].target.read()
    assert started == {(*group, column): 1 for group in GROUPS for column in (CAPTION, IMAGE)}


def test_every_thread_has_a_position_of_its_own(folder, counts):
    reader, path = Cells(1), folder / "5.parquet"
    found = [reader.read(path, 0, 9, IMAGE)]
    thread = threading.Thread(target=lambda: found.extend(reader.read(path, 0, row, IMAGE) for row in (0, 19)))
    thread.start()
    thread.join()
    found.append(reader.read(path, 0, 10, IMAGE))
    assert found == [noise(row) for row in (9, 0, 19, 10)] and started == {(5, 0, IMAGE): 2}


def test_columns_and_row_groups_keep_blocks_of_their_own_size(folder, monkeypatch):
    """What is read of one begins anew between any two blocks of another."""
    monkeypatch.setattr(cells, "BLOCK_BYTES", 5000)
    reader, path, sizes, read = Cells(3), folder / "5.parquet", {}, cells._Column._read

    def measured(column):
        blocks = sizes.setdefault((column._group, column._column), [])
        for block in read(column):
            blocks.append(len(block))
            yield block

    monkeypatch.setattr(cells._Column, "_read", measured)
    for row in range(0, ROWS, 2):
        for group in range(3):
            if row >= 4 * group:
                assert reader.read(path, group, row, IMAGE) == noise(group * ROWS + row)
            if row >= 5 * group:
                assert reader.read(path, group, row, CAPTION) == f"detail of picture {group * ROWS + row}"
    assert [sizes[group, CAPTION] for group in range(3)] == [[20]] * 3
    assert [sizes[group, IMAGE] for group in range(3)] == [[4] * 5] * 3


def test_what_is_open_is_not_pickled(folder, counts):
    sample = FluxReason(folder, window=3)[0]
    assert sample.target.read() == noise(0)
    again = pickle.loads(pickle.dumps(sample))
    assert again.target.read() == noise(0) and len(pickle.dumps(sample)) < 1000 and started[5, 0, IMAGE] == 2
    assert pickle.loads(pickle.dumps(FluxReason(folder, window=3))).blocks.window == 3


# ---------------------------------------------------------------------------- memory

# Peak memory of an epoch by block, in a process of its own.
WALK = """
import re, sys
from pathlib import Path
from clvr_train.data.flux_reason import FluxReason
from clvr_train.data.order import Order
Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
corpus = FluxReason(Path(sys.argv[1]), window=int(sys.argv[2]))
order = Order(len(corpus), 1, 0, blocks=corpus.blocks, window=int(sys.argv[2]))
read = sum(len(corpus[order.at(position)[1]].target.read()) for position in range(len(corpus)))
assert read > 0.9 * Path(sys.argv[1]).stat().st_size
sys.stdout.write(re.search(r"VmHWM:\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1])
"""


def peak_bytes(path: Path, window: int) -> int:
    env = os.environ | {"ARROW_DEFAULT_MEMORY_POOL": "system"}  # the other one gives memory back late
    command = [sys.executable, "-c", WALK, str(path), str(window)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True, env=env).stdout) * 1024


def test_a_window_holds_a_block_and_a_page_of_every_row_group(tmp_path):
    """Row groups of 32 MB in pages of 1 MB: an open one takes 7 MB and what the allocator leaves between (measured)."""
    path = tmp_path / "a.parquet"
    options = {"use_dictionary": False, "write_batch_size": 1, "data_page_size": 2**20}
    with pq.ParquetWriter(path, FLUX_REASON, **options) as writer:
        for first in range(0, 4 * 64, 64):
            rows = flux_reason_rows(range(first, first + 64), lambda row: noise(row, 500_000))
            writer.write_table(pa.Table.from_pylist(rows, schema=FLUX_REASON), row_group_size=64)
    assert path.stat().st_size > 120e6
    each = (peak_bytes(path, 4) - peak_bytes(path, 1)) / 3
    assert each < 4 * BLOCK_BYTES, each
