"""GenEval (github.com/djghosh13/geneval): six tags, scored by its own detector in an environment of its own."""

import json
from pathlib import Path

from clvr_train.evaluation.checkout import (
    PART,
    Asked,
    Benchmark,
    Item,
    Script,
    Verdicts,
    find,
    read_lines,
    read_results,
    value_of,
)

PROMPTS, SCORER, RESULTS = "prompts/evaluation_metadata.jsonl", "evaluation/evaluate_images.py", "results.jsonl"


def load(root: Path, samples: int) -> Benchmark:
    """The benchmark with `samples` pictures of each prompt (the authors draw 4).

    The layout is `00000/metadata.jsonl` and `00000/samples/0000.png`, by the line of the prompt from 0; the score is
    the mean of the tags' accuracies.

    Raises:
        OSError, ValueError: the checkout lacks a file, or a prompt is none.
    """
    path = find(root, PROMPTS)
    items, beside = [], {}
    for number, row in enumerate(read_lines(path)):
        where = f"{path}, prompt {number + 1}"
        tag, text = value_of(row, "tag", str, where), value_of(row, "prompt", str, where)
        beside[f"{number:05d}/metadata.jsonl"] = json.dumps(row)
        for k in range(samples):
            file = f"{number:05d}/samples/{k:04d}.png"
            items.append(Item(f"{number:05d}/{k:04d}", tag, text, file, row))
    return Benchmark(
        name="geneval",
        items=items,
        binary=True,
        scale=1,
        weights={item.tag: 1 for item in items},
        script=lambda images, out, judge: _script(root, images, out, judge),
        results=_results,
        beside=beside,
    )


def _script(root: Path, images: Path, out: Path, judge: Asked | None) -> Script:
    scorer = find(root, SCORER)
    return Script([[str(scorer), str(images), "--outfile", str(out / RESULTS)]], root)


def _results(out: Path) -> Verdicts:
    """The rows of the scorer, found again by the path of the picture."""
    verdicts: Verdicts = {}
    for row in read_results(out / RESULTS):
        try:
            folder, _, name = Path(row["filename"]).parts[-3:]
            verdicts[f"{folder}/{Path(name).stem}", PART] = float(bool(row["correct"]))
        except (KeyError, TypeError, ValueError):
            raise ValueError(f"{out / RESULTS}: a row without filename or correct") from None
    return verdicts
