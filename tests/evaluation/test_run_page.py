"""The page of a run is made of metrics.jsonl, rollouts.jsonl, PNGs and JSON alone, and holds all that they hold."""

import base64
import io
import json
from pathlib import Path

import PIL.Image
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clvr_train.evaluation.html import grid, write_report
from clvr_train.evaluation.plots import MOST_POINTS, curve, intervals, thinned
from clvr_train.evaluation.run_page import (
    curves_of,
    curves_section,
    files_section,
    grids_section,
    read_rollouts,
    rollouts_section,
    spread,
)
from tests.evaluation.pages import Page, parse

COLOURS = {(0, 0): (250, 0, 0), (0, 1): (0, 250, 0), (1, 0): (0, 0, 250), (1, 1): (250, 250, 0)}
EVIL = "<script>alert(1)</script>"


def rollout(epoch: int, group: int, k: int, reward: float | None, **facts) -> dict:
    row = {"epoch": epoch, "trajectory": f"t{group}", "step": 1, "k": k, "reward": reward, "missing": "", "parts": {}}
    row |= {"context": f"goal {group}\nfirst i draw\nthen i look", "p_t2i": f"scene {group}"} if k == 0 else {}
    return row | {"advantage": None, "r": None} | facts


def write_rollouts(folder: Path, rows: list[dict]) -> None:
    (folder / "rollouts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def page_of(folder: Path, content: str) -> Page:
    write_report(folder / "r.html", title="t", summary={}, curves={}, galleries=[], sections=[("s", content)])
    return parse(folder / "r.html")


def images_of(page: Page) -> list[PIL.Image.Image]:
    sources = [value for name, value in page.attributes if name == "src"]
    return [PIL.Image.open(io.BytesIO(base64.b64decode(source.split(",", 1)[1]))) for source in sources]


NAMES = ["reward", "reward_q10", "reward_q90", "reward_top25", "loss", "loss_0_references", "loss_2_references",
         "val_loss_turn_1", "validation_loss_t0.125", "kl", "judge_cached", "lr", "mfu", "seconds_rollout", "whatever",
         "part_edit_std", "memory_gib", "flat_groups", "refused", "-", "é"]  # fmt: skip


@given(st.lists(st.sampled_from(NAMES), unique=True, min_size=1))
def test_every_metric_is_drawn_once(names) -> None:
    rows = [{"step": step, **dict.fromkeys(names, float(step))} for step in (1, 2)]
    frames = [one for family in curves_of(rows).values() for frame in family.values() for one in frame.values()]
    assert frames == [[(1, 1.0), (2, 2.0)]] * len(names)


def test_what_belongs_together_shares_a_frame() -> None:
    found = curves_of([{"step": 1, **dict.fromkeys(NAMES, 0.0)}])
    assert set(found["Reward"]) >= {"reward", "reward: quantiles", "reward: means of the best, in %"}
    assert set(found["Reward"]["reward: quantiles"]) == {"q10", "q90"}
    assert set(found["Loss"]["loss by number of references"]) == {"0", "2"}
    assert list(found["Judge"]) == ["judge_cached"] and "whatever" in found["Other"]
    assert set(found["Time and memory"]) == {"mfu", "memory_gib", "seconds by phase"}


def test_last_values_are_there(tmp_path: Path) -> None:
    rows = [{"step": 1, "loss": 2.5, "kl": 0.125}, {"step": 2, "loss": float("nan")}]
    page = page_of(tmp_path, curves_section(rows))
    assert "0.125" in page.texts and "nan" in page.texts and page.tables_outside == 0


def make_grid(folder: Path, epoch: int, gap: int = 2, px: int = 8) -> None:
    """Two groups of two; a cell is one colour."""
    picture = PIL.Image.new("RGB", (2 * (px + gap), 2 * (px + gap)), "white")
    for (group, column), colour in COLOURS.items():
        cell = PIL.Image.new("RGB", (px, px), colour)
        picture.paste(cell, (column * (px + gap), group * (px + gap)))
    (folder / "samples").mkdir(exist_ok=True)
    picture.save(folder / "samples" / f"epoch-{epoch:05d}.png")


def test_rollouts_by_reward_with_the_picture_of_each(tmp_path: Path) -> None:
    rows = [rollout(1, 0, 0, 0.25, parts={"match": 0.25}, transcript="too dark"),
            rollout(1, 0, 1, 0.75, parts={"match": 0.75}, transcript=EVIL),
            rollout(1, 1, 0, None, missing="HTTP 500", p_i2i="add a dot"), rollout(1, 1, 1, 0.5)]  # fmt: skip
    write_rollouts(tmp_path, rows)
    make_grid(tmp_path, 1)
    page = page_of(tmp_path, rollouts_section(tmp_path, limit=5))
    assert [(image.size, image.getpixel((0, 0)), image.getpixel((7, 7))) for image in images_of(page)] == [
        ((8, 8), colour, colour) for colour in COLOURS.values()
    ]
    captions = [text for text in page.texts if text.endswith((", k 0", ", k 1"))]
    assert captions == ["0.750, k 1", "0.250, k 0", "0.500, k 1", "–, k 0"]
    said = ("goal 0", "first i draw\nthen i look", "scene: scene 0", "edit: add a dot", "too dark", EVIL, "HTTP 500")
    for text in said:
        assert text in page.texts, text
    assert not page.elsewhere and page.tables_outside == 0


def test_rows_that_say_where_their_picture_is_are_believed(tmp_path: Path) -> None:
    rows = [rollout(1, 0, 0, 0.1, cell=[10, 10, 8, 8], reference_cells=[[0, 0, 8, 8]]), rollout(1, 0, 1, 0.2)]
    write_rollouts(tmp_path, rows)
    make_grid(tmp_path, 1)
    page = page_of(tmp_path, rollouts_section(tmp_path, limit=5))
    assert [image.getpixel((4, 4)) for image in images_of(page)] == [COLOURS[0, 0], COLOURS[1, 1]]
    assert "reference 1" in page.texts


def test_a_grid_of_another_size_is_not_cut(tmp_path: Path) -> None:
    write_rollouts(tmp_path, [rollout(1, group, k, 0.5) for group in range(3) for k in range(2)])
    make_grid(tmp_path, 1)
    assert images_of(page_of(tmp_path, rollouts_section(tmp_path, limit=5))) == []


def test_epochs_with_grids_are_shown_else_the_last(tmp_path: Path) -> None:
    write_rollouts(tmp_path, [rollout(epoch, 0, k, 0.5) for epoch in range(1, 11) for k in range(2)])
    assert list(read_rollouts(tmp_path)) == [10]
    for epoch in (2, 4, 6, 8):
        make_grid(tmp_path, epoch)
    shown = read_rollouts(tmp_path)
    assert list(shown) == [2, 6, 8] and all(len(groups) == 1 and len(groups[0]) == 2 for groups in shown.values())


def test_a_line_being_written_is_left_out_and_a_damaged_one_is_named(tmp_path: Path) -> None:
    write_rollouts(tmp_path, [rollout(1, 0, 0, 0.5)])
    with (tmp_path / "rollouts.jsonl").open("a") as file:
        file.write('{"epoch": 1, "k": 1')
    assert [len(group) for group in read_rollouts(tmp_path)[1]] == [1]
    with (tmp_path / "rollouts.jsonl").open("a") as file:
        file.write("\n" + json.dumps(rollout(1, 0, 1, 0.5)) + "\n")
    with pytest.raises(ValueError, match="rollouts.jsonl:2: not a rollout"):
        read_rollouts(tmp_path)


def test_grids_are_inside_smaller_and_of_every_kind(tmp_path: Path) -> None:
    (tmp_path / "samples").mkdir()
    for step in range(10):
        PIL.Image.new("RGB", (4, 4)).save(tmp_path / "samples" / f"step-{step:06d}.png")
    PIL.Image.effect_noise((4000, 1000), 60).save(tmp_path / "samples.png")
    page = page_of(tmp_path, grids_section(tmp_path))
    captions = [text for text in page.texts if text.endswith(".png")]
    assert captions == [f"step-00000{step}.png" for step in (0, 3, 6, 9)] + ["samples.png"]
    assert images_of(page)[-1].size == (1600, 400)


def test_a_picture_that_cannot_be_read_says_so_in_its_place(tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    assert "bad.png" in grid(tmp_path / "bad.png") and "<img" not in grid(tmp_path / "bad.png")
    write_rollouts(tmp_path, [rollout(1, 0, 0, 0.5)])
    (tmp_path / "samples").mkdir()
    (tmp_path / "bad.png").rename(tmp_path / "samples" / "epoch-00001.png")
    assert any("epoch-00001.png" in text for text in page_of(tmp_path, rollouts_section(tmp_path, 1)).texts)


def test_small_json_stands_in_the_page_and_a_large_one_does_not(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(f"a: {EVIL}\n")
    (tmp_path / "merge.json").write_text('{"cosine": 0.5}')
    (tmp_path / "large.json").write_text("[" + "0," * 200_000 + "0]")
    page = page_of(tmp_path, files_section(tmp_path))
    assert f"a: {EVIL}\n" in page.texts and '{"cosine": 0.5}' in page.texts and "large.json" not in page.texts


@given(st.integers(0, 60), st.integers(2, 9))
def test_spread_keeps_the_ends(size: int, number: int) -> None:
    items = list(range(size))
    chosen = spread(items, number)
    assert len(chosen) == min(size, number) == len(set(chosen)) and chosen == sorted(chosen)
    assert not items or (chosen[0], chosen[-1]) == (items[0], items[-1])


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=1500))
def test_a_long_curve_is_thinned_to_means_inside_its_range(values) -> None:
    few = thinned(list(enumerate(values)))
    assert len(few) <= MOST_POINTS and few[-1][0] == len(values) - 1
    assert (min(p[2] for p in few), max(p[3] for p in few)) == (min(values), max(values))
    assert all(low - 1e-6 <= y <= high + 1e-6 for _, y, low, high in few)


def test_curves_of_many_points_have_a_band_and_intervals_a_row_each(tmp_path: Path) -> None:
    content = curve("long", [(x, (-1.0) ** x) for x in range(1000)]) + curve("short", {"a": [(0, 1)], EVIL: [(1, 2)]})
    content += intervals("rates", [(EVIL, 0.5, 0.25, 0.75), ("b", 0.25, -0.5, 0.5)]) + intervals("none", [])
    page = page_of(tmp_path, content)
    assert page.tags.count("polygon") == 1 and "script" not in page.tags
    ends = [(name, value) for name, value in page.attributes if name in ("x1", "x2", "cx")]
    # from -0.5 to 0.75 over 12 to 388: 0 lies at 162.4
    assert [value for _, value in ends] == ["162.4", "162.4", "237.6", "388.0", "312.8", "12.0", "312.8", "237.6"]
