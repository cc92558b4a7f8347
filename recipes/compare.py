"""Compares systems over training seeds: runs/<run>/seed*/eval/<system>/outcomes.jsonl -> comparison.{json,md}.

All goals, then the goals of three or more objects; differences are paired by goal.
"""

import json
import logging
from pathlib import Path

from omegaconf import DictConfig

from clvr_train.evaluation.compare import compare, markdown, of_levels
from clvr_train.runtime.files import write_atomic
from recipes._recipe import recipe

logger = logging.getLogger(__name__)


@recipe("compare")
def main(cfg: DictConfig) -> None:
    folder = Path("runs") / cfg.run
    seeds = sorted(path for path in folder.glob("seed*") if path.is_dir())  # logs lie beside them
    systems: dict[str, list[list[dict]]] = {}
    for seed in seeds:
        for path in sorted(seed.glob("eval/*/outcomes.jsonl"), key=lambda path: path.stat().st_mtime):
            rows = [json.loads(line) for line in path.read_text().splitlines()]
            systems.setdefault(path.parent.name, []).append(rows)
    if not systems:
        raise FileNotFoundError(f"{folder}/seed*/eval/*/outcomes.jsonl: not found; run recipes/evaluate.py first")
    whole = {name: rows for name, rows in systems.items() if len(rows) == len(seeds)}
    for name in systems.keys() - whole.keys():
        logger.warning("%s was evaluated for %d of %d seeds and is left out", name, len(systems[name]), len(seeds))
    pairs = [(a, b) for a, b in cfg.pairs if a in whole and b in whole]
    result = {"all goals": compare(whole, pairs)}
    many = of_levels(whole, range(3, 100))
    if all(rows for seeds in many.values() for rows in seeds):
        result["three or more objects"] = compare(many, pairs)
    text = "\n".join(f"### {title}\n\n{markdown(part)}" for title, part in result.items())
    write_atomic(folder / "comparison.json", json.dumps(result, indent=2) + "\n")
    write_atomic(folder / "comparison.md", text)
    logger.info("%s", text)


if __name__ == "__main__":
    main()
