"""Comparison of evaluation runs: numbers by hand, pairs by prompt, and what cannot be compared."""

import json
import math
from pathlib import Path

import pytest

from clvr_train.evaluation.comparison import text, write_comparison
from clvr_train.evaluation.runs import compare_runs, read_outcomes
from clvr_train.method.statistics import mean_se, paired_bootstrap, wilson
from tests.evaluation.pages import parse


def row(number: int, passed: bool | None, rounds: int = 1, **facts) -> dict:
    return {"id": f"p{number}", "tag": ("single", "two")[number % 2], "goal": f"goal {number}", "passed": passed,
            "score": None if passed is None else 0.25 + 0.5 * passed, "rounds": rounds, "nfe": 4 * rounds,
            "seconds": 0.5 * rounds} | facts  # fmt: skip


A = [row(n, passed) for n, passed in enumerate([True, False, True, False, True, False])]
B = [row(n, passed, 1 + n % 3) for n, passed in enumerate([True, True, True, False, None, True])]


def test_numbers_of_a_run_by_hand() -> None:
    systems = compare_runs({"a": A, "b": B}, {"b": {"judge": "shapes", "steps": 4, "nothing": 1}})["systems"]
    a, b = systems["a"], systems["b"]
    assert (a["n"], a["prompts"], a["missing"], a["pass_rate"]) == (6, 6, 0, 0.5)
    assert a["ci95"] == list(wilson(3, 6)) and a["wald_se"] == math.sqrt(0.25 / 6)
    mean, se = mean_se([0.75, 0.25] * 3)
    assert (a["mean_score"], a["mean_score_se"]) == (mean, se) == (0.5, pytest.approx(0.25 * math.sqrt(6 / 5 / 6)))
    assert a["mean_score_ci95"] == [mean - 1.96 * se, mean + 1.96 * se]
    assert (b["n"], b["missing"], b["pass_rate"], b["judge"], b["steps"]) == (6, 1, 0.8, "shapes", 4)
    assert "nothing" not in b and "judge" not in a
    assert {tag: part["pass_rate"] for tag, part in a["tags"].items()} == {"single": 1.0, "two": 0.0}
    costs = {name: (part["n"], part["nfe_per_goal"], part["seconds_per_goal"]) for name, part in b["rounds"].items()}
    assert costs == {"1": (2, 4.0, 0.5), "2": (2, 8.0, 1.0), "3": (2, 12.0, 1.5)}


def test_differences_are_paired_by_prompt_and_leave_out_what_is_missing() -> None:
    found = compare_runs({"a": A, "b": list(reversed(B))})["differences"]
    assert list(found) == ["b - a"]
    whole = found["b - a"]["pass_rate"]
    test = paired_bootstrap([1, 1, 1, 0, 1], [1, 0, 1, 0, 0])  # p4 has no score in b
    assert (whole["difference"], whole["ci95"], whole["p_value"], whole["n"]) == (0.4, list(test.ci95), test.p_value, 5)
    assert found["b - a"]["prompts"] == 6
    assert found["b - a"]["tags"]["single"]["pass_rate"]["difference"] == 0
    assert found["b - a"]["tags"]["two"]["pass_rate"]["difference"] == pytest.approx(2 / 3)
    rounds = found["b - a"]["rounds"]  # by the larger number of the two runs
    assert {name: part["pass_rate"]["n"] for name, part in rounds.items()} == {"1": 2, "2": 1, "3": 2}


def test_a_run_against_itself_and_against_a_clearly_worse_one() -> None:
    good = [row(n, n % 10 != 0) for n in range(100)]
    bad = [row(n, n % 10 == 0) for n in range(100)]
    found = compare_runs({"good": good, "same": good, "bad": bad})["differences"]
    same, worse = found["same - good"]["pass_rate"], found["bad - good"]["pass_rate"]
    assert (same["difference"], same["p_value"], same["significant"]) == (0.0, 1.0, False)
    assert worse["difference"] == -0.8 and worse["significant"] and worse["p_holm"] >= worse["p_value"]
    assert all("p_holm" not in part["pass_rate"] for part in found["bad - good"]["tags"].values())


def test_several_images_of_a_prompt_count_as_their_mean_in_pairs() -> None:
    a = [row(n, passed) for n in range(3) for passed in (True, False)]
    b = [row(n, True) for n in range(3)]
    found = compare_runs({"a": a, "b": b})
    assert (found["systems"]["a"]["n"], found["systems"]["a"]["prompts"]) == (6, 3)
    test = found["differences"]["b - a"]["pass_rate"]
    assert (test["difference"], test["n"], test["ci95"]) == (0.5, 3, [0.5, 0.5])


def test_runs_without_a_prompt_in_common_have_no_difference() -> None:
    found = compare_runs({"a": A, "other": [row(n + 10, True) for n in range(4)]})
    assert found["differences"] == {} and set(found["systems"]) == {"a", "other"}
    assert "difference" not in text(found)


def test_one_id_for_two_prompts_is_refused() -> None:
    with pytest.raises(ValueError, match="b: prompt 'p0' is another one than in a"):
        compare_runs({"a": A, "b": [row(0, True, goal="another")]})


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "Expecting"),
        ('{"goal": "x"}', "id: a text is needed"),
        ('{"id": "x", "passed": 1}', "passed: neither"),
        ('{"id": "x", "passed": true, "score": "high"}', "score: neither"),
        ('{"id": "x", "passed": true, "score": NaN}', "score: not finite"),
        ('{"id": "x", "passed": true, "nfe": true}', "nfe: neither"),
    ],
)
def test_damaged_outcomes_name_the_file_the_line_and_the_field(tmp_path: Path, line: str, words: str) -> None:
    (tmp_path / "outcomes.jsonl").write_text(json.dumps(A[0]) + "\n" + line + "\n")
    with pytest.raises(ValueError, match=f"outcomes.jsonl:2: {words}"):
        read_outcomes(tmp_path)


def test_no_outcomes(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="outcomes.jsonl: not found"):
        read_outcomes(tmp_path)
    (tmp_path / "outcomes.jsonl").write_text("")
    with pytest.raises(ValueError, match="holds no outcome"):
        read_outcomes(tmp_path)


def test_the_page_and_the_text_hold_the_numbers(tmp_path: Path) -> None:
    evil = "<b>&\"'"
    comparison = compare_runs({evil: A, "b": B}, dict.fromkeys((evil, "b"), {"judge": evil}))
    write_comparison(tmp_path / "c.html", json.loads(json.dumps(comparison)))
    page = parse(tmp_path / "c.html")
    assert "b" not in page.tags and "script" not in page.tags and page.texts.count(evil) > 5
    assert page.tables_outside == 0 and page.viewport and not page.elsewhere
    for cell in ("0.500", "0.800", "+0.400", f"b - {evil}", "12.0", "1.500"):
        assert cell in page.texts, cell
    first, *_ = text(comparison).split("\n\n")
    lines = first.splitlines()
    assert len(lines) == 4 and len({len(line) for line in lines}) == 1 and lines[3].startswith("b ")


def test_numbers_of_two_benchmarks_or_judges_are_shown_and_never_subtracted() -> None:
    """WISE and WISE Verified have the same ids for prompts of which some differ."""
    other = [row | {"goal": f"verified {row['goal']}"} for row in B]
    found = compare_runs({"a": A, "b": other}, {"a": {"benchmark": "wise"}, "b": {"benchmark": "wise_verified"}})
    assert list(found["systems"]) == ["a", "b"] and not found["differences"]
    judges = {"a": {"judge": "one"}, "b": {"judge": "two"}, "c": {"judge": "one"}}
    assert list(compare_runs({"a": A, "b": B, "c": B}, judges)["differences"]) == ["c - a"]
