"""Comparison of systems over several training seeds on the same goals, as docs/ablation.md shows it."""

from collections.abc import Mapping, Sequence

from clvr_train.method.statistics import mean_se, paired_bootstrap


def goal_means(seeds: Sequence[Sequence[dict]], levels: range | None = None) -> list[float]:
    """Pass rate of every goal over the seeds, in the order of the goals; only goals of `levels` objects if given.

    Raises:
        ValueError: if the seeds were not evaluated on the same goals.
    """
    ids = [[row["id"] for row in rows] for rows in seeds]
    if any(other != ids[0] for other in ids):
        raise ValueError("the seeds were evaluated on different goals")
    chosen = [i for i, row in enumerate(seeds[0]) if levels is None or row["level"] in levels]
    return [sum(rows[i]["passed"] for rows in seeds) / len(seeds) for i in chosen]


def compare(
    systems: Mapping[str, Sequence[Sequence[dict]]], pairs: Sequence[tuple[str, str]], levels: range | None = None
) -> dict:
    """Rates and paired differences.

    Args:
        systems: name -> one list of outcome rows (`runner.rows`) for every seed.
        pairs: (a, b) for the differences a - b.

    Returns:
        `systems`: name -> pass_rate with the 95 % interval of the mean over goals, the rate of every seed, mean
        score and NFEs a goal. `differences`: "a - b" -> difference and its 95 % bootstrap interval over goals.
    """
    rates = {}
    for name, seeds in systems.items():
        means = goal_means(seeds, levels)
        mean, se = mean_se(means)
        kept = [[row for row in rows if levels is None or row["level"] in levels] for rows in seeds]
        flat = [row for rows in kept for row in rows]
        rates[name] = {
            "pass_rate": mean,
            "ci95": [max(0.0, mean - 1.96 * se), min(1.0, mean + 1.96 * se)],
            "by_seed": [sum(row["passed"] for row in rows) / len(rows) for rows in kept],
            "mean_score": sum(row["score"] for row in flat) / len(flat),
            "nfe_per_goal": sum(row["nfe"] for row in flat) / len(flat),
            "n": len(means),
        }
    differences = {}
    for a, b in pairs:
        difference, lo, hi = paired_bootstrap(goal_means(systems[a], levels), goal_means(systems[b], levels))
        differences[f"{a} - {b}"] = {"difference": difference, "ci95": [lo, hi]}
    return {"systems": rates, "differences": differences}


def markdown(comparison: dict) -> str:
    """The comparison as two Markdown tables."""
    head = ("system", "pass rate", "95 % interval", "by seed", "mean score", "NFE a goal", "goals")
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for name, row in comparison["systems"].items():
        seeds = ", ".join(f"{rate:.3f}" for rate in row["by_seed"])
        lo, hi = row["ci95"]
        lines.append(
            f"| {name} | {row['pass_rate']:.3f} | {lo:.3f} to {hi:.3f} | {seeds} | {row['mean_score']:.3f}"
            f" | {row['nfe_per_goal']:.1f} | {row['n']} |"
        )
    lines += ["", "| difference | pass rate | 95 % interval |", "|---|---|---|"]
    for name, row in comparison["differences"].items():
        lines.append(f"| {name} | {row['difference']:+.3f} | {row['ci95'][0]:+.3f} to {row['ci95'][1]:+.3f} |")
    return "\n".join(lines) + "\n"
