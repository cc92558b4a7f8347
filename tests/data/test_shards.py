import io
import json
import tarfile
from contextlib import ExitStack
from pathlib import Path

import pytest
import webdataset
from webdataset.tariterators import group_by_keys, tar_file_expander

from clvr_train.data.readers import read_trajectories
from clvr_train.data.records import DataError, to_record
from clvr_train.data.refusals import Refusals
from clvr_train.data.shards import write_shards
from tests.data.examples import content, image_bytes, jpeg, trajectory

RECORD = to_record(trajectory(), ["1.png", "2.jpg"])


def sample(key: str, record: object = None, **members: bytes) -> dict:
    images = members or {"1.png": image_bytes_of()[0], "2.jpg": image_bytes_of()[1]}
    return {"__key__": key, "json": json.dumps(record or {**RECORD, "id": key}).encode(), **images}


def image_bytes_of(seed: int = 1) -> list[bytes]:
    return [jpeg(seed), jpeg(seed + 1)]


def write(file: Path, *samples: dict) -> Path:
    with webdataset.TarWriter(str(file), encoder=False) as writer:
        for one in samples:
            writer.write(one)
    return file


def test_webdataset_reads_what_is_written_here(tmp_path: Path) -> None:
    data = [trajectory(name, seed) for seed, name in enumerate(("a", "b.c", "x/y", "ü \n"))]
    write_shards(tmp_path / "data", data, file_bytes=30_000)
    files = sorted((tmp_path / "data").iterdir())
    assert len(files) > 1
    with ExitStack() as stack:  # WebDataset(urls) is the same, and leaves its files open
        sources = [{"url": file.name, "stream": stack.enter_context(file.open("rb"))} for file in files]
        upstream = list(group_by_keys(tar_file_expander(sources)))
    ours = list(read_trajectories(tmp_path / "data"))
    assert [json.loads(one["json"])["id"] for one in upstream] == [t.id for t in ours] == [t.id for t in data]
    for theirs, mine in zip(upstream, ours, strict=True):
        names = json.loads(theirs["json"])["images"]
        assert [theirs[name] for name in names] == image_bytes(mine)


def test_shards_of_webdataset_are_read(tmp_path: Path) -> None:
    pattern = str(tmp_path / "s-%03d.tar")
    data = [trajectory(f"k{n}", n) for n in range(4)]
    with webdataset.ShardWriter(pattern, maxcount=3, verbose=0) as writer:  # encodes by the ending
        for n, t in enumerate(data):
            images = {"1.PNG".lower(): t.images[0], "b.jpg": t.images[1].read()}
            record = to_record(t, [f"dir/{n:03d}.1.png", "B.jpg"])
            writer.write({"__key__": f"dir/{n:03d}", "json": record, "txt": "more", **images})
    assert [content(t) for t in read_trajectories(tmp_path)] == [content(t) for t in data]


def test_the_same_trajectories_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_shards(tmp_path / name, [trajectory()])
    (a,), (b,) = ((tmp_path / name).iterdir() for name in ("a", "b"))
    assert a.read_bytes() == b.read_bytes()


def test_long_names_and_strange_members(tmp_path: Path) -> None:
    file, key = tmp_path / "long.tar", "folder/" * 30 + "k"
    with tarfile.open(file, "w", format=tarfile.PAX_FORMAT) as archive:
        link = tarfile.TarInfo(f"{key}.9.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
        archive.addfile(tarfile.TarInfo("README"))
        for name, data in sample(key).items():
            if name != "__key__":
                info = tarfile.TarInfo(f"{key}.{name}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    (read,) = read_trajectories(file)
    assert image_bytes(read) == image_bytes_of()


def refused(file: Path) -> DataError:
    with pytest.raises(DataError) as error:
        list(read_trajectories(file))
    assert "\n" not in str(error.value)
    return error.value


BAD = {
    "no record": ({"__key__": "b", "1.png": b"x"}, "record", "missing_field"),
    "image of another": (sample("b", {**RECORD, "images": ["1.png", "a.2.jpg"]}), "images[2]", "missing_image"),
    "the record itself": (sample("b", {**RECORD, "images": ["1.png", "json"]}), "images[2]", "missing_image"),
    "a number": (sample("b", {**RECORD, "images": [1, 2]}), "images[1]", "wrong_type"),
    "a path": (sample("b", {**RECORD, "images": ["/etc/passwd", "2.jpg"]}), "images[1]", "missing_image"),
    "no image": (sample("b", **{"1.png": b"no", "2.jpg": b"no"}), "images[1]", "not_an_image"),
    "not utf-8": ({**sample("b"), "json": b'{"id": "\xff"}'}, "record", "bad_utf8"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_records_of_a_shard(tmp_path: Path, name: str) -> None:
    bad, field, rule = BAD[name]
    error = refused(write(tmp_path / "x.tar", sample("a"), bad, sample("c")))
    assert (error.record, error.field, error.rule) == (2, field, rule)
    assert len(list(read_trajectories(tmp_path / "x.tar", refusals=Refusals("x", 0.5)))) == 2


def test_a_member_that_is_there_twice(tmp_path: Path) -> None:
    assert refused(write(tmp_path / "x.tar", sample("a"), sample("a"))).rule == "bad_container"


def test_a_shard_that_is_cut_off_is_noticed_wherever_it_is_cut(tmp_path: Path) -> None:
    whole = write(tmp_path / "x.tar", *(sample(name) for name in "abc")).read_bytes()
    with tarfile.open(tmp_path / "x.tar") as archive:
        members = archive.getmembers()
    ends = [m.offset_data + (m.size + 511) // 512 * 512 for m in members]
    for cut in (0, 100, *ends, *(m.offset for m in members[1:]), *(m.offset_data + 5 for m in members)):
        (tmp_path / "cut.tar").write_bytes(whole[:cut])
        error = refused(tmp_path / "cut.tar")
        assert error.rule in ("bad_container", "missing_field"), (cut, str(error))


def test_a_damaged_header_is_no_end(tmp_path: Path) -> None:
    file = write(tmp_path / "x.tar", *(sample(name) for name in "abc"))
    raw = bytearray(file.read_bytes())
    with tarfile.open(file) as archive:
        at = archive.getmembers()[4].offset
    raw[at : at + 20] = b"?" * 20
    file.write_bytes(raw)
    assert refused(file).rule == "bad_container"


def test_a_packed_shard_is_refused(tmp_path: Path) -> None:
    with webdataset.TarWriter(str(tmp_path / "x.tar"), encoder=False, compress="gz") as writer:
        writer.write(sample("a"))
    assert "must be unpacked" in str(refused(tmp_path / "x.tar"))


def test_a_shard_that_changed_is_an_image_error(tmp_path: Path) -> None:
    file = write(tmp_path / "x.tar", sample("a"))
    (before,) = read_trajectories(file)
    file.write_bytes(b"short")
    with pytest.raises(OSError, match="too early"):
        before.images[0].read()
