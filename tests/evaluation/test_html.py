"""The report is one well-formed file: everything escaped, everything inside."""

import base64
import io
from pathlib import Path

import PIL.Image
import pytest

from clvr_train.evaluation.html import write_report
from tests.evaluation.pages import Page, parse

EVIL = "<script>alert('x')</script> & \"quotes\""


@pytest.fixture
def page(tmp_path: Path) -> Page:
    system = {"pass_rate": 0.5125, "ci95": [0.4, 0.625], "mean_score": 0.7, "n": 80, "steps": 28, "cfg": 3.0}
    write_report(
        tmp_path / "report.html",
        title=EVIL,
        summary={
            "systems": {EVIL: system | {"mode": "single_step", "tags": {EVIL: 0.25}}, "empty": {}},
            "seconds": {"total": 61.2, EVIL: 1},
        },
        curves={
            EVIL: [(0, 1.0), (1, float("nan")), (2, 0.5)],
            "none": [(0, float("nan"))],
            "one": [(3, 2)],
            "empty": [],
        },
        galleries=[
            {
                "title": EVIL,
                "subtitle": EVIL,
                "rounds": [
                    {"text": EVIL, "image": PIL.Image.new("RGB", (4, 4), "red"), "caption": EVIL},
                    {"text": "checked", "image": None, "caption": "verify"},
                ],
            }
        ],
        notes=[EVIL],
    )
    return parse(tmp_path / "report.html")


def test_all_text_is_escaped(page: Page) -> None:
    assert "script" not in page.tags
    assert page.texts.count(EVIL) == 11  # a report says each of these once, and the title twice
    assert ("alt", EVIL) in page.attributes and ("aria-label", EVIL) in page.attributes


def test_nothing_comes_from_elsewhere(page: Page, tmp_path: Path) -> None:
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "http" not in text and "//" not in text.split("<style>")[0] and "@import" not in text
    sources = [value for name, value in page.attributes if name in ("src", "href")]
    assert len(sources) == 1 and sources[0].startswith("data:image/png;base64,")
    image = PIL.Image.open(io.BytesIO(base64.b64decode(sources[0].split(",", 1)[1])))
    assert image.size == (4, 4) and image.getpixel((0, 0)) == (255, 0, 0)


def test_numbers_are_there_and_missing_ones_are_dashes(page: Page) -> None:
    for text in ("0.512", "0.400 to 0.625", "0.700", "80", "28", "3.0", "single_step", "0.250", "61 s", "–"):
        assert text in page.texts, text
    assert page.texts.count("no values") == 2


def test_curves_stay_inside_their_box(page: Page) -> None:
    paths = [value for name, value in page.attributes if name == "d"]
    assert paths == ["M52.0,12.0 L388.0,194.0", "M52.0,194.0 h0.1"]


def test_a_report_of_nothing_is_a_page(tmp_path: Path) -> None:
    write_report(tmp_path / "r.html", title="empty", summary={}, curves={}, galleries=[])
    assert "empty" in parse(tmp_path / "r.html").texts
    assert [path.name for path in tmp_path.iterdir()] == ["r.html"]
