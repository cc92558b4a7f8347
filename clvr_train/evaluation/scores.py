"""An outside benchmark's numbers: the score as its authors take it, with what stands behind it.

A picture that the system did not draw counts as 0: that is the system's failure. An answer that the judge did not give
counts for nothing: it is missing, and the coverage says so.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from clvr_train.evaluation.checkout import Benchmark, Item, Verdicts
from clvr_train.method.statistics import mean_se, wald_se, wilson


def summarise_benchmark(
    benchmark: Benchmark, verdicts: Verdicts, facts: Mapping[str, Mapping[str, Any]], **about: Any
) -> dict[str, Any]:
    """What `evaluation.json` holds, of verdicts that cover items without a picture too; `about` goes in as it is.

    `score` is the mean of the tags' means by the benchmark's weights, or of all answers where it has none, with its
    standard error; `n` of `num` answers are there. Of a binary benchmark `pass_rate` has its Wald error and its
    Wilson 95 % interval, of others `mean_score` has 1.96 standard errors to each side.

    Raises:
        ValueError: there is no answer at all.
    """
    values = {key: value for key, value in verdicts.items() if not isinstance(value, str)}
    reasons = Counter(value for value in verdicts.values() if isinstance(value, str))
    if not values:
        raise ValueError(f"{benchmark.name}: none of {len(verdicts)} answers is a score ({next(iter(reasons), '')})")
    tags = {tag: _tag(benchmark, tag, values) for tag in dict.fromkeys(item.tag for item in benchmark.items)}
    whole = _row(benchmark, benchmark.items, values)
    result = {"benchmark": benchmark.name, "scale": benchmark.scale}
    means = {"score": whole["mean_score"], "score_se": whole["mean_score_se"]}
    result |= weighted(tags, benchmark.weights) if benchmark.weights else means
    if benchmark.released is not None:
        result["released_score"] = weighted(tags, benchmark.released)["score"]
    elif benchmark.name == "geneval_pp" and reasons:  # its scorer counts what the judge did not answer as wrong
        zero = {tag: row | {"mean_score": (row["mean_score"] or 0) * row["coverage"]} for tag, row in tags.items()}
        result["released_score"] = weighted(zero, benchmark.weights, of_all=True)["score"]
    result |= whole | {"missing": dict(reasons.most_common(20)), "items": len(benchmark.items)}
    result |= {"not_drawn": sum(not fact["drawn"] for fact in facts.values()), "tags": tags}
    if len(benchmark.parts) > 1:
        result["parts"] = {part: _part(benchmark, part, values) for part in benchmark.parts}
    known = [facts[item.id] for item in benchmark.items if item.id in facts]
    for name, key in (("nfe_per_goal", "nfe"), ("rounds_per_goal", "rounds"), ("seconds_per_goal", "seconds")):
        result[name] = sum(f[key] for f in known) / len(known) if known else None
    return result | about


def weighted(tags: Mapping[str, Mapping], weights: Mapping[str, float], of_all: bool = False) -> dict[str, Any]:
    """The weighted mean of the tags that have answers, its standard error, and the tags that have none."""
    used = {tag: w for tag, w in weights.items() if tag in tags and (tags[tag]["n"] or of_all)}
    total = sum(used.values())
    if not total:
        return {"score": None, "score_se": None, "tags_without": sorted(weights)}
    score = sum(w * tags[tag]["mean_score"] for tag, w in used.items()) / total
    se = sum((w * (tags[tag]["mean_score_se"] or 0)) ** 2 for tag, w in used.items()) ** 0.5 / total
    return {"score": score, "score_se": se, "tags_without": sorted(weights.keys() - used.keys())}


def outcome_rows(
    benchmark: Benchmark, verdicts: Verdicts, facts: Mapping[str, Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """A row an item, as `runner.rows`; a score of None is missing, `reason` says why."""
    rows = []
    for item in benchmark.items:
        found = {part: verdicts[item.id, part] for part in benchmark.parts}
        reasons = [value for value in found.values() if isinstance(value, str)]
        score = None if reasons else sum(found.values()) / len(found)
        fact = facts.get(item.id, {})
        row = {"id": item.id, "tag": item.tag, "level": None, "goal": item.text}
        row |= {"passed": bool(score) if benchmark.binary and score is not None else None, "score": score}
        row |= {name: fact.get(name) for name in ("rounds", "nfe", "seconds", "stop")}
        rows.append(row | {"reason": "; ".join(reasons)} | (found if len(found) > 1 else {}))
    return rows


def _tag(benchmark: Benchmark, tag: str, values: Mapping[tuple[str, str], float]) -> dict[str, Any]:
    return _row(benchmark, [item for item in benchmark.items if item.tag == tag], values)


def _part(benchmark: Benchmark, part: str, values: Mapping[tuple[str, str], float]) -> dict[str, Any]:
    found = [values[item.id, part] for item in benchmark.items if (item.id, part) in values]
    mean, se = mean_se(found) if found else (None, None)
    num = len(benchmark.items)
    return {"mean_score": mean, "mean_score_se": se, "n": len(found), "num": num, "coverage": len(found) / num}


def _row(
    benchmark: Benchmark, items: Sequence[Item], values: Mapping[tuple[str, str], float]
) -> dict[str, Any]:
    """Mean, error and interval of some items, and how many of their answers there are."""
    by_item = [[values[item.id, p] for p in benchmark.parts if (item.id, p) in values] for item in items]
    flat = [value for found in by_item for value in found]
    counts = {"n": len(flat), "num": len(items) * len(benchmark.parts)}
    counts["coverage"] = counts["n"] / counts["num"]
    if not flat:
        return {"mean_score": None, "mean_score_se": None, "ci95": None, **counts}
    mean = sum(flat) / len(flat)
    if benchmark.binary:
        passes = round(sum(flat))
        se, ci95 = wald_se(passes / len(flat), len(flat)), list(wilson(passes, len(flat)))
        rate = {"pass_rate": mean, "wald_se": se, "ci95": ci95, "passes": passes}
        return rate | {"mean_score": mean, "mean_score_se": se, **counts}
    se = mean_se([sum(found) / len(found) for found in by_item if found])[1]  # the answers of a picture go together
    return {"mean_score": mean, "mean_score_se": se, "ci95": [mean - 1.96 * se, mean + 1.96 * se], **counts}
