"""What PPRL leaves of an epoch: lines, a picture, where in it each rollout is, and the rows of a table."""

import json
from pathlib import Path

from PIL import Image

from clvr_train.evaluation.run_page import by_reward, read_rollouts
from clvr_train.method.score import ProxyPrompt, Score
from clvr_train.method.trajectory import Sample
from clvr_train.pprl.record import RolloutRecord, bounded, join, rollout_rows, save_grid
from clvr_train.pprl.rollout import Group
from clvr_train.pprl.tasks import Task

PX = 64


def plain(colour: tuple[int, int, int], px: int = PX) -> Image.Image:
    return Image.new("RGB", (px, px), colour)


def groups() -> list[Group]:
    """A text-to-image group drawn elsewhere, and an editing one whose rollouts are as red as their number."""
    score = [Score(0.25, transcript="dull"), Score(None, "HTTP 500"), Score(0.75, transcript="fine")]
    edit = Sample("t", 2, "a goal", ("draw .", "now edit ."), (plain((0, 0, 200), 2 * PX),), None)
    tasks = [Task(Sample("u", 1, "other", ("draw .",), (), None), ProxyPrompt("scene")),
             Task(edit, ProxyPrompt("scene", "do it", (1,)))]  # fmt: skip
    made = [Group(place, task, [("s", k) for k in range(3)], scores=list(score), advantages=[0.0] * 3, r=[0.5] * 3)
            for place, task in enumerate(tasks)]  # fmt: skip
    made[1].images = [plain((100 + k, 0, 0)) for k in range(3)]
    return made


def test_lines_say_where_in_the_picture_each_is(tmp_path: Path) -> None:
    with RolloutRecord(tmp_path, None) as record:
        record.write(1, groups(), images=True)
        record.write(2, groups(), images=False)
    with Image.open(tmp_path / "samples/epoch-00001.png") as opened:
        picture = opened.convert("RGB")
    rows = [json.loads(line) for line in (tmp_path / "rollouts.jsonl").read_text().splitlines()]
    assert not any("cell" in row for row in rows[:3] + rows[6:]), "not drawn here, or without a picture"
    for row in rows[3:6]:
        x, y, width, height = row["cell"]
        part = picture.crop((x, y, x + width, y + height))
        assert part.size == (PX, PX) and part.getcolors() == [(PX * PX, (100 + row["k"], 0, 0))]
    (box,) = rows[3]["reference_cells"]
    assert picture.getpixel((box[0] + 1, box[1] + 1)) == (0, 0, 200) and box[2:] == [PX, PX]
    assert [row["cell"][0] for row in rows[3:6]] == [PX + 2, 2 * (PX + 2), 0], "best first, what is missing last"
    assert by_reward(rows[3:6]) == [2, 0, 1] and list(read_rollouts(tmp_path)) == [1]


def test_rows_of_a_table_hold_what_was_drawn_here() -> None:
    (row,) = rollout_rows(groups())
    assert (row["goal"], row["reasoning"], row["rewards"]) == ("a goal", "draw .\nnow edit .", "0.750, 0.250, missing")
    assert (row["scene prompt"], row["edit prompt"]) == ("scene", "do it")
    assert row["judge's words"] == "k 2: fine\nk 0: dull\nk 1: HTTP 500"
    assert row["rollouts by reward"].size == (3 * (PX + 2), PX + 2) and row["references"].size == (PX + 2, PX + 2)
    assert row["rollouts by reward"].getpixel((1, 1)) == (102, 0, 0)


def test_a_large_grid_is_made_smaller_as_a_whole() -> None:
    rows = [[plain((1, 1, 1)), plain((2, 2, 2), 32)], [plain((3, 3, 3))]]
    assert [[image.size for image in row] for row in bounded(rows)] == [[(64, 64), (32, 32)], [(64, 64)]]
    grid, _ = join(bounded(rows, 4 * 50 * 50))
    assert grid.size == (100, 100) and rows[0][0].size == (64, 64)
    assert bounded([]) == []


def test_rows_without_images_take_no_room(tmp_path: Path) -> None:
    grid, boxes = join([[plain((1, 1, 1))], [], [plain((2, 2, 2), 32), plain((3, 3, 3))]])
    assert grid.size == (2 * (PX + 2), 2 * (PX + 2))
    assert boxes == [[[0, 0, PX, PX]], [], [[0, PX + 2, 32, 32], [PX + 2, PX + 2, PX, PX]]]
    assert grid.getpixel((0, PX + 2)) == (2, 2, 2) and grid.getpixel((40, PX + 10)) == (255, 255, 255)
    assert save_grid(tmp_path / "none.png", [[], []]) == [[], []] and not list(tmp_path.iterdir())
