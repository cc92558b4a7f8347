"""What is written here is read by others, and what others write is read here: `datasets` and `webdataset`."""

import io
import json
import warnings
from pathlib import Path

import datasets
import pytest
from datasets import Features, List, Value, load_dataset
from datasets import Image as ImageFeature

from clvr_train.data.parquet import write_parquet
from clvr_train.data.readers import read_trajectories
from clvr_train.data.records import to_record
from clvr_train.data.shards import write_shards
from clvr_train.data.sharegpt import write_trajectories
from clvr_train.method.trajectory import Step, Trajectory
from tests.data.examples import content, image_bytes, jpeg, picture, trajectory

MOST = 8
TURNS = List({"from": Value("string"), "value": Value("string")})
RECORD = {"id": Value("string"), "conversations": TURNS, "images": List(Value("string"))}
MEMBERS = {f"{n}.{ending}": ImageFeature(decode=False) for n in range(1, MOST + 1) for ending in ("png", "jpg")}


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def of_lengths(*lengths: int) -> list[Trajectory]:
    """Trajectories of so many images each, besides the usual one with a PNG and a JPEG."""
    made = [trajectory("a", 1)]
    for number, length in enumerate(lengths):
        draws = [Step("r", "edit" if n else "generate", picture(10 * number + n)) for n in range(length)]
        made.append(Trajectory(f"t{number}", "goal", (*draws, Step("done", "stop"))))
    return made


def from_shards(rows: list[dict]) -> list[list[bytes]]:
    """The images of every record in the order of its JSON."""
    return [[row[name]["bytes"] for name in row["json"]["images"]] for row in rows]


@pytest.mark.parametrize("streaming", [True, False])
def test_datasets_reads_shards_of_any_numbers_of_images(tmp_path: Path, streaming: bool) -> None:
    data = of_lengths(1, 3, 8, 0, 2, 5)
    write_shards(tmp_path / "data", data, file_bytes=60_000)
    files = [str(file) for file in sorted((tmp_path / "data").glob("*.tar"))]
    assert len(files) > 1
    features = Features({"__key__": Value("string"), "__url__": Value("string"), "json": RECORD, **MEMBERS})
    options = {"split": "train", "streaming": streaming, "cache_dir": str(tmp_path / "cache")}
    rows = list(load_dataset("webdataset", data_files=files, features=features, **options))
    ours = list(read_trajectories(tmp_path / "data"))
    assert from_shards(rows) == [image_bytes(t) for t in ours]
    for row, one in zip(rows, ours, strict=True):
        assert row["json"] == to_record(one, row["json"]["images"])
    # Without the features it guesses them by the first five records, which then need the same members.
    with pytest.raises(ValueError, match="don't share the same prefix or the same types"):
        load_dataset("webdataset", data_files=files, **options)


def test_datasets_reads_shards_of_one_number_of_images_by_itself(tmp_path: Path) -> None:
    write_shards(tmp_path / "data", [trajectory(f"t{n}", n) for n in range(7)])
    rows = list(load_dataset("webdataset", data_files=str(tmp_path / "data" / "*.tar"), split="train", streaming=True))
    assert [row["json"]["id"] for row in rows] == [f"t{n}" for n in range(7)]
    assert all(row["1.png"].size == (64, 64) and row["2.jpg"].size == (72, 64) for row in rows)


def test_webdataset_decodes_shards_of_any_numbers_of_images(tmp_path: Path) -> None:
    data = of_lengths(1, 3, 8, 0)
    write_shards(tmp_path / "data", data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # the library leaves its files to the garbage collector
        from webdataset import WebDataset

        (file,) = (tmp_path / "data").iterdir()
        rows = list(WebDataset(str(file), shardshuffle=False).decode("pil"))
    assert [row["json"]["id"] for row in rows] == [t.id for t in data]
    for row, ours in zip(rows, data, strict=True):
        pixels = [row[name].tobytes() for name in row["json"]["images"]]
        assert pixels == [pixels for _, _, pixels in content(ours)[2] if pixels]


@pytest.mark.parametrize("decode", [True, False])
def test_datasets_streams_parquet(tmp_path: Path, decode: bool) -> None:
    data = of_lengths(1, 3, 8, 0)
    write_parquet(tmp_path / "data", data)
    stream = load_dataset("parquet", data_files=str(tmp_path / "data" / "*.parquet"), split="train", streaming=True)
    rows = list(stream.cast_column("images", List(ImageFeature(decode=decode))))
    ours = list(read_trajectories(tmp_path / "data"))
    assert [{**row, "images": []} for row in rows] == [to_record(t, []) for t in ours]
    if decode:
        found = [[image.convert("RGB").tobytes() for image in row["images"]] for row in rows]
        assert found == [[pixels for _, _, pixels in content(t)[2] if pixels] for t in data]
    else:
        assert [[image["bytes"] for image in row["images"]] for row in rows] == [image_bytes(t) for t in ours]


def test_parquet_of_datasets_is_read(tmp_path: Path) -> None:
    features = Features({"id": Value("string"), "conversations": TURNS, "images": List(ImageFeature())})
    data = [trajectory("a", 1), trajectory("b", 2)]
    encoded = [[{"bytes": one, "path": None} for one in (png(n), jpeg(n))] for n in (1, 2)]
    rows = [to_record(t, images) for t, images in zip(data, encoded, strict=True)]
    (tmp_path / "data").mkdir()
    datasets.Dataset.from_list(rows, features=features).to_parquet(str(tmp_path / "data" / "a.parquet"))
    assert [content(t) for t in read_trajectories(tmp_path / "data")] == [content(t) for t in data]


def png(seed: int) -> bytes:
    buffer = io.BytesIO()
    picture(seed).save(buffer, "PNG")
    return buffer.getvalue()


def test_json_lines_are_what_datasets_reads(tmp_path: Path) -> None:
    data = of_lengths(2, 0, 1)
    write_trajectories(tmp_path, data)
    file = tmp_path / "trajectories.jsonl"
    rows = list(load_dataset("json", data_files=str(file), split="train", streaming=True))
    assert rows == [json.loads(line) for line in file.read_text().splitlines()]
