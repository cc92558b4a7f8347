"""The curve over budgets, worked out by hand, and against runs with smaller budgets."""

import json
from pathlib import Path

import pytest

from clvr_train.evaluation.budget import Canvases, by_budget, by_rounds
from tests.recipes.conftest import ROOT

GOALS = [
    Canvases(1, (True,), (1.0,), (2.0,), 3.0),
    Canvases(1, (False, True, False), (0.5, 1.0, 0.5), (2.0, 4.0, 6.0), 6.0),
    Canvases(2, (False, True), (0.0, 1.0), (1.0, 5.0), 7.0),
    Canvases(2, (), (), (), 1.0),
]


def test_a_budget_ends_with_the_last_image_that_it_allows() -> None:
    rows = by_budget(GOALS, 4, nfe_per_image=4)
    assert [row["max_rounds"] for row in rows] == [1, 2, 3, 4]
    assert [row["pass_rate"] for row in rows] == [0.25, 0.75, 0.5, 0.5]
    assert [row["mean_score"] for row in rows] == [1.5 / 4, 3 / 4, 2.5 / 4, 2.5 / 4]
    assert [row["nfe_per_goal"] for row in rows] == [3.0, 5.0, 6.0, 6.0]
    # 2 + 2 + 1 + 1, then 3 (it says that it is done) + 4 + 5 + 1, then 3 + 6 + 7 + 1
    assert [row["seconds_per_goal"] for row in rows] == [1.5, 3.25, 4.25, 4.25]
    assert [row["levels"]["1"]["pass_rate"] for row in rows] == [0.5, 1.0, 0.5, 0.5]
    assert rows[0]["levels"]["2"]["n"] == 2 and rows[1]["ci95"][0] < 0.75 < rows[1]["ci95"][1]


def test_rounds_that_goals_took() -> None:
    rows = by_rounds([*GOALS, Canvases(3, (False,), (0.0,), (1.0,), 1.0)], nfe_per_image=4)
    assert [(row["rounds"], row["n"], row["nfe"], row["seconds"], row["seconds_se"]) for row in rows] == [
        (0, 1, 0, 1.0, None), (1, 2, 4, 2.0, 1.0), (2, 1, 8, 7.0, None), (3, 1, 12, 6.0, None)]
    assert [row["pass_rate"] for row in rows] == [0.0, 0.5, 1.0, 0.0]


def test_no_goals() -> None:
    with pytest.raises(ValueError, match="no goals"):
        by_budget([], 3, 4)


@pytest.mark.slow
def test_one_run_holds_the_results_of_smaller_budgets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from recipes.budget_curve import main

    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").symlink_to(ROOT / "models")
    found = []
    for most in (3, 2):
        main(["experiment=shapes_budget", "num=10", f"run=most-{most}", f"max_rounds={most}"])
        found.append(json.loads(Path(f"runs/most-{most}/budget_curve.json").read_text()))
    more, less = (each["by_budget"] for each in found)
    assert len(more) == 3 and len(less) == 2
    for a, b in zip(more, less, strict=False):
        for key in ("pass_rate", "mean_score", "nfe_per_goal", "rounds_per_goal", "levels"):
            assert a[key] == b[key]
    assert more[2]["rounds_per_goal"] > more[0]["rounds_per_goal"] == 1
    page = Path("runs/most-3/budget_curve.html").read_text()
    assert page.count("<svg") == 4 and "pass rate by most images" in page
