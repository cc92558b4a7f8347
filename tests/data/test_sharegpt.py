import json
from pathlib import Path

import pytest
from PIL import Image, ImageChops

from clvr_train.data.images import open_image
from clvr_train.data.readers import read_trajectories
from clvr_train.data.records import DataError
from clvr_train.data.sharegpt import FILE_NAME, write_trajectories
from clvr_train.method.trajectory import Step, Trajectory


def picture(shade: int) -> Image.Image:
    return Image.new("RGB", (64, 64), (shade, 10, 20))


def trajectory(name: str = "a-1") -> Trajectory:
    return Trajectory(name, "a red circle\nand no square", (
        Step("Start with the circle.", "generate", picture(1)), Step("Two lines\nof doubt.", "verify"),
        Step("Make it red.", "edit", picture(2)), Step("All there.", "stop"),
    ))


def record(folder: Path) -> dict:
    write_trajectories(folder, [trajectory()])
    return json.loads((folder / FILE_NAME).read_text())


def rewrite(folder: Path, *records: object) -> None:
    lines = [r if isinstance(r, str) else json.dumps(r) for r in records]
    (folder / FILE_NAME).write_text("\n".join(lines) + "\n")


def test_round_trip(tmp_path: Path) -> None:
    written = [trajectory("a-1"), trajectory("b.2")]
    assert write_trajectories(tmp_path, written) == 2
    for before, after in zip(written, read_trajectories(tmp_path, decode=True), strict=True):
        assert (before.id, before.goal) == (after.id, after.goal)
        texts = [[(step.reasoning, step.action) for step in t.steps] for t in (before, after)]
        assert texts[0] == texts[1]
        for a, b in zip(before.images, after.images, strict=True):
            assert isinstance(b, Path) and ImageChops.difference(a, open_image(b)).getbbox() is None
    assert sorted(p.name for p in tmp_path.iterdir()) == ["images", FILE_NAME]


def test_a_trajectory_may_end_without_stop(tmp_path: Path) -> None:
    open_ended = [Trajectory("v", "goal", (Step("look", "verify"),)),
                  Trajectory("g", "goal", (Step("draw", "generate", picture(0)),))]
    write_trajectories(tmp_path, open_ended)
    assert [len(t.steps) for t in read_trajectories(tmp_path)] == [1, 1]
    last = record(tmp_path)
    last["conversations"] = [{"from": "human", "value": "goal"}, {"from": "gpt", "value": "look\nverify"}]
    last["images"] = []
    rewrite(tmp_path, last)
    assert next(read_trajectories(tmp_path)).steps[0].action == "verify"


def changed(**fields: object):
    return lambda r: {**r, **fields}


def without(field: str):
    return lambda r: {k: v for k, v in r.items() if k != field}


def turn(index: int, **fields: object):
    return lambda r: {**r, "conversations": [
        {**t, **fields} if i == index else t for i, t in enumerate(r["conversations"])]}


MALFORMED = {
    "not json": (lambda r: '{"id": "a"', "record: not a line of JSON"),
    "deep json": (lambda r: "[" * 100_000, "record: not a line of JSON"),
    "a list": (lambda r: [r], "record: must be a JSON object"),
    "blank line": (lambda r: "", "record: not a line of JSON"),
    "no images": (without("images"), "images: is missing"),
    "number as id": (changed(id=3), "id: must be a string"),
    "empty id": (changed(id=" "), "id: must not be empty"),
    "text as turns": (changed(conversations="hello"), "conversations: must be a list"),
    "no rounds": (changed(conversations=[{"from": "human", "value": "goal"}]), "conversations: needs a goal"),
    "empty goal": (turn(0, value=""), "goal: must not be empty"),
    "image in goal": (turn(0, value="<image> more"), r"conversations\[1\].value: the goal holds"),
    "wrong role": (turn(1, **{"from": "human"}), r"conversations\[2\].from: must be 'gpt'"),
    "value not text": (turn(2, value=None), r"conversations\[3\].value: must be a string"),
    "half a character": (turn(0, value="\ud800"), r"conversations\[1\].value: holds half"),
    "unknown action": (turn(1, value="hm\npaint <IMG_GEN_1>"), r"conversations\[2\].value: .*no action"),
    "wrong number": (turn(5, value="hm\nedit <IMG_GEN_3>"), r"conversations\[6\].value: .*_2> comes next"),
    "image not shown": (turn(2, value="nice"), r"conversations\[3\].value: must be '<image>' after"),
    "stop too early": (turn(1, value="hm\nstop"), r"conversations\[3\].value: nothing follows 'stop'"),
    "too few files": (lambda r: {**r, "images": r["images"][:1]}, "images: has 1 files for 2"),
    "too many files": (lambda r: {**r, "images": r["images"] * 2}, "images: has 4 files for 2"),
    "path not text": (changed(images=[1, 2]), r"images\[1\]: must be a path"),
    "url": (changed(images=["https://a.b/c.png", "x"]), r"images\[1\]: .*is a URL"),
    "absolute": (changed(images=["/etc/passwd", "x"]), r"images\[1\]: .*is absolute"),
    "drive": (changed(images=["C:\\x.png", "x"]), r"images\[1\]: .*is absolute"),
    "outside": (changed(images=["images/../../x.png", "x"]), r"images\[1\]: .*leads out of the folder"),
    "link": (changed(images=["images/link.png", "x"]), r"images\[1\]: .*leads out of the folder"),
    "missing file": (changed(images=["images/none.png", "x"]), r"images\[1\]: .*none.png: no such file"),
    "no image": (changed(images=[FILE_NAME, "x"]), r"images\[1\]: .*not an image"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_record_names_file_record_and_field(tmp_path: Path, name: str) -> None:
    change, message = MALFORMED[name]
    good = record(tmp_path)
    (tmp_path / "images/link.png").symlink_to("/etc/hostname")
    rewrite(tmp_path, {**good, "id": "good"}, change(good))
    with pytest.raises(DataError, match=message) as error:
        list(read_trajectories(tmp_path))
    assert str(error.value).startswith(f"{tmp_path / FILE_NAME}:2: ")
    assert "\n" not in str(error.value)


def test_doubled_id_and_empty_file_are_refused(tmp_path: Path) -> None:
    good = record(tmp_path)
    rewrite(tmp_path, good, good)
    with pytest.raises(DataError, match=r":2: id: 'a-1' stands in an earlier record"):
        list(read_trajectories(tmp_path))
    (tmp_path / FILE_NAME).write_text("")
    with pytest.raises(DataError, match="the file is empty"):
        list(read_trajectories(tmp_path))
    with pytest.raises(FileNotFoundError, match=FILE_NAME):
        list(read_trajectories(tmp_path / "elsewhere"))


def test_damaged_pixels_are_found_when_decoding(tmp_path: Path) -> None:
    write_trajectories(tmp_path, [trajectory()])
    path = tmp_path / "images/a-1_2.png"
    path.write_bytes(path.read_bytes()[:-30])
    assert len(list(read_trajectories(tmp_path))) == 1
    with pytest.raises(DataError, match=r":1: images\[2\]: .*a-1_2.png: unreadable image"):
        list(read_trajectories(tmp_path, decode=True))


def test_failed_write_keeps_the_older_file(tmp_path: Path) -> None:
    write_trajectories(tmp_path, [trajectory("old")])
    for bad, field in [(trajectory("new"), "id"),
                       (Trajectory("x", "a <image>", trajectory().steps), "goal"),
                       (Trajectory("x", "goal", (Step("see <image>", "stop"),)), r"steps\[1\].reasoning"),
                       (Trajectory("x", "goal", (Step("see", "generate", tmp_path / "none.png"),)),
                        r"steps\[1\].image")]:
        with pytest.raises(DataError, match=rf"{FILE_NAME}:2: {field}: "):
            write_trajectories(tmp_path, [trajectory("new"), bad])
    assert [t.id for t in read_trajectories(tmp_path)] == ["old"]
    assert not list(tmp_path.rglob("*.tmp"))


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def drawn(name: str, *shades: int, goal: str = "goal") -> Trajectory:
    return Trajectory(name, goal, tuple(Step("see", "generate", picture(shade)) for shade in shades))


def shade(image: Path) -> int:
    return open_image(image).getpixel((0, 0))[0]


BAD_LAST = {
    "id": drawn("a", 5),
    "goal": drawn("x", 5, goal="a <image>"),
    "steps[2].image": Trajectory("x", "goal", (*drawn("x", 5).steps, Step("see", "edit", Path("none.png")))),
}


@pytest.mark.parametrize("bad", BAD_LAST)
def test_failed_write_leaves_every_file_as_it_was(tmp_path: Path, bad: str) -> None:
    write_trajectories(tmp_path, [drawn("a", 1, 2), drawn("b", 3)])
    before = files(tmp_path)
    with pytest.raises(DataError) as error:
        write_trajectories(tmp_path, [drawn("a", 7, 2), drawn("new", 8), BAD_LAST[bad]])
    assert error.value.field == bad and files(tmp_path) == before


def test_images_that_an_older_file_names_stay_when_it_is_replaced(tmp_path: Path) -> None:
    """Who has read it has paths, and opens them later."""
    written = [drawn("a", 1, 2), drawn("b", 3)]
    write_trajectories(tmp_path, written)
    older, before = list(read_trajectories(tmp_path)), files(tmp_path)
    write_trajectories(tmp_path, [drawn("a", 1, 7), drawn("b", 8)])
    shades = [shade(image) for t in (*older, *read_trajectories(tmp_path)) for image in t.images]
    assert shades == [1, 2, 3, 1, 7, 8]
    write_trajectories(tmp_path, written)
    assert files(tmp_path)[FILE_NAME] == before[FILE_NAME], "what is there already keeps its name"
    assert len(list(tmp_path.rglob("*.png"))) == 5


def test_a_folder_is_rewritten_from_itself_in_another_order(tmp_path: Path) -> None:
    """The images of one trajectory may lie under the names that another will have."""
    write_trajectories(tmp_path, [drawn("a", 1), drawn("b", 2)])
    steps = [t.steps for t in read_trajectories(tmp_path)]
    write_trajectories(tmp_path, [Trajectory("a", "goal", steps[1]), Trajectory("b", "goal", steps[0])])
    assert [shade(t.images[0]) for t in read_trajectories(tmp_path)] == [2, 1]
