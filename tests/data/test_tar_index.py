import io
import pickle
import tarfile
import warnings
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clvr_train.data.records import DataError
from clvr_train.data.tar_index import index_tar, read_span
from tests.data.corpora import write_tar


def contents(path: Path) -> list[tuple[str, dict[str, bytes]]]:
    index = index_tar(path)
    return [
        (index.key(n), {ext: read_span(path, *span) for ext, span in index.members(n).items()})
        for n in range(len(index))
    ]


LONG = "folder.v1/" + "a" * 150
KEYS = st.lists(st.sampled_from(["000", "a/b", "é", LONG, "x y", "folder.v1/c", "Ω" * 60]), min_size=1, unique=True)
MEMBERS = st.dictionaries(st.sampled_from(["jpg", "json", "txt", "seg.png"]), st.binary(max_size=1500), min_size=1)


RECORDS = KEYS.flatmap(lambda keys: st.tuples(*[st.tuples(st.just(key), MEMBERS) for key in keys]))


@given(records=RECORDS, pax=st.booleans())
@settings(max_examples=40, deadline=None)
def test_records_are_those_that_webdataset_reads(tmp_path_factory, records: tuple, pax: bool) -> None:
    members = [(f"{key}.{ext}", data) for key, parts in records for ext, data in parts.items()]
    path = tmp_path_factory.mktemp("tar") / "shard.tar"
    write_tar(path, members, tarfile.PAX_FORMAT if pax else tarfile.GNU_FORMAT)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the library leaves its files to the garbage collector
        from webdataset import WebDataset

        theirs = [
            (sample.pop("__key__"), {k: v for k, v in sample.items() if not k.startswith("__")})
            for sample in WebDataset(str(path), shardshuffle=False, empty_check=False)
        ]
    assert contents(path) == list(records) == theirs


def test_what_is_no_part_of_a_record_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as archive:
        folder = tarfile.TarInfo("images")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        link = tarfile.TarInfo("images/1.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
        for name in ("README", "images/1.JPG", "images/1.json"):
            info = tarfile.TarInfo(name)
            info.size = 3
            archive.addfile(info, io.BytesIO(b"abc"))
    assert contents(path) == [("images/1", {"jpg": b"abc", "json": b"abc"})]
    assert contents(write_tar(tmp_path / "empty.tar", [])) == []
    index = index_tar(path)
    assert pickle.loads(pickle.dumps(index)).members(0) == index.members(0)


PLAIN = [(f"{n}.{ext}", bytes([n]) * 700) for n in range(4) for ext in ("jpg", "json")]


def test_a_tar_that_was_cut_anywhere_is_refused(tmp_path: Path) -> None:
    whole = write_tar(tmp_path / "whole.tar", PLAIN).read_bytes()
    end = whole.rindex(bytes([3]) * 100) // 512 * 512 + 512  # of the last member's blocks
    cut = tmp_path / "cut.tar"
    for size in [*range(0, end, 256), end]:
        cut.write_bytes(whole[:size])
        with pytest.raises(DataError, match=rf"^{cut}:\d: record: .*(cut off|not a readable)") as error:
            index_tar(cut)
        assert error.value.rule == "bad_container"
    cut.write_bytes(whole[: end + 512])
    assert len(index_tar(cut)) == 4


def test_a_damaged_header_in_the_middle_is_not_the_end(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", PLAIN)
    data = bytearray(path.read_bytes())
    data[4 * 1536 + 10] ^= 0xFF  # in the header of the fifth member
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"a.tar:2: record: the shard is cut off or damaged from here on"):
        index_tar(path)


def test_keys_and_endings_that_come_back_are_refused(tmp_path: Path) -> None:
    again = write_tar(tmp_path / "again.tar", [("a.jpg", b""), ("b.jpg", b""), ("a.json", b"")])
    with pytest.raises(DataError, match="again.tar:3: key: 'a' stands in an earlier record") as error:
        index_tar(again)
    assert error.value.rule == "duplicate_id"
    twice = write_tar(tmp_path / "twice.tar", [("a.jpg", b""), ("a.JPG", b"")])
    with pytest.raises(DataError, match="twice.tar:1: record: two members 'a.JPG'"):
        index_tar(twice)


def test_a_file_that_shrank_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"12345")
    assert read_span(tmp_path / "a", 1, 3) == b"234"
    with pytest.raises(OSError, match="ends 1 bytes too early"):
        read_span(tmp_path / "a", 3, 3)
