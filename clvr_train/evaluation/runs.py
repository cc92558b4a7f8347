"""Any number of evaluation runs side by side: intervals, and differences paired by prompt with their significance."""

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from itertools import combinations
from pathlib import Path
from typing import Any

from clvr_train.method.statistics import holm, mean_se, paired_bootstrap, wald_se, wilson

MEASURES = {"pass_rate": "passed", "mean_score": "score"}  # name -> key of a row
COSTS = {"nfe": "nfe", "seconds": "seconds"}
ABOUT = ("benchmark", "judge", "coverage", "steps", "cfg", "mode")  # of evaluation.json, shown beside the numbers
SCALE = ("benchmark", "judge")  # numbers of others are never taken from each other
LEVEL = 0.05  # of significance
METHOD = (
    "Intervals of 95 %: Wilson for pass rates, mean +- 1.96 SE for scores. Differences are paired by prompt (several "
    "images of one prompt count as their mean): percentile interval and two-sided p of a bootstrap of 10000 resamples. "
    "p_holm is p adjusted for all pairs of runs (Holm); significant: p_holm < 0.05. Parts by tag and by rounds are "
    "not adjusted."
)
Rows = Sequence[Mapping[str, Any]]


def read_outcomes(folder: Path) -> list[dict]:
    """The lines of an evaluation run's outcomes.jsonl.

    Raises:
        FileNotFoundError: there is none.
        ValueError: names the file, the line and the field that is not as it should be.
    """
    path = folder / "outcomes.jsonl"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: not found; name runs of recipes/evaluate.py")
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            rows.append(_checked(json.loads(line)))
        except ValueError as error:
            raise ValueError(f"{path}:{number}: {error}") from error
    if not rows:
        raise ValueError(f"{path}: holds no outcome")
    return rows


def _checked(row: Any) -> dict:
    if not isinstance(row, dict) or not isinstance(row.get("id"), str):
        raise ValueError("id: a text is needed")
    if not isinstance(row.get("passed"), bool | None):
        raise ValueError("passed: neither true, false nor null")
    for key in ("score", "rounds", "nfe", "seconds"):
        value = row.get(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise ValueError(f"{key}: neither a number nor null")
        if value is not None and not math.isfinite(value):
            raise ValueError(f"{key}: not finite")
    return row


def compare_runs(runs: Mapping[str, Rows], about: Mapping[str, Mapping[str, Any]] | None = None) -> dict:
    """What `comparison.json` holds of evaluation runs: name -> rows, and what is said of each (see ABOUT).

    Returns:
        `method`; `systems`: name -> measures, costs, and the same by `tags` and by `rounds`; `differences`: "b - a" for
        every two runs that share benchmark, judge and prompts -> measures (`difference`, `ci95`, `p_value`, `n`, and
        `p_holm` and `significant`), and the same by `tags` and by `rounds` (the larger number of the two). A measure
        that a run does not have is left out.

    Raises:
        ValueError: one id stands for two prompts.
    """
    about = about or {}
    kinds = {name: tuple(about.get(name, {}).get(key) for key in SCALE) for name in runs}
    for kind in set(kinds.values()):
        _check_prompts({name: rows for name, rows in runs.items() if kinds[name] == kind})
    systems = {}
    for name, rows in runs.items():
        known = {key: value for key, value in about.get(name, {}).items() if key in ABOUT}
        systems[name] = known | _part(rows) | {
            "tags": _by(rows, lambda row: row.get("tag")), "rounds": _by(rows, lambda row: row.get("rounds"))
        }  # fmt: skip
    differences = {}
    for a, b in combinations(runs, 2):
        found = _difference(runs[b], runs[a]) if kinds[a] == kinds[b] else {}
        if found:
            differences[f"{b} - {a}"] = found
    _adjust(differences)
    return {"method": METHOD, "systems": systems, "differences": differences}


def _check_prompts(runs: Mapping[str, Rows]) -> None:
    seen: dict[str, tuple[str, str]] = {}
    for name, rows in runs.items():
        for row in rows:
            goal = row.get("goal")
            other, first = seen.setdefault(row["id"], (name, goal))
            if goal != first:
                raise ValueError(f"{name}: prompt {row['id']!r} is another one than in {other}: other goals were drawn")


def _part(rows: Rows) -> dict[str, Any]:
    """Measures and costs of some rows; `missing` are those without a score."""
    result: dict[str, Any] = {"n": len(rows), "prompts": len({row["id"] for row in rows})}
    passed = _values(rows, "passed")
    if passed:
        rate = sum(passed) / len(passed)
        result["pass_rate"], result["ci95"] = rate, list(wilson(int(sum(passed)), len(passed)))
        result["wald_se"] = wald_se(rate, len(passed))
    scores = _values(rows, "score")
    if scores:
        mean, se = mean_se(scores)
        result |= {"mean_score": mean, "mean_score_se": se, "mean_score_ci95": [mean - 1.96 * se, mean + 1.96 * se]}
    result["missing"] = len(rows) - max(len(passed), len(scores))
    for name, key in COSTS.items():
        values = _values(rows, key)
        if values:
            mean, se = mean_se(values)
            result |= {f"{name}_per_goal": mean, f"{name}_per_goal_se": se}
    return result


def _values(rows: Rows, key: str) -> list[float]:
    return [float(row[key]) for row in rows if row.get(key) is not None]


def _by(rows: Rows, key: Callable[[Mapping], Any]) -> dict[str, dict]:
    return {str(value): _part(part) for value, part in _groups(rows, key)}


def _groups(rows: Rows, key: Callable[[Mapping], Any]) -> Iterable[tuple[Any, list]]:
    """Rows by the value of a key, numbers in order and texts as they come; rows without one are in no group."""
    found: dict[Any, list] = {}
    for row in rows:
        if key(row) is not None:
            found.setdefault(key(row), []).append(row)
    return sorted(found.items(), key=lambda item: item[0] if isinstance(item[0], int | float) else 0)


def _difference(a: Rows, b: Rows) -> dict[str, Any]:
    """a - b over the prompts that both have; {} if there are none."""
    of_a, of_b = _prompts(a), _prompts(b)
    both = [
        {"tag": of_a[key]["tag"], "rounds": _larger(of_a[key]["rounds"], of_b[key]["rounds"]), "a": of_a[key],
         "b": of_b[key]}
        for key in of_a if key in of_b
    ]  # fmt: skip
    whole = _tests(both)
    if not whole:
        return {}
    parts = {
        title: {str(value): _tests(some) for value, some in _groups(both, lambda row, key=key: row[key])}
        for title, key in (("tags", "tag"), ("rounds", "rounds"))
    }
    return {"prompts": len(both)} | whole | parts


def _prompts(rows: Rows) -> dict[str, dict]:
    """id -> the means of its rows."""
    result = {}
    for name, part in _groups(rows, lambda row: row["id"]):
        result[name] = {"tag": part[0].get("tag"), "rounds": max(_values(part, "rounds"), default=None)}
        for key in MEASURES.values():
            values = _values(part, key)
            result[name][key] = sum(values) / len(values) if values else None
    return result


def _larger(a: float | None, b: float | None) -> int | None:
    return None if a is None or b is None else int(max(a, b))


def _tests(both: Sequence[Mapping]) -> dict[str, dict]:
    """Paired tests of every measure that both have."""
    result = {}
    for name, key in MEASURES.items():
        pairs = [(row["a"][key], row["b"][key]) for row in both if None not in (row["a"][key], row["b"][key])]
        if pairs:
            test = paired_bootstrap(*zip(*pairs, strict=True))
            result[name] = asdict(test) | {"ci95": list(test.ci95)}
    return result


def _adjust(differences: Mapping[str, dict]) -> None:
    """Adds `p_holm` and `significant` to the differences over all prompts, for every measure on its own."""
    for measure in MEASURES:
        tests = [row[measure] for row in differences.values() if measure in row]
        for test, adjusted in zip(tests, holm([test["p_value"] for test in tests]), strict=True):
            test["p_holm"], test["significant"] = adjusted, adjusted < LEVEL
