import io
import json
import re
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from clvr_train.data import validate as validation
from clvr_train.data.images import ImageError, open_image
from clvr_train.data.parquet import write_parquet
from clvr_train.data.readers import read_trajectories
from clvr_train.data.records import DataError
from clvr_train.data.shards import write_shards
from clvr_train.data.sharegpt import FILE_NAME, write_trajectories
from clvr_train.data.validate import RULES, check_strictly, validate
from tests.data.examples import Deadly, good_records, picture, trajectory, write_lines

Change = Callable[[dict, Path], object]


def fields(**values: object) -> Change:
    return lambda record, folder: {**record, **values}


def turn(index: int, **values: object) -> Change:
    return lambda record, folder: {**record, "conversations": [
        {**t, **values} if i == index else t for i, t in enumerate(record["conversations"])]}  # fmt: skip


def image(value: Image.Image | bytes, kind: str = "PNG", **options: object) -> Change:
    """The record with another second image."""

    def change(record: dict, folder: Path) -> dict:
        buffer = io.BytesIO()
        if isinstance(value, bytes):
            buffer.write(value)
        else:
            value.save(buffer, format=kind, **options)
        (folder / "images/bad").write_bytes(buffer.getvalue())
        return {**record, "images": [record["images"][0], "images/bad"]}

    return change


def second_image(path: str) -> Change:
    return lambda record, folder: {**record, "images": [record["images"][0], path]}


def linked(record: dict, folder: Path) -> dict:
    (folder / "images/link.png").symlink_to("/etc/hostname")
    return second_image("images/link.png")(record, folder)


def png(width: int, height: int, bits: int) -> bytes:
    """A PNG whose header promises so many pixels, and which holds next to none."""
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)),
              (b"IDAT", zlib.compress(bytes(1000))), (b"IEND", b"")]  # fmt: skip
    body = [struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
            for kind, data in chunks]  # fmt: skip
    return b"\x89PNG\r\n\x1a\n" + b"".join(body)


def cut(record: dict, folder: Path) -> dict:
    return image((folder / record["images"][1]).read_bytes()[:-300])(record, folder)


def rotated() -> dict:
    exif = Image.Exif()
    exif[0x0112] = 6
    return {"exif": exif}


TWO_FRAMES = {"save_all": True, "append_images": [picture(2)]}
CLEAR = Image.new("RGBA", (64, 64), (255, 0, 0, 0)).quantize(4)
# name: (rule, field, what is done to a good record)
GOLDEN: dict[str, tuple[str, str, Change]] = {
    "bad utf-8": ("bad_utf8", "record", lambda r, f: json.dumps(r).encode().replace(b"circle", b"c\xffrcle", 1)),
    "truncated json": ("truncated_json", "record", lambda r, f: json.dumps(r).encode()[:200]),
    "no json": ("bad_json", "record", lambda r, f: b"{'id': 1}"),
    "not an object": ("wrong_type", "record", lambda r, f: [r]),
    "id not text": ("wrong_type", "id", fields(id=3)),
    "value not text": ("wrong_type", "conversations[1].value", turn(0, value=3)),
    "turn not an object": ("wrong_type", "conversations[1]", lambda r, f: {**r, "conversations": ["hi"]}),
    "images missing": ("missing_field", "images", lambda r, f: {k: v for k, v in r.items() if k != "images"}),
    "empty goal": ("empty_text", "goal", turn(0, value=" ")),
    "half a character": ("bad_text", "conversations[1].value", turn(0, value="\ud800")),
    "duplicate id": ("duplicate_id", "id", fields(id="t0")),
    "tools": ("no_place", "tools", fields(tools="[{}]")),
    "no rounds": ("no_rounds", "conversations", lambda r, f: {**r, "conversations": r["conversations"][:1]}),
    "unknown role": ("unknown_role", "conversations[2].from", turn(1, **{"from": "narrator"})),
    "wrong turn": ("turn_order", "conversations[2].from", turn(1, **{"from": "human"})),
    "unknown action": ("unknown_action", "conversations[2].value", turn(1, value="hm\npaint <IMG_GEN_1>")),
    "empty reasoning": ("empty_reasoning", "conversations[2].value", turn(1, value=" \ngenerate <IMG_GEN_1>")),
    "wrong number": ("image_number", "conversations[6].value", turn(5, value="hm\nedit <IMG_GEN_3>")),
    "number missing": ("image_number", "conversations[6].value", turn(5, value="hm\nedit")),
    "number superfluous": ("image_number", "conversations[4].value", turn(3, value="hm\nverify <IMG_GEN_2>")),
    "later image": ("unknown_image", "conversations[2].value", turn(1, value="as <IMG_GEN_2>\ngenerate <IMG_GEN_1>")),
    "image of the goal": ("unknown_image", "conversations[1].value", turn(0, value="like <IMG_GEN_1>")),
    "edit of nothing": ("unknown_image", "conversations[2].value", turn(1, value="hm\nedit <IMG_GEN_1>")),
    "image in the goal": ("image_marker", "conversations[1].value", turn(0, value="<image> more")),
    "image in the reasoning": ("image_marker", "conversations[8].value", turn(7, value="see <IMG_GEN_1>\nstop")),
    "image not shown": ("wrong_answer", "conversations[3].value", turn(2, value="nice")),
    "image too many": ("image_count", "images", lambda r, f: {**r, "images": r["images"] * 2}),
    "url": ("url", "images[2]", second_image("http://localhost:1/a.png")),
    "up": ("outside_root", "images[2]", second_image("../x.png")),
    "absolute": ("outside_root", "images[2]", second_image("/etc/passwd")),
    "symlink": ("outside_root", "images[2]", linked),
    "%2e": ("outside_root", "images[2]", second_image("%2e%2e/x.png")),
    "NUL": ("outside_root", "images[2]", second_image("images/t0_1.png\0")),
    "missing image": ("missing_image", "images[2]", second_image("images/none.png")),
    "no image": ("not_an_image", "images[2]", image(b"hello")),
    "empty image": ("not_an_image", "images[2]", image(b"")),
    "truncated image": ("unreadable_image", "images[2]", cut),
    "bomb": ("too_many_pixels", "images[2]", image(png(60_000, 60_000, 1))),
    "nearly a bomb": ("too_many_pixels", "images[2]", image(png(10_000, 10_000, 1))),
    "large": ("too_many_pixels", "images[2]", image(png(8_000, 8_000, 1))),
    "small": ("small_side", "images[2]", image(Image.new("RGB", (63, 200)))),
    "long": ("aspect", "images[2]", image(Image.new("RGB", (64, 513)))),
    "animated gif": ("animated", "images[2]", image(picture(1), "GIF", **TWO_FRAMES)),
    "animated png": ("animated", "images[2]", image(picture(1), "PNG", **TWO_FRAMES)),
    "animated webp": ("animated", "images[2]", image(picture(1), "WEBP", **TWO_FRAMES)),
    "float": ("mode", "images[2]", image(Image.new("F", (64, 64)), "TIFF")),
    "exif": ("exif_rotation", "images[2]", image(picture(1, (64, 80)), "JPEG", **rotated())),
    "exif in png": ("exif_rotation", "images[2]", image(picture(1, (64, 80)), "PNG", **rotated())),
    "palette": ("palette_transparency", "images[2]", image(CLEAR)),
    "palette gif": ("palette_transparency", "images[2]", image(CLEAR, "GIF", transparency=0)),
    "cmyk": ("cmyk", "images[2]", image(Image.new("CMYK", (64, 64)), "JPEG")),
}
ONLY_VALIDATION = {"exif_rotation", "palette_transparency", "cmyk"}
ELSEWHERE = {"empty_file", "bad_container", "too_long"}  # tested below, and with the readers


def test_every_rule_has_a_golden_record() -> None:
    assert {rule for rule, _, _ in GOLDEN.values()} | ELSEWHERE == set(RULES)


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_bad_record(tmp_path: Path, name: str) -> None:
    rule, field, change = GOLDEN[name]
    records = good_records(tmp_path)
    file = write_lines(tmp_path, [records[0], change(records[1], tmp_path), records[2]])
    report = validate(tmp_path, workers=0).as_json()
    (offender,) = report.pop("offenders")
    assert report == {"records": 3, "refused": 1, "by_rule": {rule: 1}}
    message = offender.pop("message")
    assert offender == {"file": str(file), "record": 2, "field": field, "rule": rule}
    assert message and "\n" not in message
    if rule in ONLY_VALIDATION:
        assert len(list(read_trajectories(tmp_path, decode=True))) == 3
    elif name == "truncated image":
        assert len(list(read_trajectories(tmp_path))) == 3
    else:
        with pytest.raises(DataError, match=":2: ") as error:
            list(read_trajectories(tmp_path))
        assert error.value.rule == rule


def test_it_goes_on_past_every_bad_record_in_any_number_of_processes(tmp_path: Path) -> None:
    good, records = good_records(tmp_path, 2), []
    for number, (name, (rule, _, change)) in enumerate(GOLDEN.items()):
        folder = tmp_path / f"images/{number}"
        (folder / "images").mkdir(parents=True)
        if rule != "duplicate_id":  # the record that has its id lies in another folder
            for path in good[1]["images"]:
                (folder / path).symlink_to(tmp_path / path)
            record = change({**good[1], "id": name}, folder)
            if isinstance(record, dict) and isinstance(record.get("images"), list):
                record["images"] = [f"images/{number}/{p}" if (folder / p.strip("\0")).is_file() and "://" not in p
                                    and not p.startswith("/") else p for p in record["images"]]  # fmt: skip
            records.append(record)
    write_lines(tmp_path, [good[0], *records, good[1], good[0]])
    alone, together = (validate(tmp_path, workers=workers) for workers in (0, 2))
    assert alone.as_json() == together.as_json()
    assert (alone.records, alone.refused) == (len(records) + 3, len(records) + 1)
    assert alone.by_rule["duplicate_id"] == 1 and alone.offenders[-1].record == len(records) + 3


def test_good_data_in_every_form_passes(tmp_path: Path) -> None:
    data = [trajectory(f"t{n}", n) for n in range(40)]
    for number, write in enumerate((write_trajectories, write_parquet, write_shards)):
        seen: list[int] = []
        write(tmp_path / str(number), data)
        report = validate(tmp_path / str(number), 0, lambda weight, report, seen=seen: seen.append(weight))
        assert report.as_json() == {"records": 40, "refused": 0, "by_rule": {}, "offenders": []}
        size = sum(file.stat().st_size for file in (tmp_path / str(number)).iterdir() if file.is_file())
        assert size / 2 < sum(seen) <= size


def test_ids_are_compared_over_all_files(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_shards(tmp_path / name, [trajectory("same")])
        next((tmp_path / name).iterdir()).rename(tmp_path / f"{name}.tar")
    (error,) = validate(tmp_path, 0).offenders
    assert (error.file, error.record, error.rule) == (str(tmp_path / "b.tar"), 1, "duplicate_id")


def test_a_file_that_ends_early_is_one_bad_record_and_the_next_file_is_read(tmp_path: Path) -> None:
    write_shards(tmp_path / "data", [trajectory(f"t{n}", n) for n in range(6)], file_bytes=30_000)
    files = sorted((tmp_path / "data").iterdir())
    assert len(files) > 2
    files[0].write_bytes(files[0].read_bytes()[: files[0].stat().st_size * 3 // 5])
    report = validate(tmp_path / "data", 0)
    assert (report.refused, report.by_rule) == (1, {"bad_container": 1})
    assert report.offenders[0].file == str(files[0])
    assert report.records >= 5


def test_an_empty_file(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).touch()
    report = validate(tmp_path, 0).as_json()
    assert (report["records"], report["refused"], report["by_rule"]) == (1, 1, {"empty_file": 1})


def test_a_record_that_is_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clvr_train.data.jsonstream.MAX_RECORD_BYTES", 1000)
    records = good_records(tmp_path)
    write_lines(tmp_path, [records[0], {**records[1], "more": "x" * 1000}, records[2]])
    assert validate(tmp_path, 0).by_rule == {"too_long": 1}


def test_the_list_of_offenders_has_an_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(validation, "MAX_OFFENDERS", 3)
    write_lines(tmp_path, [b"{"] * 5)
    report = validate(tmp_path, 0)
    assert (report.refused, len(report.offenders)) == (5, 3)


def test_a_worker_that_is_killed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_trajectories(tmp_path, [trajectory()])
    monkeypatch.setattr(validation, "chunks", lambda path: iter([Deadly()]))
    with pytest.raises(ChildProcessError, match="deadly.tar: a worker was killed"):
        validate(tmp_path, workers=1)


def test_every_rule_is_documented() -> None:
    text = Path(__file__).parents[2].joinpath("docs/data_format.md").read_text(encoding="utf-8")
    assert set(RULES) <= set(re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE))


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"])
def test_no_damage_of_an_image_is_more_than_a_refusal(tmp_path: Path, kind: str) -> None:
    """What passes also opens; what does not is an ImageError and nothing else."""
    buffer = io.BytesIO()
    picture(0, (66, 64)).save(buffer, format=kind)
    whole, path = buffer.getvalue(), tmp_path / "x"
    for at in [*range(0, 100, 3), *range(100, len(whole), len(whole) // 20)]:
        for damaged in (whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :], whole[:at]):
            path.write_bytes(damaged)
            try:
                check_strictly(path)
            except ImageError as error:
                assert error.rule in RULES
            else:
                open_image(path)
