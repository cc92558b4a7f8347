import io
import json
import pickle
import re
import struct
import zlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from clvr_train.data import cells
from clvr_train.data.captions import Captions, fit_target
from clvr_train.data.fine_t2i import FineT2I
from clvr_train.data.flux_reason import FluxReason
from clvr_train.data.images import ImageError, open_image
from clvr_train.data.loader import Mapped, read_ahead
from clvr_train.data.parquet import write_parquet
from clvr_train.data.readers import read_trajectories
from clvr_train.data.records import DataError
from clvr_train.data.report import RULES
from clvr_train.data.shards import write_shards
from clvr_train.data.sharegpt import FILE_NAME, write_trajectories
from clvr_train.data.strict import check_strictly
from clvr_train.data.validate import caption_chunks, validate
from tests.data import corpora
from tests.data.corpora import FLUX_REASON, fine_t2i_record, flux_reason_rows, write_flux_reason, write_tar
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
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(kind, data) for kind, data in chunks)


def cut(record: dict, folder: Path) -> dict:
    return image((folder / record["images"][1]).read_bytes()[:-300])(record, folder)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def with_chunk(kind: bytes, data: bytes) -> bytes:
    """A PNG with one more chunk behind the pixels."""
    whole = encoded(picture(1, (64, 80)))
    return whole[:-12] + chunk(kind, data) + whole[-12:]


def broken_checksum(kind: bytes) -> bytes:
    whole = bytearray(with_chunk(b"tIME", bytes(7)))
    at = whole.index(kind)
    whole[at + 4 + int.from_bytes(whole[at - 4 : at])] ^= 1
    return bytes(whole)


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def rotated() -> dict:
    exif = Image.Exif()
    exif[0x0112] = 6
    return {"exif": exif}


TURNED = rotated()["exif"].tobytes()
RAW_PROFILE = b"Raw profile type exif\0\0" + zlib.compress(f"\nexif\n{len(TURNED)}\n{TURNED.hex()}\n".encode())
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
    "base64": ("base64", "images[2]", second_image("iVBORw0KGgo" * 20)),
    "bad answer of KTO": ("no_place", "kto_tag", fields(kto_tag=False)),
    "up": ("outside_root", "images[2]", second_image("../x.png")),
    "absolute": ("outside_root", "images[2]", second_image("/etc/passwd")),
    "symlink": ("outside_root", "images[2]", linked),
    "%2e": ("outside_root", "images[2]", second_image("%2e%2e/x.png")),
    "NUL": ("outside_root", "images[2]", second_image("images/t0_1.png\0")),
    "missing image": ("missing_image", "images[2]", second_image("images/none.png")),
    "no image": ("not_an_image", "images[2]", image(b"hello")),
    "empty image": ("not_an_image", "images[2]", image(b"")),
    "what Ghostscript would draw": ("not_an_image", "images[2]", image(picture(1), "EPS")),
    "icon": ("not_an_image", "images[2]", image(picture(1), "ICO")),
    "png without its end": ("damaged_png", "images[2]", image(encoded(picture(1))[:-12])),
    "png with a part of its end": ("damaged_png", "images[2]", image(encoded(picture(1))[:-3])),
    "pixels with a wrong checksum": ("damaged_png", "images[2]", image(broken_checksum(b"IDAT"))),
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
    "exif behind the pixels": ("exif_rotation", "images[2]", image(with_chunk(b"eXIf", TURNED[6:]))),
    "exif as text": ("exif_rotation", "images[2]", image(with_chunk(b"zTXt", RAW_PROFILE))),
    "palette": ("palette_transparency", "images[2]", image(CLEAR)),
    "palette gif": ("palette_transparency", "images[2]", image(CLEAR, "GIF", transparency=0)),
    "cmyk": ("cmyk", "images[2]", image(Image.new("CMYK", (64, 64)), "JPEG")),
}
ONLY_VALIDATION = {"damaged_png", "exif_rotation", "palette_transparency", "cmyk"}
ELSEWHERE = {"empty_file", "bad_container", "too_long"}  # tested below, and with the readers


def test_every_rule_has_a_golden_record() -> None:
    assert {rule for rule, _, _ in GOLDEN.values()} | ELSEWHERE == set(RULES)


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_bad_record(tmp_path: Path, name: str) -> None:
    rule, field, change = GOLDEN[name]
    records = good_records(tmp_path)
    file = write_lines(tmp_path, [records[0], change(records[1], tmp_path), records[2]])
    report = validate(tmp_path, workers=0).as_json()
    assert_second_of_three_refused(report, file, rule, field)
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


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_a_png_cut_anywhere_is_refused_and_one_that_only_says_more_passes(tmp_path: Path) -> None:
    whole, path = encoded(picture(1)), tmp_path / "x.png"
    for cut_off in range(1, 25):
        path.write_bytes(whole[:-cut_off])
        with pytest.raises(ImageError) as error:
            check_strictly(path)
        assert error.value.rule == ("damaged_png" if cut_off <= 20 else "unreadable_image")
    upright, bad_exif = Image.Exif(), b"II*\0" + b"\xff" * 20
    upright[0x0112] = 1
    for good in (whole, whole + b"more", broken_checksum(b"tIME"), with_chunk(b"tEXt", b"date\0today"),
                 with_chunk(b"eXIf", upright.tobytes()[6:]), with_chunk(b"eXIf", bad_exif)):  # fmt: skip
        path.write_bytes(good)
        check_strictly(path)


def test_the_first_frame_of_a_phones_picture_is_read(tmp_path: Path) -> None:
    records = good_records(tmp_path, 1)
    for exif, rules in (({}, {}), (rotated(), {"exif_rotation": 1})):
        change = image(picture(1, (80, 64)), "MPO", save_all=True, append_images=[picture(2, (64, 64))], **exif)
        write_lines(tmp_path, [change(records[0], tmp_path)])
        with Image.open(tmp_path / "images/bad") as opened:
            assert opened.n_frames == 2
        assert validate(tmp_path, 0).by_rule == rules
        assert len(list(read_trajectories(tmp_path, decode=True))) == 1


def test_messages_are_one_short_line_whatever_the_data_hold(tmp_path: Path) -> None:
    long = "line\n\x1b[31m\u2028" + "x" * 100_000
    (record,) = good_records(tmp_path, 1)
    folder = tmp_path / "two\nlines\udcff"
    folder.mkdir()
    records = [
        {**record, "images": [long, "x"]},
        {**record, "images": ["images/a\nb.png", "x"]},
        turn(1, **{"from": long})(record, tmp_path),
        turn(1, value="hm\n" + long.replace("\n", ""))(record, tmp_path),
        {**record, "id": long},
        {**record, "id": long, "images": []},
    ]
    write_lines(folder, records)
    report = validate(folder, 0)
    assert report.refused == len(records)
    for error in report.offenders:
        assert str(error).isprintable() and len(str(error)) < 800 + len(str(tmp_path))
    json.dumps(report.as_json(), ensure_ascii=False).encode()
    key = "k\n" * 40
    file = write_tar(tmp_path / "a.tar", [(f"{key}.json", b"{}")])
    (error,) = validate(file, 0, form="fine_t2i").offenders
    assert str(error).isprintable() and len(error.message) < 150


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
    monkeypatch.setattr("clvr_train.data.report.MAX_OFFENDERS", 3)
    write_lines(tmp_path, [b"{"] * 5)
    report = validate(tmp_path, 0)
    assert (report.refused, len(report.offenders)) == (5, 3)


def test_a_worker_that_is_killed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_trajectories(tmp_path, [trajectory()])
    monkeypatch.setattr("clvr_train.data.validate.chunks", lambda path: iter([Deadly()]))
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


# ---------------------------------------------------------------------------- captions

Members = list[tuple[str, bytes]]
FORMS = ("flux_reason", "fine_t2i")
FILES = {"flux_reason": "data/a.parquet", "fine_t2i": "data/a.tar"}
IMAGE_FIELD = {"flux_reason": "image", "fine_t2i": "jpg"}


def small(number: int) -> bytes:
    return corpora.picture(number, (66, 64))


# name: (rule, bytes of the image)
IMAGES: dict[str, tuple[str, bytes]] = {
    "no image": ("not_an_image", b"hello"),
    "empty image": ("not_an_image", b""),
    "truncated image": ("unreadable_image", small(1)[:-300]),
    "bomb": ("too_many_pixels", png(60_000, 60_000, 1)),
    "large": ("too_many_pixels", png(8_000, 8_000, 1)),
    "small": ("small_side", encoded(Image.new("RGB", (63, 200)))),
    "long": ("aspect", encoded(Image.new("RGB", (64, 513)))),
    "animated": ("animated", encoded(picture(1), "WEBP", **TWO_FRAMES)),
    "float": ("mode", encoded(Image.new("F", (64, 64)), "TIFF")),
    "exif": ("exif_rotation", encoded(picture(1, (64, 80)), "JPEG", **rotated())),
    "png without its end": ("damaged_png", encoded(picture(1))[:-12]),
    "exif behind the pixels": ("exif_rotation", with_chunk(b"eXIf", TURNED[6:])),
    "what Ghostscript would draw": ("not_an_image", encoded(picture(1), "EPS")),
    "palette": ("palette_transparency", encoded(CLEAR)),
    "cmyk under .jpg": ("cmyk", corpora.picture(1, mode="CMYK")),
}
# name: (rule, field, what the members of a good record become)
TARS: dict[str, tuple[str, str, Callable[[Members], Members]]] = {
    "empty caption": ("empty_text", "json.enhanced_prompt", lambda m: fine_t2i_record(
        "1", small(1), enhanced_prompt=" ")),
    "caption not text": ("wrong_type", "json.enhanced_prompt", lambda m: fine_t2i_record(
        "1", small(1), enhanced_prompt=["a"])),
    "half a character": ("bad_text", "json.prompt", lambda m: fine_t2i_record(
        "1", small(1), "x", prompt="\ud800", image_generated_with_enhanced_prompt=False)),
    "flag not a boolean": ("wrong_type", "json.image_generated_with_enhanced_prompt", lambda m: fine_t2i_record(
        "1", small(1), image_generated_with_enhanced_prompt="false")),
    "no image member": ("missing_image", "jpg", lambda m: m[1:]),
    "no json": ("missing_field", "json", lambda m: [m[0], m[2]]),
    "no source": ("missing_field", "json.image_generator", lambda m: [
        m[0], ("1.json", b'{"prompt": "x", "image_generated_with_enhanced_prompt": true}')]),
    "bad utf-8": ("bad_utf8", "json", lambda m: [m[0], ("1.json", m[1][1].replace(b"prompt of", b"prompt \xff"))]),
    "truncated json": ("truncated_json", "json", lambda m: [m[0], ("1.json", m[1][1][:50])]),
    "bad json": ("bad_json", "json", lambda m: [m[0], ("1.json", b"{'prompt': 1}")]),
    "json a list": ("wrong_type", "json", lambda m: [m[0], ("1.json", b"[1]")]),
    "duplicate member": ("bad_container", "record", lambda m: [*m, ("1.JPG", b"")]),
}  # fmt: skip


def not_utf8(column: pa.Array) -> pa.Array:
    values = column.to_pylist()
    values[1] = b"caption \xff"
    return pa.array([v if isinstance(v, bytes) else v.encode() for v in values], pa.binary()).view(pa.string())


# name: (rule, field, what the table of good rows becomes)
TABLES: dict[str, tuple[str, str, Callable[[list[dict]], pa.Table]]] = {
    "empty caption": ("empty_text", "caption_detail", lambda rows: table(rows, caption_detail="\n")),
    "image null": ("unreadable_image", "image", lambda rows: table(rows, image=None)),
    "bytes null": ("unreadable_image", "image", lambda rows: table(rows, image={"bytes": None, "path": "a.jpg"})),
    "bad utf-8": ("bad_utf8", "caption_detail", lambda rows: (whole := table(rows)).set_column(
        whole.schema.get_field_index("caption_detail"), "caption_detail",
        not_utf8(whole["caption_detail"].combine_chunks()))),
}  # fmt: skip


def table(rows: list[dict], **second: object) -> pa.Table:
    return pa.Table.from_pylist([rows[0], rows[1] | second, *rows[2:]], schema=FLUX_REASON)


def write_corpus(folder: Path, form: str, images: Sequence[bytes]) -> Path:
    """One file of records with these images."""
    file = folder / FILES[form]
    if form == "flux_reason":
        return write_flux_reason(file, flux_reason_rows(range(len(images)), images.__getitem__))
    return write_tar(file, [m for n, image in enumerate(images) for m in fine_t2i_record(str(n), image)])


def open_corpus(path: Path, form: str) -> Captions:
    return FluxReason(path) if form == "flux_reason" else FineT2I(path)


def train(path: Path, form: str) -> int:
    """Read all of a corpus as a training does that leaves nothing out; how many samples it has."""
    fitted = Mapped(open_corpus(path, form), partial(fit_target, sizes=[(64, 64)]))
    return sum(len(batch) for batch in read_ahead(fitted, [[(0, n)] for n in range(len(fitted))]))


def refused_in_training(path: Path, form: str) -> set[int]:
    """The indices of the samples that cannot be read."""
    refused, corpus = set(), open_corpus(path, form)
    for index in range(len(corpus)):
        try:
            fit_target(corpus[index], [(64, 64)])
        except (ValueError, OSError):
            refused.add(index)
    return refused


def assert_second_of_three_refused(report: dict, file: Path, rule: str, field: str) -> None:
    (offender,) = report.pop("offenders")
    assert report == {"records": 3, "refused": 1, "by_rule": {rule: 1}}
    message = offender.pop("message")
    assert offender == {"file": str(file), "record": 2, "field": field, "rule": rule}
    assert message and "\n" not in message


def check_golden(file: Path, form: str, rule: str, field: str) -> None:
    """The second of three records is refused, by validation and, but for the rules of validation alone, by training."""
    report = validate(file.parent, 0, form=form).as_json()
    assert_second_of_three_refused(report, file, rule, field)
    if rule in ONLY_VALIDATION:
        assert train(file.parent, form) == 3
    else:
        with pytest.raises(ValueError, match=":2:"):
            train(file.parent, form)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", IMAGES)
def test_golden_bad_image_of_a_corpus(tmp_path: Path, form: str, name: str) -> None:
    rule, image = IMAGES[name]
    check_golden(write_corpus(tmp_path, form, [small(0), image, small(2)]), form, rule, IMAGE_FIELD[form])


@pytest.mark.parametrize("name", TARS)
def test_golden_bad_record_of_fine_t2i(tmp_path: Path, name: str) -> None:
    rule, field, change = TARS[name]
    records = [fine_t2i_record(str(n), small(n)) for n in range(3)]
    records[1] = change(records[1])
    check_golden(write_tar(tmp_path / FILES["fine_t2i"], sum(records, [])), "fine_t2i", rule, field)


@pytest.mark.parametrize("name", TABLES)
def test_golden_bad_row_of_flux_reason(tmp_path: Path, name: str) -> None:
    rule, field, change = TABLES[name]
    file = tmp_path / FILES["flux_reason"]
    file.parent.mkdir()
    pq.write_table(change(flux_reason_rows(range(3), small)), file)
    check_golden(file, "flux_reason", rule, field)


def test_a_key_that_comes_again_is_one_bad_record_and_the_tar_is_read_on(tmp_path: Path) -> None:
    members = [m for n, key in enumerate("abac") for m in fine_t2i_record(key, small(n))]
    file = write_tar(tmp_path / "a.tar", members)
    report = validate(file, 0, form="fine_t2i")
    assert (report.records, report.by_rule) == (4, {"duplicate_id": 1})
    assert str(report.offenders[0]) == f"{file}:3: key: 'a' stands in an earlier record too"
    with pytest.raises(DataError, match=f"^{file}:3: key: "):
        FineT2I(file)


def without(column: str) -> pa.Schema:
    return pa.schema([field for field in FLUX_REASON if field.name != column])


def cut(part: float) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(path.read_bytes()[: int(part * path.stat().st_size)])


def retyped(schema: pa.Schema) -> Callable[[Path], object]:
    return lambda path: pq.write_table(schema.empty_table(), path)


# name: (form, rule, field, record, records of the file that are read before, what is done to the file)
FILES_GOLDEN: dict[str, tuple[str, str, str, int, int, Callable[[Path], object]]] = {
    "truncated parquet": ("flux_reason", "bad_container", "file", 1, 0, cut(0.6)),
    "empty parquet file": ("flux_reason", "bad_container", "file", 1, 0, cut(0)),
    "no image column": ("flux_reason", "missing_field", "image", 1, 0, retyped(without("image"))),
    "no caption column": ("flux_reason", "missing_field", "caption_detail", 1, 0, retyped(without("caption_detail"))),
    "captions of numbers": ("flux_reason", "wrong_type", "caption_detail", 1, 0, retyped(
        FLUX_REASON.set(9, pa.field("caption_detail", pa.int64())))),
    "image no struct": ("flux_reason", "wrong_type", "image", 1, 0, retyped(
        FLUX_REASON.set(1, pa.field("image", pa.binary())))),
    "truncated tar": ("fine_t2i", "bad_container", "record", 4, 3, cut(0.6)),
    "empty tar file": ("fine_t2i", "bad_container", "record", 1, 0, cut(0)),
    "no tar": ("fine_t2i", "bad_container", "record", 1, 0, lambda path: path.write_bytes(b"x" * 2000)),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES_GOLDEN)
def test_a_file_that_cannot_be_read_is_one_bad_record_and_the_others_are_read(tmp_path: Path, name: str) -> None:
    form, rule, field, record, before, damage = FILES_GOLDEN[name]
    for folder in ("a", "b", "c"):
        write_corpus(tmp_path / folder, form, [small(n) for n in range(6)])
    bad = tmp_path / "b" / FILES[form]
    damage(bad)
    seen: list[int] = []
    report = validate(tmp_path, 0, lambda weight, report: seen.append(weight), form)
    assert (report.records, report.refused, report.by_rule) == (12 + before + 1, 1, {rule: 1})
    (error,) = report.offenders
    assert (error.file, error.record, error.field) == (str(bad), record, field)
    size = sum(path.stat().st_size for path in tmp_path.rglob("a.*"))
    assert 0.9 * size - 10 * 1024 <= sum(seen) <= size  # tarfile ends in 10 KiB of nothing
    with pytest.raises(DataError, match=rf"^{re.escape(str(bad))}:{record}: {field}: "):
        open_corpus(tmp_path, form)


@pytest.mark.parametrize("form", FORMS)
def test_what_only_has_the_name_of_a_file_is_one_bad_record(tmp_path: Path, form: str) -> None:
    (tmp_path / "a" / FILES[form]).mkdir(parents=True)
    write_corpus(tmp_path / "b", form, [small(0), small(1)])
    report = validate(tmp_path, 0, form=form)
    assert (report.records, report.by_rule) == (3, {"bad_container": 1})
    with pytest.raises((DataError, FileNotFoundError), match=re.escape(str(tmp_path / "a" / FILES[form]))):
        open_corpus(tmp_path, form)


def test_rules_of_corpora_are_those_that_are_documented() -> None:
    golden = [*IMAGES.values(), *TARS.values(), *TABLES.values(), *(row[1:] for row in FILES_GOLDEN.values())]
    text = Path(__file__).parents[2].joinpath("docs/data_format.md").read_text(encoding="utf-8")
    section = text.split("\n## Captions\n")[1].split("\n## ")[0]
    documented = set(re.findall(r"`(\w+)`", section)) & set(RULES)
    assert documented == {row[0] for row in golden} | {"empty_file", "duplicate_id"}


def test_a_row_group_that_cannot_be_read_is_refused_from_there_on_as_in_training(tmp_path: Path, monkeypatch) -> None:
    """In one page the whole row group is lost, whichever column it is; with small chunks, too."""
    for column in ("caption_detail", "image.bytes"):
        file = write_corpus(tmp_path, "flux_reason", [small(n) for n in range(12)])
        data = bytearray(file.read_bytes())
        layout = pq.ParquetFile(file).metadata.row_group(1)
        (place,) = [n for n in range(layout.num_columns) if layout.column(n).path_in_schema == column]
        start = layout.column(place).dictionary_page_offset or layout.column(place).data_page_offset
        data[start : start + 40] = b"\xff" * 40
        file.write_bytes(data)
        for rows in (256, 3, 1):
            monkeypatch.setattr("clvr_train.data.flux_reason._CHUNK_ROWS", rows)
            report = validate(file, 0, form="flux_reason")
            assert (report.records, report.by_rule) == (12, {"bad_container": 4})
            assert [error.record for error in report.offenders] == [5, 6, 7, 8]
            assert refused_in_training(file, "flux_reason") == {4, 5, 6, 7}
            message = f"{file}:5: {column.split('.')[0]}: row group 2 cannot be read ("
            assert str(report.offenders[0]).startswith(message)


def test_behind_a_page_that_cannot_be_read_nothing_is_tried_again(tmp_path: Path, monkeypatch) -> None:
    file = write_flux_reason(tmp_path / "a.parquet", flux_reason_rows(range(40), small), group=40)
    data = bytearray(file.read_bytes())
    layout = pq.ParquetFile(file).metadata.row_group(0)
    (image,) = [layout.column(n) for n in range(layout.num_columns) if layout.column(n).path_in_schema == "image.bytes"]
    data[image.data_page_offset : image.data_page_offset + 40] = b"\xff" * 40
    file.write_bytes(data)
    starts = count_starts(monkeypatch)
    assert validate(file, 0, form="flux_reason").by_rule == {"bad_container": 40}
    assert starts.count("image.bytes") == 1


def count_starts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The columns whose reading is started, each time that it is."""
    starts: list[str] = []
    restart = cells._Column.restart
    monkeypatch.setattr(cells._Column, "restart", lambda self: (starts.append(self._column), restart(self)))
    monkeypatch.setattr("clvr_train.data.flux_reason._cells", cells.Cells(1))
    return starts


def test_every_row_group_is_read_once_and_forwards(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(cells, "BLOCK_BYTES", 10_000)
    monkeypatch.setattr("clvr_train.data.flux_reason._CHUNK_ROWS", 3)
    for part in range(2):
        write_flux_reason(tmp_path / f"{part}.parquet", flux_reason_rows(range(20), small), group=10)
    starts = count_starts(monkeypatch)
    assert validate(tmp_path, 0, form="flux_reason").as_json()["records"] == 40
    assert starts == ["caption_detail", "image.bytes"] * 4


def mixed(folder: Path, form: str) -> None:
    """Files of good and bad records, a file that cannot be read, and in FLUX-Reason rows without a text caption."""
    images = [image for _, image in IMAGES.values()]
    for part in range(3):
        write_corpus(folder / str(part), form, [*images[part::3], *map(small, range(5))])
    write_corpus(folder / "3", form, [small(0)]).write_bytes(b"nothing")


@pytest.mark.parametrize("form", FORMS)
def test_any_number_of_processes_and_any_chunks_find_the_same(tmp_path: Path, monkeypatch, form: str) -> None:
    mixed(tmp_path, form)
    alone = validate(tmp_path, 0, form=form, caption="text")
    monkeypatch.setattr("clvr_train.data.flux_reason._CHUNK_ROWS", 2)
    monkeypatch.setattr("clvr_train.data.fine_t2i._CHUNK_RECORDS", 2)
    for workers in (0, 2):
        again = validate(tmp_path, workers, form=form, caption="text")
        assert (again.as_json(), again.left_out) == (alone.as_json(), alone.left_out)
    assert alone.left_out == {"flux_reason": 12, "fine_t2i": 0}[form]  # every third row of 10
    assert alone.records == 3 * 10 + 1 - alone.left_out
    if form == "fine_t2i":
        assert alone.refused == len(IMAGES) + 1
    files = [error.file for error in alone.offenders]
    assert files == sorted(files) and len(set(files)) == 4


def test_rows_without_the_caption_are_left_out_as_in_training(tmp_path: Path) -> None:
    file = write_flux_reason(tmp_path / "a.parquet", flux_reason_rows(range(26), small))
    for caption in ("text", "text_cn", "detail"):
        corpus = FluxReason(file, caption)
        report = validate(file, 0, form="flux_reason", caption=caption)
        assert (report.records, report.refused) == (len(corpus), 0)
        assert report.left_out == corpus.num_without_caption == (0 if caption == "detail" else 9)


def test_a_corpus_without_records_is_refused_as_in_training(tmp_path: Path) -> None:
    rows = [row | {"caption_detail": None} for row in flux_reason_rows(range(3), small)]
    for form, path, message in (
        ("flux_reason", write_flux_reason(tmp_path / "none.parquet", rows), "no record has this caption"),
        ("flux_reason", write_flux_reason(tmp_path / "empty.parquet", []), "the file is empty"),
        ("fine_t2i", write_tar(tmp_path / "empty.tar", []), "the file is empty"),
    ):
        report = validate(path, 0, form=form)
        assert (report.records, report.by_rule) == (1, {"empty_file": 1})
        assert str(report.offenders[0]) == f"{path}:1: record: {message}"
        with pytest.raises(ValueError, match="no records"):
            open_corpus(path, form)


def test_keys_may_come_again_in_another_tar(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        write_corpus(tmp_path / folder, "fine_t2i", [small(0), small(1)])
    assert validate(tmp_path, 0, form="fine_t2i").as_json()["refused"] == 0
    assert train(tmp_path, "fine_t2i") == 4


def test_what_is_sent_to_a_worker_does_not_grow_with_the_file(tmp_path: Path) -> None:
    members = [(f"{n:06}.{ending}", b"x") for n in range(3000) for ending in ("jpg", "json", "txt")]
    rows = [{"caption_detail": f"caption {n}" if n % 5 else None, "image": {"bytes": b"x", "path": None}}
            for n in range(3000)]  # fmt: skip
    for form, path in (
        ("fine_t2i", write_tar(tmp_path / "a.tar", members)),
        ("flux_reason", write_flux_reason(tmp_path / "a.parquet", rows, group=2000)),
    ):
        parts = list(caption_chunks(path, form, "detail"))
        assert max(len(pickle.dumps(part)) for part in parts) < 8_000
        assert [number for part in parts for number, _ in part.records] == list(range(1, 3001))
        assert 0.9 * path.stat().st_size - 10 * 1024 <= sum(part.weight for part in parts) <= path.stat().st_size
        left_out = [number for part in parts for number, place in part.records if place is None]
        assert left_out == (list(range(1, 3001, 5)) if form == "flux_reason" else [])


def test_a_form_that_there_is_not(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="format='parquet' is not one of trajectories, flux_reason, fine_t2i"):
        validate(tmp_path, 0, form="parquet")
    for form in FORMS:
        with pytest.raises(FileNotFoundError, match="no file"):
            validate(tmp_path, 0, form=form)


GOOD = [small(n) for n in range(3)] + [encoded(picture(3, (80, 64))), encoded(picture(4).convert("L"), "WEBP")]
PICTURES = st.sampled_from([*GOOD, *GOOD, *(image for _, image in IMAGES.values())])


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=60, deadline=None)
@given(images=st.lists(PICTURES, min_size=1, max_size=6), data=st.data())
def test_what_passes_is_never_refused_in_training(tmp_path_factory, form: str, images: list, data) -> None:
    """And what is refused is, but for the rules of validation alone. With good and bad images, bytes that are changed
    (but not in the footer of parquet: there pyarrow may end the process), and files that are cut anywhere.
    """
    file = write_corpus(tmp_path_factory.mktemp("corpus"), form, images)
    whole = bytearray(file.read_bytes())
    end = len(whole)
    if form == "flux_reason":
        end -= 8 + struct.unpack("<I", whole[-8:-4])[0]
    for at in data.draw(st.lists(st.integers(0, end - 1), max_size=2)):
        whole[at] ^= data.draw(st.integers(1, 255))
    if data.draw(st.integers(0, 3)) == 0:
        whole = whole[: data.draw(st.integers(0, len(whole)))]
    file.write_bytes(whole)
    report = validate(file, 0, form=form)
    if not report.refused:
        assert train(file, form) == report.records
        return
    try:
        refused = refused_in_training(file, form)
    except ValueError:
        return  # it cannot be opened
    strict = sum(report.by_rule[rule] for rule in ONLY_VALIDATION)
    assert len(refused) == report.refused - strict
