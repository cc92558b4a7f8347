"""Comparison over seeds: differences are paired, levels apart, other goals refused."""

import pytest

from clvr_train.evaluation.compare import compare, markdown, of_levels


def outcomes(passed: list[bool], nfe: int, goals: str = "goal") -> list[dict]:
    return [
        {"id": f"eval-{i}", "goal": f"{goals} {i}", "level": 1 + i % 3, "passed": p, "score": 0.5 + 0.5 * p, "nfe": nfe}
        for i, p in enumerate(passed)
    ]


SYSTEMS = {
    "slow": [
        outcomes([True, False, True, True, False, True], 56),
        outcomes([True, False, True, False, False, True], 56),
    ],
    "fast": [
        outcomes([True, False, False, True, False, True], 4),
        outcomes([True, False, True, False, False, False], 4),
    ],
}


def test_rates_differences_and_ratios():
    result = compare(SYSTEMS, [("fast", "slow")])
    slow = result["systems"]["slow"]
    assert slow["by_seed"] == [pytest.approx(4 / 6), 0.5] and slow["n"] == 6
    assert slow["levels"] == {"1": 0.75, "2": 0.0, "3": 1.0}
    value, lo, hi = result["differences"]["fast - slow"]["pass_rate"]
    assert value == pytest.approx(-2 / 12) and lo <= value <= hi <= 0  # fast never passes where slow fails
    assert result["ratios"]["fast / slow"]["pass_rate"][0] == pytest.approx(5 / 7)
    assert result["ratios"]["fast / slow"]["nfe"] == 14
    text = markdown(result)
    assert "| fast - slow | -0.167 |" in text and "14.0 times" in text and "number of objects | 1 | 2 | 3 |" in text


def test_levels_choose_goals():
    many = of_levels(SYSTEMS, [2, 3])
    assert [row["id"] for row in many["slow"][1]] == ["eval-1", "eval-2", "eval-4", "eval-5"]


def test_other_goals_are_refused_even_under_the_same_ids():
    other = SYSTEMS | {"third": [outcomes([True] * 6, 4), outcomes([True] * 6, 4, goals="another")]}
    with pytest.raises(ValueError, match="third, seed 1: evaluated on other goals"):
        compare(other, [])
