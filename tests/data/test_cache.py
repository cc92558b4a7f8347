"""The store: the same bits back or nothing, whatever happened to the file, the disk or the writer."""

import multiprocessing
import os
import resource
import signal
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from clvr_train.data import cache as cache_module
from clvr_train.data.cache import TensorCache, bytes_on_disk, cache_key, canonical, readable

WHAT = {"kind": "text", "sha256": "ab", "window": 512, "layers": (9, 18, 27)}
FORK = multiprocessing.get_context("fork")


def bits(tensor):
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


def files(cache):
    """Entries, and what writers have left."""
    return sorted(cache.folder.glob("??/??/*")), sorted((cache.folder / "tmp").iterdir())


@settings(max_examples=25, deadline=None)
@given(
    data=st.binary(min_size=8, max_size=64).map(lambda b: b[: len(b) // 8 * 8]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.int64]),
    rows=st.sampled_from([1, 2]),
)
def test_any_bits_come_back(data, dtype, rows):
    tensor = torch.frombuffer(bytearray(data), dtype=dtype).reshape(-1, 1).repeat(1, rows)
    with tempfile.TemporaryDirectory() as folder:
        cache = TensorCache(Path(folder))
        cache.put(WHAT, tensor.T)  # not contiguous
        found = TensorCache(Path(folder)).get(WHAT)
    assert found.dtype == dtype and found.shape == tensor.T.shape and bits(found) == bits(tensor.T.contiguous())


@pytest.mark.parametrize("field", WHAT)
def test_the_key_depends_on_every_field_and_not_on_their_order(field):
    assert cache_key(WHAT | {field: 1}) != cache_key(WHAT) != cache_key({k: WHAT[k] for k in WHAT if k != field})
    assert cache_key(dict(reversed(WHAT.items()))) == cache_key(WHAT)
    assert cache_key(WHAT | {"layers": [9, 18, 27]}) == cache_key(WHAT)


def test_an_entry_lies_under_its_key_and_its_size_is_foreseen(tmp_path):
    cache = TensorCache(tmp_path / "cache")
    assert not cache.has(WHAT) and cache.get(WHAT) is None
    tensor = torch.zeros(5000)
    cache.put(WHAT, tensor)
    key = cache_key(WHAT)
    assert files(cache) == ([tmp_path / "cache" / key[:2] / key[2:4] / f"{key}.safetensors"], [])
    assert cache.has(WHAT) and (cache.hits, cache.misses) == (0, 1)
    assert tensor.nbytes < files(cache)[0][0].stat().st_size <= bytes_on_disk(tensor.nbytes) <= tensor.nbytes + 5120


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_a_damaged_file_is_a_miss_and_is_written_anew(data):
    tensor = torch.arange(12.0).reshape(3, 4)
    with tempfile.TemporaryDirectory() as folder:
        cache = TensorCache(Path(folder))
        cache.put(WHAT, tensor)
        path = cache.path(WHAT)
        whole = path.read_bytes()
        if data.draw(st.booleans()):
            broken = whole[: data.draw(st.integers(0, len(whole) - 1))]
        else:
            at = data.draw(st.integers(0, len(whole) - 1))
            broken = whole[:at] + bytes([whole[at] ^ data.draw(st.integers(1, 255))]) + whole[at + 1 :]
        path.write_bytes(broken)
        found = cache.get(WHAT)
        if found is None:  # else a byte between the fields of the header was hit
            assert cache.damaged == cache.misses == 1
            cache.put(WHAT, tensor)
            found = cache.get(WHAT)
        assert found.dtype == tensor.dtype and found.equal(tensor)


def test_a_file_of_zeros_or_of_another_description_is_a_miss(tmp_path, caplog):
    cache = TensorCache(tmp_path)
    other = WHAT | {"sha256": "cd"}
    cache.put(WHAT, torch.ones(3))
    cache.path(other).parent.mkdir(parents=True)
    cache.path(other).write_bytes(cache.path(WHAT).read_bytes())
    assert cache.get(other) is None
    save_file({"tensor": torch.ones(3)}, cache.path(other), {"description": canonical(other)})
    assert cache.get(other) is None
    cache.path(other).write_bytes(bytes(500))
    assert cache.get(other) is None
    assert cache.damaged == 3 and f"{cache.path(other)}: damaged" in caplog.text


def test_a_full_disk_is_said_and_leaves_nothing(tmp_path):
    cache = TensorCache(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))  # the write stops half-way, as on a full disk
    try:
        with pytest.raises(OSError, match=r"safetensors: not written \(.*bytes are free, the entry has 4\d\d\d\)"):
            cache.put(WHAT, torch.zeros(1000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert files(cache) == ([], []) and cache.get(WHAT) is None
    cache.put(WHAT, torch.zeros(1000))
    assert cache.get(WHAT).equal(torch.zeros(1000))


def test_a_folder_that_cannot_be_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file/cache: no folder for a cache"):
        TensorCache(tmp_path / "file" / "cache")


def killed_while_writing(folder, moment):
    """Ends by SIGKILL with half of the entry written, or with all of it and not yet renamed."""
    kill = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # noqa: E731
    if moment == "half":
        Path.write_bytes = lambda path, data: (path.open("wb", buffering=0).write(data[: len(data) // 2]), kill())
    else:
        cache_module.os.replace = kill
    TensorCache(folder).put(WHAT, torch.ones(1000))


@pytest.mark.parametrize("moment", ["half", "whole"])
def test_a_kill_in_the_middle_of_a_write_leaves_no_entry(tmp_path, moment):
    writer = FORK.Process(target=killed_while_writing, args=(tmp_path, moment))
    writer.start()
    writer.join()
    assert writer.exitcode == -signal.SIGKILL
    cache = TensorCache(tmp_path)
    entries, left = files(cache)
    assert entries == [] and len(left) == 1 and not cache.has(WHAT) and cache.get(WHAT) is None
    cache.put(WHAT, torch.ones(1000))
    assert cache.get(WHAT).equal(torch.ones(1000))
    os.utime(left[0], (0, 0))
    fresh = left[0].with_name("of-a-writer-at-work")
    fresh.write_bytes(b"half")
    assert TensorCache(tmp_path).get(WHAT) is not None and files(cache)[1] == [fresh]


def write_and_read(folder, start, go):
    """Exits with 0 if every read gave the whole tensor or nothing."""
    cache = TensorCache(folder)
    go.wait()
    for round_ in range(60):
        number = (start + round_) % 20
        what = WHAT | {"number": number}
        found = cache.get(what)
        assert found is None or found.equal(torch.full((2000,), float(number)))
        cache.put(what, torch.full((2000,), float(number)))
    assert cache.damaged == 0


def test_several_processes_write_and_read_at_once(tmp_path):
    go = FORK.Event()
    workers = [FORK.Process(target=write_and_read, args=(tmp_path, start, go)) for start in (0, 1, 10)]
    for worker in workers:
        worker.start()
    go.set()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    cache = TensorCache(tmp_path)
    entries, left = files(cache)
    assert len(entries) == 20 and left == []
    for number in range(20):
        assert cache.get(WHAT | {"number": number}).equal(torch.full((2000,), float(number)))


def test_sizes_for_people():
    assert [readable(n) for n in (900, 1500, 7_864_320, 164e9)] == ["900 B", "1.5 kB", "7.86 MB", "164.0 GB"]
