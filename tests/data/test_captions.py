import functools
import io
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Features, Value, load_dataset
from datasets import Image as ImageFeature
from PIL import Image

from clvr_train.data.captions import fit_target
from clvr_train.data.cells import read_cell
from clvr_train.data.fine_t2i import FineT2I
from clvr_train.data.flux_reason import FluxReason
from clvr_train.data.images import ImageError, image_size, open_image, target_image, target_pixels
from clvr_train.data.order import Order
from clvr_train.data.records import DataError
from tests.data.corpora import (
    FLUX_REASON,
    fine_t2i_record,
    flux_reason_rows,
    picture,
    write_flux_reason,
    write_tar,
)


@pytest.fixture(scope="module")
def flux_reason(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("flux_reason")
    write_flux_reason(folder / "Text" / "fluxdb-text-00000-of-00001.parquet", flux_reason_rows(range(20, 26)))
    for part, rows in enumerate((range(10), range(10, 20))):
        file = folder / "Aesthetics" / f"fluxdb-aesthetics-{part:05d}-of-00002.parquet"
        write_flux_reason(file, flux_reason_rows(rows))
    (folder / "README.md").write_text("not a part of it")
    return folder


# ---------------------------------------------------------------------------- FLUX-Reason-6M


def test_the_schema_has_36_columns() -> None:
    assert len(FLUX_REASON) == 36


def test_every_row_is_a_sample(flux_reason: Path) -> None:
    corpus = FluxReason(flux_reason)
    assert len(corpus) == len(list(corpus)) == 26 and corpus.num_without_caption == 0
    for row, sample in enumerate(corpus):
        assert sample.goal == f"detail of picture {row}"
        assert (sample.step, sample.reasonings, sample.references) == (1, (), ())
        assert sample.target.read() == picture(row)
        assert image_size(sample.target) == (96, 96)
    assert len({sample.key for sample in corpus}) == 26
    assert corpus[-1].goal == "detail of picture 25"
    assert [sample.goal for sample in corpus[3:5]] == [corpus[3].goal, corpus[4].goal]
    with pytest.raises(IndexError):
        corpus[26]


def test_rows_are_those_that_datasets_reads(flux_reason: Path, tmp_path: Path) -> None:
    files = [str(path) for path in sorted(flux_reason.rglob("*.parquet"))]
    features = Features.from_arrow_schema(FLUX_REASON)
    features["image"], features["caption_entity"] = ImageFeature(decode=False), Value("string")
    stream = load_dataset("parquet", data_files=files, split="train", streaming=True, features=features)
    theirs = [(row["caption_entity"], row["image"]["bytes"]) for row in stream]
    assert [(sample.goal, sample.target.read()) for sample in FluxReason(files, "entity")] == theirs


def test_rows_without_the_chosen_caption_are_left_out_and_counted(flux_reason: Path) -> None:
    for kind in ("text", "text_cn"):
        corpus = FluxReason(flux_reason, kind)
        rows = [row for row in range(26) if row % 3]
        assert len(corpus) == len(rows) and corpus.num_without_caption == 26 - len(rows)
        for row, sample in zip(rows, corpus, strict=True):
            assert str(row) in sample.goal and sample.target.read() == picture(row)


def test_any_order_gives_the_same_samples(flux_reason: Path) -> None:
    corpus = pickle.loads(pickle.dumps(FluxReason(flux_reason)))
    for row in np.random.default_rng(0).permutation(26).tolist():
        assert corpus[row].goal == f"detail of picture {row}" and corpus[row].target.read() == picture(row)


def test_names_stay_when_the_folder_moves(flux_reason: Path, tmp_path: Path) -> None:
    (tmp_path / "moved").symlink_to(flux_reason)
    moved = FluxReason(sorted((tmp_path / "moved").resolve().rglob("*.parquet")))
    assert [s.key for s in moved] == [s.key for s in FluxReason(flux_reason)]
    assert moved[0].trajectory_id == "Aesthetics/fluxdb-aesthetics-00000-of-00002:1"


def test_a_limit_ends_a_corpus_earlier(flux_reason: Path, tmp_path: Path) -> None:
    assert [sample.goal for sample in FluxReason(flux_reason, limit=7)] == [f"detail of picture {n}" for n in range(7)]
    tar = write_tar(tmp_path / "a.tar", fine_t2i_record("a", picture(0)) + fine_t2i_record("b", picture(1)))
    assert [sample.trajectory_id for sample in FineT2I(tar, limit=1)] == ["a:a"] and len(FineT2I(tar, limit=9)) == 2
    for path in (write_tar(tmp_path / "b.tar", []), tar):
        with pytest.raises(ValueError, match=f"^{path}: no records in 1 files"):
            FineT2I(path, limit=0)


def test_blocks_are_the_samples_of_every_row_group(flux_reason: Path, tmp_path: Path) -> None:
    groups = [4, 4, 2, 4, 4, 2, 4, 2]  # of three files
    assert FluxReason(flux_reason).blocks == tuple(groups) and FluxReason(flux_reason, window=3).blocks.window == 3
    assert FluxReason(flux_reason, "text").blocks == (2, 3, 1, 3, 3, 1, 3, 1)
    for limit, blocks in ((1, [1]), (7, [4, 3]), (10, [4, 4, 2]), (25, [*groups[:7], 1]), (90, groups)):
        assert FluxReason(flux_reason, limit=limit).blocks == (*blocks, *[0] * (8 - len(blocks)))
    for kind, seen in (("detail", range(26)), ("text", [row for row in range(26) if row % 3])):
        corpus = FluxReason(flux_reason, kind, window=2)
        order = Order(len(corpus), 1, 0, blocks=corpus.blocks, window=2)
        goals = [corpus[order.at(position)[1]].goal for position in range(len(corpus))]
        assert sorted(goals) == sorted(f"{kind} of picture {row}" for row in seen) != goals
    tar = FineT2I(write_tar(tmp_path / "a.tar", fine_t2i_record("a", picture(0)) + fine_t2i_record("b", picture(1))))
    assert tar.blocks == () and Order(2, 1, 0, blocks=tar.blocks, window=8).at(0) == Order(2, 1, 0).at(0)


def test_targets_are_brought_to_the_size_that_is_drawn(flux_reason: Path) -> None:
    sample = FluxReason(flux_reason)[3]
    fitted = fit_target(sample, [(64, 128), (128, 64)])
    assert np.array_equal(fitted.target, target_image(sample.target, (64, 128)))
    assert torch.equal(target_pixels(fitted.target, (64, 128)), target_pixels(sample.target, (64, 128)))
    assert fitted.key == sample.key and fitted.goal == sample.goal


def without(column: str) -> pa.Schema:
    return pa.schema([field for field in FLUX_REASON if field.name != column])


NO_STRUCT = FLUX_REASON.set(1, pa.field("image", pa.binary()))
NUMBERS = FLUX_REASON.set(9, pa.field("caption_detail", pa.int64()))


@pytest.mark.parametrize(
    ("schema", "caption", "message"),
    [
        (without("caption_detail"), "detail", "caption_detail: there is no such column; captions are composition, "),
        (FLUX_REASON, "poem", "caption_poem: there is no such column; captions are composition, "),
        (without("image"), "detail", "image: there is no such column"),
        (NO_STRUCT, "detail", "image: must be a struct with binary 'bytes', not binary"),
        (NUMBERS, "detail", "caption_detail: must be strings, not int64"),
    ],
)
def test_a_wrong_schema_is_named(tmp_path: Path, schema: pa.Schema, caption: str, message: str) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(schema.empty_table(), path)
    with pytest.raises(DataError) as error:
        FluxReason(tmp_path, caption)
    assert str(error.value).startswith(f"{path}:1: {message}") and "\n" not in str(error.value)


def test_a_file_that_was_cut_is_named(tmp_path: Path) -> None:
    path = write_flux_reason(tmp_path / "a.parquet", flux_reason_rows(range(8)))
    whole = path.read_bytes()
    for size in (0, 3, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(DataError, match=rf"^{path}:1: file: no parquet file, or cut short \(.*\)$") as error:
            FluxReason(tmp_path)
        assert error.value.rule == "bad_container"
    with pytest.raises(FileNotFoundError, match="b.parquet: no such file"):
        FluxReason(tmp_path / "b.parquet")


def test_a_damaged_page_is_named_when_it_is_read(tmp_path: Path) -> None:
    path = write_flux_reason(tmp_path / "a.parquet", flux_reason_rows(range(8)))
    corpus = FluxReason(tmp_path)
    data = bytearray(path.read_bytes())
    layout = pq.ParquetFile(path).metadata.row_group(1)
    for number in range(layout.num_columns):
        column = layout.column(number)
        if column.path_in_schema in ("caption_detail", "image.bytes"):
            start = column.dictionary_page_offset or column.data_page_offset
            data[start : start + 40] = b"\xff" * 40
    path.write_bytes(data)
    assert corpus[3].goal == "detail of picture 3"
    with pytest.raises(DataError, match=rf"^{path}:5: caption_detail: row group 2 cannot be read \(.*\)$"):
        corpus[4]
    with pytest.raises(OSError, match="row group 2 cannot be read"):
        read_cell(path, 1, 0, "image.bytes")


def test_unusable_cells_are_named(tmp_path: Path) -> None:
    rows = flux_reason_rows(range(4))
    rows[1]["caption_detail"] = "  "
    rows[2]["image"] = {"bytes": None, "path": None}
    rows[3]["image"]["bytes"] = b"no image"
    path = write_flux_reason(tmp_path / "a.parquet", rows)
    corpus = FluxReason(path)
    assert corpus[0].trajectory_id == "a:1"
    with pytest.raises(DataError, match=rf"^{path}:2: caption_detail: must not be empty$"):
        corpus[1]
    with pytest.raises(ImageError, match=rf"^{path}:3:image: unreadable image \(it is null\)$"):
        open_image(corpus[2].target)
    with pytest.raises(ImageError, match=rf"^{path}:4:image: not an image in [A-Z0-9, ]+$"):
        open_image(corpus[3].target)


# ---------------------------------------------------------------------------- Fine-T2I


def test_the_caption_is_what_the_image_shows(tmp_path: Path) -> None:
    enhanced = {"image_generated_with_enhanced_prompt": True}
    plain = {"image_generated_with_enhanced_prompt": False}
    photo = {"image_generator": "pexels", "style": None, "prompt_category": None, "task": None}
    records = [
        fine_t2i_record("a", picture(0), **enhanced),
        fine_t2i_record("b", picture(1), **plain),
        fine_t2i_record("c", picture(2), **plain, **photo),
        fine_t2i_record("d", picture(3), **{"image_generated_with_enhanced_prompt": None}, **photo),
        fine_t2i_record("e", picture(4), text="", **photo, prompt=""),  # .txt is empty, and so is the prompt
        fine_t2i_record("f", picture(5), text="", **plain),
    ]
    write_tar(tmp_path / "curated" / "train-000000.tar", sum(records[:3], []))
    write_tar(tmp_path / "curated" / "train-000001.tar", sum(records[3:], []))
    corpus = FineT2I(tmp_path)
    assert [sample.goal for sample in corpus] == [
        "enhanced prompt of a",
        "prompt of b",
        "enhanced prompt of c",
        "enhanced prompt of d",
        "enhanced prompt of e",
        "prompt of f",
    ]
    assert [sample.target.read() for sample in corpus] == [picture(n) for n in range(6)]
    assert corpus[3].trajectory_id == "curated/train-000001:d"
    assert pickle.loads(pickle.dumps(corpus))[-1].key == corpus[5].key == ("curated/train-000001:f", 1)
    with pytest.raises(IndexError):
        corpus[6]


def test_what_the_ending_says_of_an_image_is_not_believed(tmp_path: Path) -> None:
    images = [picture(0, (80, 70), "PNG"), picture(1, (80, 70), mode="CMYK"), picture(2, (80, 70), "PNG", "P")]
    records = [fine_t2i_record(str(n), image) for n, image in enumerate(images)]
    corpus = FineT2I(write_tar(tmp_path / "train-000000.tar", sum(records, [])))
    for sample in corpus:
        opened = open_image(sample.target)
        assert opened.mode == "RGB" and opened.size == (80, 70) and image_size(sample.target) == (70, 80)
    exact = Image.fromarray(np.random.default_rng(0).integers(0, 256, (70, 80, 3), dtype=np.uint8))
    assert np.array_equal(open_image(corpus[0].target), exact)


def test_bad_records_are_named_and_leave_the_others(tmp_path: Path) -> None:
    def replaced(key: str, fields: bytes) -> list[tuple[str, bytes]]:
        members = fine_t2i_record(key, picture(0))
        return [(name, fields if name.endswith("json") else data) for name, data in members]

    alone = fine_t2i_record("g", b"")[1:]
    bad = {
        "json: not a line of JSON": replaced("a", b'{"prompt": '),
        "json: must be a JSON object": replaced("b", b"[]"),
        "json.image_generated_with_enhanced_prompt: is missing": replaced("c", b'{"prompt": "x"}'),
        "json.prompt: must not be empty": fine_t2i_record(
            "d", b"", prompt=" ", image_generated_with_enhanced_prompt=False
        ),
        "json.enhanced_prompt: must be a string, not NoneType": fine_t2i_record("e", b"", enhanced_prompt=None),
        "json: 'f' has none": [("f.jpg", picture(0)), ("f.txt", b"x")],
        "jpg: 'g' has no image beside it": alone,
        "json: not a line of JSON in UTF-8 (": replaced("h", b'{"prompt": "\xff"}'),
        "json.enhanced_prompt: holds half a surrogate pair": fine_t2i_record("i", b"", enhanced_prompt="\ud800"),
    }
    path = write_tar(tmp_path / "a.tar", sum(bad.values(), []) + fine_t2i_record("z", picture(1)))
    corpus = FineT2I(path)
    for number, message in enumerate(bad):
        with pytest.raises(DataError) as error:
            corpus[number]
        assert str(error.value).startswith(f"{path}:{number + 1}: {message}") and "\n" not in str(error.value)
        assert error.value.rule and error.value.record == number + 1
    assert corpus[len(bad)].goal == "enhanced prompt of z"


def test_a_tar_that_was_cut_is_named(tmp_path: Path) -> None:
    whole = write_tar(tmp_path / "a.tar", fine_t2i_record("a", picture(0)) + fine_t2i_record("b", picture(1)))
    corpus = FineT2I(whole)
    data = whole.read_bytes()
    whole.write_bytes(data[: len(data) // 3])
    with pytest.raises(DataError, match=rf"^{whole}:\d: record: "):
        FineT2I(tmp_path)
    with pytest.raises(DataError, match=rf"^{whole}:2: json: .* bytes too early$"):
        corpus[1]
    (tmp_path / "a.tar").unlink()
    with pytest.raises(FileNotFoundError, match="no file \\*.tar there"):
        FineT2I(tmp_path)


# ---------------------------------------------------------------------------- memory

# Peak memory of walking a corpus whole, in a process of its own. Not by getrusage, whose peak is the parent's at first.
MEASURED = """
import re, sys
from pathlib import Path
from clvr_train.data import fine_t2i, flux_reason, validate
form, path = sys.argv[1], Path(sys.argv[2])
Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
{walk}
sys.stdout.write(re.search(r"VmHWM:\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1])
"""
READ = """
corpus = {"flux_reason": flux_reason.FluxReason, "fine_t2i": fine_t2i.FineT2I}[form](path)
read = sum(len(sample.target.read()) + len(sample.goal) for sample in corpus)
assert read > 0.9 * path.stat().st_size
"""
VALIDATE = """
report = validate.validate(path, 0, form=form)
assert report.records >= 80 and not report.refused
"""


def peak_bytes(walk: str, form: str, path: Path) -> int:
    command = [sys.executable, "-c", MEASURED.format(walk=walk), form, str(path)]
    env = os.environ | {"ARROW_DEFAULT_MEMORY_POOL": "system"}  # the other one gives memory back late
    return int(subprocess.run(command, check=True, capture_output=True, text=True, env=env).stdout) * 1024


def noise(row: int, size: int = 100_000) -> bytes:
    """A small image, and behind it what cannot be packed."""
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64)).save(buffer, "PNG")
    return buffer.getvalue() + np.random.default_rng(row).bytes(size - buffer.tell())


def write_rows(path: Path, rows: int) -> Path:
    """In row groups of 1 MB."""
    return write_flux_reason(path, flux_reason_rows(range(rows), noise), group=10)


def write_one_group(path: Path, rows: int) -> Path:
    """One row group, in pages of 1024 rows."""
    small = functools.partial(noise, size=5_000)
    return write_flux_reason(path, flux_reason_rows(range(rows * 20), small), group=rows * 20)


def write_records(path: Path, rows: int) -> Path:
    return write_tar(path, (member for n in range(rows) for member in fine_t2i_record(str(n), noise(n))))


@pytest.mark.parametrize("walk", [READ, VALIDATE], ids=["read", "validate"])
@pytest.mark.parametrize(
    ("form", "write", "ending"),
    [
        ("flux_reason", write_rows, "parquet"),
        ("flux_reason", write_one_group, "parquet"),
        ("fine_t2i", write_records, "tar"),
    ],
)
def test_memory_does_not_grow_with_the_file(
    tmp_path: Path, walk: str, form: str, write: Callable[[Path, int], Path], ending: str
) -> None:
    few, many = (write(tmp_path / f"{rows}.{ending}", rows) for rows in (80, 800))
    growth = many.stat().st_size - few.stat().st_size
    assert growth > 70e6
    rise = peak_bytes(walk, form, many) - peak_bytes(walk, form, few)
    assert rise < 0.4 * growth, rise
