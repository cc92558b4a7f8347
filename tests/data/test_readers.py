import gc
import io
import json
import logging
import pickle
import tempfile
import threading
import tracemalloc
from itertools import permutations
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from clvr_train.data.parquet import write_parquet
from clvr_train.data.readers import find_files, load_trajectories, read_trajectories
from clvr_train.data.records import DataError, to_record
from clvr_train.data.refusals import Refusals
from clvr_train.data.shards import write_shards
from clvr_train.data.sharegpt import FILE_NAME, write_trajectories
from clvr_train.data.stored import encoded, in_memory
from clvr_train.method.trajectory import Step, Trajectory
from tests.data.examples import content, data_sets, good_records, image_bytes, picture, trajectory, write_lines


def encoded_by_pillow(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


WRITERS = {"json": write_trajectories, "parquet": write_parquet, "tar": write_shards}
every_writer = pytest.mark.parametrize("form", WRITERS)
IMAGES_OF_33 = [[encoded(image)[0] for image in trajectory(f"t{n}", n).images] for n in range(33)]


@settings(max_examples=20, deadline=None)
@given(data_sets, st.sampled_from(list(permutations(WRITERS))))
def test_nothing_is_lost_from_one_form_to_the_next(data: list[Trajectory], forms: tuple[str, ...]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        before, kept = data, None
        for form in forms:
            assert WRITERS[form](Path(folder, form), before) == len(data)
            after = list(read_trajectories(Path(folder, form)))
            assert [content(t) for t in after] == [content(t) for t in data]
            bytes_now = [image_bytes(t) for t in after]
            assert kept is None or bytes_now == kept
            before, kept = after, bytes_now


@pytest.mark.parametrize("second", WRITERS)
@pytest.mark.parametrize("first", WRITERS)
def test_nothing_is_lost_where_a_form_is_written_while_another_is_read(tmp_path: Path, first: str, second: str) -> None:
    data = [trajectory(f"t{n}", n) for n in range(33)]
    WRITERS[first](tmp_path / "first", data)
    assert WRITERS[second](tmp_path / "second", read_trajectories(tmp_path / "first")) == len(data)
    assert [content(t) for t in read_trajectories(tmp_path / "second")] == [content(t) for t in data]


@pytest.fixture(scope="module")
def of_33(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A file of 33 trajectories in every form; of parquet one of a single row group and one of row groups of 7."""
    folder, data = tmp_path_factory.mktemp("of_33"), [trajectory(f"t{n}", n) for n in range(33)]
    for form, write in WRITERS.items():
        write(folder / form, data)
    files = {form: find_files(folder / form)[0] for form in WRITERS}
    pq.write_table(pq.read_table(files["parquet"]), folder / "small.parquet", row_group_size=7)
    return files | {"small row groups": folder / "small.parquet"}


@settings(max_examples=15, deadline=None)
@given(st.data())
def test_whatever_images_are_opened_while_reading_nothing_is_lost(of_33: dict[str, Path], data: st.DataObject) -> None:
    """After any record any image that was read so far, in any order."""
    file = of_33[data.draw(st.sampled_from(sorted(of_33)))]
    some = st.lists(st.tuples(st.integers(0, 32), st.integers(0, 1)), max_size=4)
    opened = data.draw(st.lists(some, min_size=33, max_size=33))
    read: list[Trajectory] = []
    for one in read_trajectories(file):
        read.append(one)
        for back, image in opened[len(read) - 1]:
            seed = back % len(read)
            assert image_bytes(read[seed])[image] == IMAGES_OF_33[seed][image]
    assert [t.id for t in read] == [f"t{n}" for n in range(33)]


@every_writer
def test_an_encoded_image_keeps_its_bytes(tmp_path: Path, form: str) -> None:
    WRITERS[form](tmp_path / "data", [trajectory()])
    (after,) = read_trajectories(tmp_path / "data", decode=True)
    assert image_bytes(after)[1] == trajectory().images[1].read()
    assert image_bytes(after)[0].startswith(b"\x89PNG")


@every_writer
def test_pointers_go_to_other_processes(tmp_path: Path, form: str) -> None:
    WRITERS[form](tmp_path / "data", [trajectory(f"t{n}", n) for n in range(5)])
    data = list(read_trajectories(tmp_path / "data"))
    assert [content(t) for t in pickle.loads(pickle.dumps(data))] == [content(t) for t in data]
    assert form == "json" or data[3].images[1].name.endswith(":4:images[2]")


@every_writer
def test_failed_write_leaves_nothing(tmp_path: Path, form: str) -> None:
    for bad, field in [(trajectory("t"), "id"), (Trajectory("x", "see <IMG_GEN_1>", trajectory().steps), "goal"),
                       (trajectory("x", reasoning=" space"), r"steps\[1\].reasoning"),
                       (Trajectory("\ud800", "goal", trajectory().steps), "id"),
                       (Trajectory("x", "goal", (Step("see", "generate", tmp_path / "none.png"),)),
                        r"steps\[1\].image")]:  # fmt: skip
        with pytest.raises(DataError, match=rf":2: {field}: "):
            WRITERS[form](tmp_path / "data", [trajectory("t"), bad])
        left = {path.suffix for path in tmp_path.rglob("*")}
        assert not left & {".tmp", ".staging", ".jsonl", ".parquet", ".tar"}


@every_writer
@pytest.mark.parametrize(("size", "message"), [((200, 63), "200 x 63 px, at least 64 a side"),
                                               ((64, 513), "64 x 513 px, an aspect above 8")])  # fmt: skip
def test_an_image_that_readers_refuse_is_not_written(
    tmp_path: Path, form: str, size: tuple[int, int], message: str
) -> None:
    for image in (picture(0, size), in_memory("there", encoded_by_pillow(picture(0, size)))):
        one = Trajectory("x", "goal", (Step("see", "generate", image),))
        with pytest.raises(DataError, match=rf":2: steps\[1\].image: .*: {message}") as error:
            WRITERS[form](tmp_path / "data", [trajectory("t"), one])
        assert error.value.rule in ("small_side", "aspect")
    just = Trajectory("x", "goal", (Step("see", "generate", picture(0, (64, 512))),))
    WRITERS[form](tmp_path / "data", [just])
    assert [content(t) for t in read_trajectories(tmp_path / "data")] == [content(just)]


@pytest.mark.parametrize("form", ["parquet", "tar"])
def test_a_full_folder_is_not_written_into(tmp_path: Path, form: str) -> None:
    (tmp_path / "data").mkdir()
    WRITERS[form](tmp_path / "data", [trajectory()])
    with pytest.raises(FileExistsError, match="is there already"):
        WRITERS[form](tmp_path / "data", [trajectory()])
    assert len(list(read_trajectories(tmp_path / "data"))) == 1


@pytest.mark.parametrize("form", ["parquet", "tar"])
def test_many_files_are_read_in_order(tmp_path: Path, form: str) -> None:
    ids = [f"t{n}" for n in range(7)]
    WRITERS[form](tmp_path / "data", [trajectory(name) for name in ids], file_bytes=40_000)
    files = find_files(tmp_path / "data")
    assert len(files) > 2
    assert [t.id for t in read_trajectories(tmp_path / "data")] == ids
    assert [t.id for file in files for t in read_trajectories(file)] == ids
    assert len(list(read_trajectories(tmp_path / "data", limit=3))) == 3


@every_writer
def test_an_empty_data_set_is_an_error(tmp_path: Path, form: str) -> None:
    assert WRITERS[form](tmp_path / "data", []) == 0
    with pytest.raises(DataError, match=":1: record: the file is empty") as error:
        list(read_trajectories(tmp_path / "data"))
    assert error.value.rule == "empty_file"
    assert repr(pickle.loads(pickle.dumps(error.value))) == repr(error.value)


def test_what_a_path_means(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="trajectories.jsonl: no such file; a folder of trajectories holds"):
        find_files(tmp_path)
    with pytest.raises(FileNotFoundError, match="x.tar: no such file$"):
        find_files(tmp_path / "x.tar")
    (tmp_path / "notes.txt").touch()
    (tmp_path / "proxy_prompts.jsonl").touch()
    with pytest.raises(ValueError, match="notes.txt: not one of .jsonl, .json, .parquet, .tar"):
        find_files(tmp_path / "notes.txt")
    (tmp_path / "trajectories.json").touch()
    assert find_files(tmp_path) == [tmp_path / "trajectories.json"]
    (tmp_path / "b.tar").touch()
    with pytest.raises(ValueError, match="holds trajectories.json and b.tar; name the file"):
        find_files(tmp_path)
    (tmp_path / "trajectories.json").unlink()
    (tmp_path / "a.tar").touch()
    assert [file.name for file in find_files(tmp_path)] == ["a.tar", "b.tar"]


def test_json_as_array_and_as_lines(tmp_path: Path) -> None:
    records = good_records(tmp_path)
    texts = [json.dumps(records), json.dumps(records, indent=2, ensure_ascii=False), "\ufeff \n" + json.dumps(records),
             "\n".join(map(json.dumps, records))]  # fmt: skip
    for text in texts:
        file = tmp_path / "other.json"
        file.write_text(text, encoding="utf-8")
        assert [t.id for t in read_trajectories(file)] == ["t0", "t1", "t2"]
    (tmp_path / FILE_NAME).write_bytes(b"\xef\xbb\xbf" + (tmp_path / FILE_NAME).read_bytes())
    assert len(list(read_trajectories(tmp_path))) == 3


def test_a_damaged_image_in_a_file_is_found_by_decoding(tmp_path: Path) -> None:
    write_shards(tmp_path / "data", [trajectory()])
    (file,) = find_files(tmp_path / "data")
    raw = bytearray(file.read_bytes())
    at = raw.index(b"IDAT") + 100
    raw[at : at + 50] = bytes(50)
    file.write_bytes(raw)
    assert len(list(read_trajectories(file))) == 1
    with pytest.raises(DataError, match=r":1: images\[1\]: .*tar:1:images\[1\]: unreadable image"):
        list(read_trajectories(file, decode=True))


# ---------------------------------------------------------------------------- refusing


def test_bad_records_are_left_out_up_to_a_share(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    records = good_records(tmp_path, 4)
    write_lines(tmp_path, [records[0], b"{", {**records[1], "id": "t0"}, *records[2:]])
    with pytest.raises(DataError, match=":2: record: "):
        list(read_trajectories(tmp_path))
    with caplog.at_level(logging.WARNING):
        assert [t.id for t in read_trajectories(tmp_path, refusals=Refusals(tmp_path, 0.4))] == ["t0", "t2", "t3"]
    said = [record.getMessage() for record in caplog.records]
    assert [message.split(": ")[1].rpartition(FILE_NAME)[2] for message in said[:2]] == [":2", ":3"]
    assert said[2].endswith("2 of 5 records refused")
    with pytest.raises(ValueError, match="2 of 5 records refused, more than max_refused=0.39 allows"):
        list(read_trajectories(tmp_path, refusals=Refusals(tmp_path, 0.39)))


@pytest.mark.parametrize("form", WRITERS)
def test_damaged_pixels_are_refused_like_any_record(tmp_path: Path, form: str) -> None:
    """Decoded ahead in threads: the same records in the same order, and the same refusals, as one by one."""
    for n in range(100):
        Image.effect_noise((64, 64), 60 + n).save(tmp_path / f"{n}.png")
    data = [Trajectory(f"t{n}", "goal", (Step("r", "generate", tmp_path / f"{n}.png"),)) for n in range(100)]
    WRITERS[form](tmp_path / "data", data)
    bad = {3, 40, 99}
    for file in (path for path in (tmp_path / "data").rglob("*") if path.is_file()):
        content = file.read_bytes()
        for n in bad:
            whole = (tmp_path / f"{n}.png").read_bytes()
            # The header stays, the pixels are no deflate stream.
            content = content.replace(whole, whole[:41] + bytes(len(whole) - 41))
        file.write_bytes(content)
    assert len(list(read_trajectories(tmp_path / "data"))) == 100
    with pytest.raises(DataError, match=r":4: images\[1\]: .*unreadable image"):
        list(read_trajectories(tmp_path / "data", decode=True))
    with pytest.raises(DataError, match=r":4: images\[1\]: .*unreadable image"):
        load_trajectories(tmp_path / "data")
    refusals = Refusals(tmp_path, 0.05)
    read = [t.id for t in load_trajectories(tmp_path / "data", refusals)]
    assert read == [f"t{n}" for n in range(100) if n not in bad] and refusals.refused == 3
    first = load_trajectories(tmp_path / "data", Refusals(tmp_path, 0.5), limit=5)
    assert [t.id for t in first] == ["t0", "t1", "t2", "t4", "t5"]


def test_no_thread_is_left_by_a_reading_that_fails(tmp_path: Path) -> None:
    """However often: the threads end with the call, and none waits for another in the garbage collector."""
    write_lines(tmp_path, [*good_records(tmp_path, 100)[:70], b"{", *good_records(tmp_path, 100)[70:]])
    before, kept = threading.active_count(), []
    for _ in range(30):
        with pytest.raises(DataError) as error:
            load_trajectories(tmp_path)
        kept.append((error, kept))  # a cycle, which only the collector ends
        assert threading.active_count() == before
    gc.collect()


@pytest.mark.parametrize("share", [-0.1, 1.0, 2])
def test_a_share_is_a_share(tmp_path: Path, share: float) -> None:
    with pytest.raises(ValueError, match="max_refused"):
        Refusals(tmp_path, share)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.booleans(), max_size=40), st.floats(0.01, 0.99))
def test_the_share_is_judged_at_the_end_of_few_records(good: list[bool], share: float) -> None:
    refusals, error = Refusals("data", share), DataError("f", 1, "id", "bad", "wrong_type")
    for record in good:
        refusals.accept() if record else refusals.refuse(error)
    if good.count(False) > share * len(good):
        with pytest.raises(ValueError, match="records refused"):
            refusals.finish()
    else:
        refusals.finish()


def test_the_share_is_judged_every_thousand_records() -> None:
    refusals, error = Refusals("data", 0.1), DataError("f", 1, "id", "bad", "wrong_type")
    for _ in range(101):
        refusals.refuse(error)
    for _ in range(898):
        refusals.accept()
    with pytest.raises(ValueError, match="101 of 1000 records refused"):
        refusals.accept()


# ---------------------------------------------------------------------------- memory


def peak(file: Path) -> int:
    """Most bytes that reading a file held, of Python and of Arrow."""
    pool, before = pa.proxy_memory_pool(pa.default_memory_pool()), pa.default_memory_pool()
    pa.set_memory_pool(pool)
    tracemalloc.start()
    try:
        for _ in read_trajectories(file):
            pass
        return tracemalloc.get_traced_memory()[1] + pool.max_memory()
    finally:
        tracemalloc.stop()
        pa.set_memory_pool(before)


def large_file(folder: Path, form: str, num: int) -> Path:
    """A file of `num` records of more than 256 KiB each."""
    if form == "one row group":
        content = encoded(picture(0, (300, 300)))[0]
        rows = [to_record(Trajectory(f"t{n}", "goal", (Step("draw", "generate", Path("x")),)), [content])
                for n in range(num)]  # fmt: skip
        folder.mkdir()
        # Less than a page cannot be read; by itself pyarrow looks at the size of a page after 1024 rows only.
        options = {"use_dictionary": False, "compression": "none", "write_batch_size": 1}
        pq.write_table(pa.Table.from_pylist(rows), folder / "x.parquet", **options)
        return folder / "x.parquet"
    if form in ("parquet", "tar"):
        image = in_memory("noise", encoded(picture(0, (300, 300)))[0])
        WRITERS[form](folder, (Trajectory(f"t{n}", "goal", (Step("draw", "generate", image),)) for n in range(num)))
        return find_files(folder)[0]
    write_trajectories(folder, (Trajectory(f"t{n}", "goal", (Step("x" * 2**18, "verify"),)) for n in range(num)))
    file = folder / FILE_NAME
    if form == "array":
        lines = file.read_bytes().splitlines()
        file = folder / "array.json"
        file.write_bytes(b"[" + b",\n".join(lines) + b"]")
    return file


@pytest.mark.parametrize("form", [*WRITERS, "array", "one row group"])
def test_memory_does_not_grow_with_the_file(tmp_path: Path, form: str) -> None:
    files = {num: large_file(tmp_path / str(num), form, num) for num in (24, 96)}
    assert files[96].stat().st_size > 24 << 20
    peaks = {num: peak(file) for num, file in files.items()}
    assert peaks[96] < 1.1 * peaks[24] + (1 << 18) < 16 << 20, peaks
