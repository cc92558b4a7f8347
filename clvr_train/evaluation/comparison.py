"""A comparison of evaluation runs (`runs.compare_runs`) as text for a terminal and as a page."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from clvr_train.evaluation.html import details, figures, table, write_report
from clvr_train.evaluation.plots import curve, intervals
from clvr_train.evaluation.runs import ABOUT, MEASURES

NONE = "–"


def text(comparison: Mapping) -> str:
    """Tables of plain text: the runs, and their differences."""
    parts = [_plain(*systems_table(comparison["systems"]))]
    if comparison["differences"]:
        parts.append(_plain(*differences_table(comparison["differences"])))
    return "\n\n".join(parts)


def write_comparison(path: Path, comparison: Mapping) -> None:
    """The page: tables and plots of everything that `comparison.json` holds."""
    systems, differences = comparison["systems"], comparison["differences"]
    sections = [("Runs", table(*systems_table(systems)) + _side_by_side(_of_systems(systems)))]
    if differences:
        plots = _side_by_side(_of_differences(differences))
        sections.append(("Differences, paired by prompt", table(*differences_table(differences)) + plots))
    for key, heading in (("tags", "By tag"), ("rounds", "By number of rounds")):
        parts = [details(_words(name), table(*_crossed(systems, key, name)), shown=True) for name in MEASURES]
        tests = [details(f"{name}: {heading.lower()}", table(*differences_table(part)))
                 for name, row in differences.items() if (part := _parts(row, key))]  # fmt: skip
        sections.append((heading, "".join(parts + tests)))
    sections.append(("Latency and network evaluations by number of rounds", _costs(systems)))
    notes = [comparison["method"]]
    write_report(path, title=f"{len(systems)} runs compared", summary={}, curves={}, galleries=[], notes=notes,
                 sections=sections)  # fmt: skip


def systems_table(systems: Mapping[str, Mapping]) -> tuple[list[str], list[list[str]]]:
    """Head and rows; columns of which no run says anything are left out."""
    columns = {
        "pass rate": lambda row: _number(row.get("pass_rate")),
        "95 % interval": lambda row: _interval(row.get("ci95")),
        "Wald SE": lambda row: _number(row.get("wald_se")),
        "mean score": lambda row: _number(row.get("mean_score")),
        "SE": lambda row: _number(row.get("mean_score_se")),
        "n": lambda row: str(row["n"]),
        "missing": lambda row: str(row["missing"]) if row["missing"] else NONE,
        "NFE": lambda row: _number(row.get("nfe_per_goal"), ".1f"),
        "seconds": lambda row: _number(row.get("seconds_per_goal"), ".2f"),
        **{key: lambda row, key=key: _said(row.get(key)) for key in ABOUT},
    }
    cells = {name: [column(row) for row in systems.values()] for name, column in columns.items()}
    cells = {name: column for name, column in cells.items() if set(column) != {NONE}}
    rows = [[name, *values] for name, *values in zip(systems, *cells.values(), strict=True)]
    return ["run", *cells], rows


def differences_table(differences: Mapping[str, Mapping]) -> tuple[list[str], list[list[str]]]:
    """Head and rows, a row a difference and measure; * marks what is significant."""
    rows = []
    for name, row in differences.items():
        for measure in MEASURES:
            if measure in row:
                test = row[measure]
                p, holm = f"{test['p_value']:.4f}", f"{test['p_holm']:.4f}" if "p_holm" in test else NONE
                mark = "*" if test.get("significant") else ""
                value = f"{test['difference']:+.3f}{mark}"
                rows.append([name, _words(measure), value, _interval(test["ci95"], "+.3f"), p, holm, str(test["n"])])
    return ["difference", "measure", "value", "95 % interval", "p", "p, adjusted", "prompts"], rows


def _crossed(systems: Mapping[str, Mapping], key: str, measure: str) -> tuple[list[str], list[list[str]]]:
    """A row a run, a column a tag (or number of rounds): the measure and how many rows it is of."""
    names = list(dict.fromkeys(name for row in systems.values() for name in row[key]))
    names = sorted(names, key=float) if key == "rounds" else names
    rows = []
    for system, row in systems.items():
        cells = [row[key].get(name, {}) for name in names]
        interval = "ci95" if measure == "pass_rate" else "mean_score_ci95"
        rows.append([system, *(f"{cell[measure]:.3f} ({_interval(cell[interval])}), n {cell['n']}"
                               if measure in cell else NONE for cell in cells)])  # fmt: skip
    return ["run", *(f"{name} rounds" if key == "rounds" else name for name in names)], rows


def _parts(row: Mapping, key: str) -> dict[str, Mapping]:
    return {name: tests for name, tests in row[key].items() if tests}


def _of_systems(systems: Mapping[str, Mapping]) -> list[str]:
    rates = [(name, row["pass_rate"], *row["ci95"]) for name, row in systems.items() if "pass_rate" in row]
    scored = {name: row for name, row in systems.items() if "mean_score" in row}
    scores = [(name, row["mean_score"], *row["mean_score_ci95"]) for name, row in scored.items()]
    costs = {name: [(row["nfe_per_goal"], row.get("pass_rate", row.get("mean_score", math.nan)))]
             for name, row in systems.items() if "nfe_per_goal" in row}  # fmt: skip
    plots = [intervals("pass rate, 95 % intervals", rates), intervals("mean score, 95 % intervals", scores)]
    return plots + [curve("pass rate (or score) over network evaluations a goal", costs, dots=True)]


def _of_differences(differences: Mapping[str, Mapping]) -> list[str]:
    return [
        intervals(f"difference of {_words(measure)}, 95 % intervals",
                  [(name, row[measure]["difference"], *row[measure]["ci95"])
                   for name, row in differences.items() if measure in row])
        for measure in MEASURES
    ]  # fmt: skip


def _costs(systems: Mapping[str, Mapping]) -> str:
    """A row a run and number of rounds, as in the paper's table 8, and the same as curves."""
    head = ["run", "rounds", "n", "seconds", "SE", "NFE", "pass rate", "95 % interval", "mean score"]
    rows = [
        [name, rounds, str(row["n"]), _number(row.get("seconds_per_goal")), _number(row.get("seconds_per_goal_se")),
         _number(row.get("nfe_per_goal"), ".1f"), _number(row.get("pass_rate")), _interval(row.get("ci95")),
         _number(row.get("mean_score"))]
        for name, system in systems.items() for rounds, row in system["rounds"].items()
    ]  # fmt: skip
    plots = {
        title: {name: [(float(rounds), row[key]) for rounds, row in system["rounds"].items() if key in row]
                for name, system in systems.items()}
        for title, key in (("seconds by rounds", "seconds_per_goal"), ("NFE by rounds", "nfe_per_goal"),
                           ("pass rate by rounds", "pass_rate"))
    }  # fmt: skip
    return table(head, rows) + figures(plots)


def _side_by_side(plots: Sequence[str]) -> str:
    return f'<div class="curves">{"".join(plots)}</div>'


def _words(name: str) -> str:
    return name.replace("_", " ")


def _number(value: float | None, form: str = ".3f") -> str:
    return NONE if value is None else f"{value:{form}}"


def _interval(bounds: Sequence[float] | None, form: str = ".3f") -> str:
    return NONE if bounds is None else f"{bounds[0]:{form}} to {bounds[1]:{form}}"


def _said(value: Any) -> str:
    return NONE if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _plain(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    lines = []
    for first, *others in (head, ["-" * width for width in widths], *rows):
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *cells]))
    return "\n".join(lines)
