"""Comparison of systems over several training seeds on the same goals, as docs/ablation.md shows it."""

from collections.abc import Mapping, Sequence

import numpy as np

from clvr_train.method.statistics import crossed_bootstrap

Seeds = Sequence[Sequence[dict]]  # for every training seed the outcome rows (`runner.rows`) of a system
MEASURES = {"pass_rate": "passed", "mean_score": "score"}  # name -> key of a row


def table(seeds: Seeds, key: str) -> np.ndarray:
    """One number of every outcome: (seeds, goals), goals in the order of the first seed."""
    return np.array([[float(row[key]) for row in rows] for rows in seeds])


def of_levels(systems: Mapping[str, Seeds], levels: Sequence[int]) -> dict[str, list[list[dict]]]:
    """Only the goals with so many objects."""
    return {name: [[r for r in rows if r["level"] in levels] for rows in seeds] for name, seeds in systems.items()}


def check_same_goals(systems: Mapping[str, Seeds]) -> None:
    """Raises ValueError unless every system and seed was evaluated on the same goals, in the same order."""
    first: list[tuple] | None = None
    for name, seeds in systems.items():
        for number, rows in enumerate(seeds):
            goals = [(row["id"], row["goal"]) for row in rows]
            first = first or goals
            if goals != first:
                raise ValueError(f"{name}, seed {number}: evaluated on other goals than the first system")


def compare(systems: Mapping[str, Seeds], pairs: Sequence[Sequence[str]]) -> dict:
    """Rates, paired differences and ratios; every 95 % interval is over training seeds and goals together.

    Args:
        systems: name -> its outcomes, all on the same goals and of as many seeds.
        pairs: (a, b) for a - b and a / b.

    Returns:
        `systems`: name -> pass_rate, ci95, by_seed, mean_score, nfe_per_goal, n, and `levels` (number of objects ->
        pass rate). `differences`: "a - b" -> measure -> [value, lo, hi]; `ratios`: "a / b" -> the same, and `nfe`, how
        many times fewer network evaluations a takes.
    """
    check_same_goals(systems)
    rates = {}
    for name, seeds in systems.items():
        rate, lo, hi = crossed_bootstrap(lambda mean: mean, table(seeds, "passed"))
        levels = sorted({row["level"] for row in seeds[0]})
        rates[name] = {
            "pass_rate": rate,
            "ci95": [lo, hi],
            "by_seed": table(seeds, "passed").mean(1).tolist(),
            "mean_score": float(table(seeds, "score").mean()),
            "nfe_per_goal": float(table(seeds, "nfe").mean()),
            "n": len(seeds[0]),
            "levels": {str(k): float(table(of_levels({"": seeds}, [k])[""], "passed").mean()) for k in levels},
        }
    differences, ratios = {}, {}
    for a, b in pairs:
        both = {name: (table(systems[a], key), table(systems[b], key)) for name, key in MEASURES.items()}
        differences[f"{a} - {b}"] = {name: crossed_bootstrap(np.subtract, *two) for name, two in both.items()}
        ratios[f"{a} / {b}"] = {name: crossed_bootstrap(_ratio, *two) for name, two in both.items()}
        ratios[f"{a} / {b}"]["nfe"] = rates[b]["nfe_per_goal"] / rates[a]["nfe_per_goal"]
    return {"systems": rates, "differences": differences, "ratios": ratios}


def _ratio(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return a / np.maximum(b, 1e-9)  # a resample in which b never passes says "much better", not an error


def markdown(comparison: dict) -> str:
    """The comparison as Markdown tables: systems, pass rate by number of objects, differences and ratios."""
    systems = comparison["systems"]
    lines = _head("system", "pass rate", "95 % interval", "by seed", "mean score", "NFE a goal", "goals")
    for name, row in systems.items():
        seeds = ", ".join(f"{rate:.3f}" for rate in row["by_seed"])
        lines.append(
            f"| {name} | {row['pass_rate']:.3f} | {_interval(row['ci95'], '.3f')} | {seeds} | {row['mean_score']:.3f}"
            f" | {row['nfe_per_goal']:.1f} | {row['n']} |"
        )
    levels = list(dict.fromkeys(level for row in systems.values() for level in row["levels"]))
    lines += ["", *_head("pass rate by number of objects", *levels)]
    for name, row in systems.items():
        lines.append(f"| {name} | " + " | ".join(f"{row['levels'][level]:.3f}" for level in levels) + " |")
    lines += ["", *_head("difference", "pass rate", "95 % interval", "mean score", "95 % interval")]
    for name, row in comparison["differences"].items():
        lines.append(f"| {name} | {_values(row, '+.3f')} |")
    lines += ["", *_head("ratio", "pass rate", "95 % interval", "mean score", "95 % interval", "fewer NFE")]
    for name, row in comparison["ratios"].items():
        lines.append(f"| {name} | {_values(row, '.2f')} | {row['nfe']:.1f} times |")
    return "\n".join(lines) + "\n"


def _head(*names: str) -> list[str]:
    return [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]


def _interval(bounds: Sequence[float], form: str) -> str:
    return f"{bounds[0]:{form}} to {bounds[1]:{form}}"


def _values(row: Mapping, form: str) -> str:
    return " | ".join(f"{row[name][0]:{form}} | {_interval(row[name][1:], form)}" for name in MEASURES)
