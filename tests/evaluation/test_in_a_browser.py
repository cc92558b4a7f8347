"""Pages as a browser shows them, on a phone and on a desktop: nothing sticks out, every picture is there."""

from pathlib import Path

import PIL.Image
import pytest

from clvr_train.evaluation.comparison import write_comparison
from clvr_train.evaluation.html import write_report
from clvr_train.evaluation.run_page import curves_section, grids_section, rollouts_section
from clvr_train.evaluation.runs import compare_runs
from tests.evaluation.browser import look
from tests.evaluation.test_run_page import make_grid, rollout, write_rollouts
from tests.evaluation.test_runs import A, B

pytestmark = pytest.mark.slow
SCREENS = {"phone": (390, 844), "desktop": (1280, 900)}


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> dict[str, Path]:
    """The page of a run and a comparison, with the long words and wide tables that break layouts."""
    folder = tmp_path_factory.mktemp("pages")
    parts = {f"a_part_of_the_reward_{n}": n / 10 for n in range(10)}
    word = "Donaudampfschifffahrtsgesellschaft" * 4
    rows = [rollout(1, group, k, k / 2, parts=parts, transcript=word, context=f"{word}\n{word}")
            for group in range(2) for k in range(2)]  # fmt: skip
    write_rollouts(folder, rows)
    make_grid(folder, 1, px=64)
    PIL.Image.effect_noise((3000, 200), 80).save(folder / "samples.png")
    metrics = [{"step": step, "reward": step / 50, "loss": 1 / step, f"loss_{word}": 1.0} for step in range(1, 50)]
    sections = [("Metrics", curves_section(metrics)), ("Rollouts", rollouts_section(folder, 5)),
                ("Grids", grids_section(folder))]  # fmt: skip
    red = PIL.Image.new("RGB", (900, 900), (200, 0, 0))
    gallery = {"title": word, "subtitle": word, "rounds": [{"text": word, "image": red, "caption": word}] * 5}
    write_report(folder / "run.html", title=word, summary={}, curves={}, galleries=[gallery], sections=sections)
    write_comparison(folder / "comparison.html", compare_runs({f"runs/{word}": A, "b": B, "c": A}))
    return {"run": folder / "run.html", "comparison": folder / "comparison.html"}


@pytest.mark.parametrize("screen", SCREENS)
@pytest.mark.parametrize("name", ["run", "comparison"])
def test_a_page_fits_its_screen(pages: dict[str, Path], tmp_path: Path, name: str, screen: str) -> None:
    (content, width, sticking_out, broken, images), picture = look(pages[name], tmp_path, *SCREENS[screen])
    assert width == SCREENS[screen][0] and content <= width and sticking_out == 0
    assert broken == 0 and images == (5 + 4 + 2 if name == "run" else 0)
    colours = picture.getcolors(picture.width * picture.height)
    assert len(colours) > 20, "an empty page"
    if name == "run":
        assert any(colour == (200, 0, 0) for _, colour in colours), "the picture of the trajectory is not in sight"


def test_a_page_that_does_not_fit_is_seen(tmp_path: Path) -> None:
    meta = '<meta name="viewport" content="width=device-width">'
    (tmp_path / "bad.html").write_text(f'<!doctype html>{meta}<div style="width:700px">x</div><img src="none.png">')
    (content, width, sticking_out, broken, images), _ = look(tmp_path / "bad.html", tmp_path, *SCREENS["phone"])
    assert content > width == 390 and sticking_out == 1 and (broken, images) == (1, 1)
