from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clvr_train.data.parquet import write_parquet
from clvr_train.data.readers import find_files, read_trajectories
from clvr_train.data.records import DataError, to_record
from clvr_train.data.refusals import Refusals
from tests.data.examples import content, image_bytes, jpeg, trajectory

IMAGES = [jpeg(1), jpeg(2)]


def record(name: str = "a", **fields: object) -> dict:
    return {**to_record(trajectory(name), IMAGES), **fields}


def write(file: Path, *records: dict, **options: object) -> Path:
    pq.write_table(pa.Table.from_pylist(list(records)), file, **options)
    return file


def test_columns_are_as_documented(tmp_path: Path) -> None:
    write_parquet(tmp_path / "data", [trajectory()])
    (file,) = find_files(tmp_path / "data")
    schema = pq.read_schema(file)
    assert schema.names == ["id", "conversations", "images"]
    assert str(schema.field("conversations").type) == "list<element: struct<from: string, value: string>>"
    (row,) = pq.read_table(file).to_pylist()
    assert row["images"][1]["bytes"] == trajectory().images[1].read()


def test_row_groups_are_small(tmp_path: Path) -> None:
    write_parquet(tmp_path / "data", [trajectory(f"t{n}") for n in range(300)], file_bytes=1 << 30)
    metadata = pq.read_metadata(find_files(tmp_path / "data")[0])
    assert metadata.num_rows == 300 and metadata.num_row_groups > 1
    assert all(metadata.row_group(n).total_byte_size < 5 << 20 for n in range(metadata.num_row_groups))


@pytest.mark.parametrize("options", [{}, {"row_group_size": 2}, {"compression": "zstd", "data_page_size": 100}])
def test_files_of_others_are_read(tmp_path: Path, options: dict) -> None:
    records = [record(f"t{n}", images=[jpeg(n), jpeg(n + 1)], extra=n) for n in range(5)]
    file = write(tmp_path / "plain.parquet", *records, **options)
    read = list(read_trajectories(file))
    assert [image_bytes(t) for t in read] == [one["images"] for one in records]
    assert [image_bytes(t) for t in reversed(read)] == [one["images"] for one in reversed(records)]


def test_images_as_structs_with_a_path_lie_beside_the_file(tmp_path: Path) -> None:
    (tmp_path / "one.jpg").write_bytes(IMAGES[0])
    images = [{"bytes": None, "path": "one.jpg"}, {"bytes": IMAGES[1], "path": "gone.jpg"}]
    (read,) = read_trajectories(write(tmp_path / "x.parquet", record(images=images)))
    assert image_bytes(read) == IMAGES and read.images[0] == tmp_path / "one.jpg"
    assert content(read)[0] == "a"


def test_messages_are_read(tmp_path: Path) -> None:
    own = record()
    roles = {"human": "user", "gpt": "assistant"}
    messages = [{"role": roles[turn["from"]], "content": turn["value"]} for turn in own["conversations"]]
    file = write(tmp_path / "m.parquet", {"messages": messages, "images": IMAGES, "tools": None})
    (read,) = read_trajectories(file)
    assert read.id == "m-1" and [s.action for s in read.steps] == ["generate", "verify", "edit", "stop"]


BAD = {
    "id is a number": ({"id": 3}, "id", "wrong_type"),
    "no images": ({"images": None}, "images", "wrong_type"),
    "no turns": ({"conversations": None}, "conversations", "wrong_type"),
    "an empty cell": ({"images": [IMAGES[0], None]}, "images[2]", "wrong_type"),
    "no image": ({"images": [IMAGES[0], b"no"]}, "images[2]", "not_an_image"),
    "cut image": ({"images": [IMAGES[0], IMAGES[1][:20]]}, "images[2]", "not_an_image"),
    "a bad answer": ({"kto_tag": False}, "kto_tag", "no_place"),
    "of two answers": ({"rejected": "a red square"}, "rejected", "no_place"),
    "outside": ({"images": [{"bytes": None, "path": "../x.png"}] * 2}, "images[1]", "outside_root"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_records_of_parquet(tmp_path: Path, name: str) -> None:
    change, field, rule = BAD[name]
    file = write(tmp_path / "x.parquet", record(**change))
    with pytest.raises(DataError) as error:
        list(read_trajectories(file))
    assert (error.value.record, error.value.field, error.value.rule) == (1, field, rule)


def test_text_that_is_no_utf8_is_refused_and_the_next_row_read(tmp_path: Path) -> None:
    file = write(tmp_path / "x.parquet", record("t0"), record("QQQQQ"), record("t2"), use_dictionary=False,
                 compression="none", write_statistics=False)  # fmt: skip
    file.write_bytes(file.read_bytes().replace(b"QQQQQ", b"\xff\xfe\xff\xfe\xff"))
    with pytest.raises(DataError, match=r":2: record: text that is no UTF-8"):
        list(read_trajectories(file))
    assert [t.id for t in read_trajectories(file, refusals=Refusals(file, 0.5))] == ["t0", "t2"]


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    whole = write(tmp_path / "x.parquet", *(record(f"t{n}") for n in range(4)), row_group_size=2).read_bytes()
    for damaged in (b"", b"PAR1", whole[:-50], whole[:100] + bytes(400) + whole[500:]):
        (tmp_path / "cut.parquet").write_bytes(damaged)
        with pytest.raises(DataError) as error:
            list(read_trajectories(tmp_path / "cut.parquet"))
        assert error.value.rule in ("bad_container", "not_an_image", "bad_utf8", "unreadable_image", "unknown_role")


def test_a_column_that_is_not_there(tmp_path: Path) -> None:
    own = record()
    del own["images"]
    with pytest.raises(DataError, match="images: is missing"):
        list(read_trajectories(write(tmp_path / "x.parquet", own)))


@pytest.mark.parametrize(("rows", "message"), [(3, "gave 3 rows where one was asked for"), (0, "gave 0 rows")])
def test_rows_that_come_together_are_an_error(tmp_path: Path, monkeypatch, rows: int, message: str) -> None:
    """As of a reader that somebody else reads too: nothing is left out without a word."""
    file, real = write(tmp_path / "x.parquet", *(record(f"t{n}") for n in range(5))), pq.ParquetFile.iter_batches

    def together(opened: pq.ParquetFile, batch_size: int, **options: object):
        return (batch.slice(0, rows) for batch in real(opened, max(rows, 1), **options))

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", together)
    with pytest.raises(DataError, match=f":1: record: .*row group 1 {message}") as error:
        list(read_trajectories(file))
    assert error.value.rule == "bad_container"


def test_rows_that_are_missing_are_an_error(tmp_path: Path, monkeypatch) -> None:
    file, real = write(tmp_path / "x.parquet", *(record(f"t{n}") for n in range(5))), pq.ParquetFile.iter_batches
    monkeypatch.setattr(pq.ParquetFile, "iter_batches", lambda *given, **options: islice(real(*given, **options), 3))
    with pytest.raises(DataError, match=r":4: record: .*row group 1 has 3 rows, and the footer says 5"):
        list(read_trajectories(file))


def test_a_file_that_changed_is_an_error(tmp_path: Path) -> None:
    file = write(tmp_path / "x.parquet", record("t0"), record("t1"))
    last = list(read_trajectories(file))[1]
    write(file, record("t0"))
    with pytest.raises(OSError, match="row group 1 cannot be read"):
        last.images[0].read()
