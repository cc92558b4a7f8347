"""WISE (github.com/PKU-YuanGroup/WISE): world knowledge, in two versions that have nothing in common but the questions.

`wise_verified` is the benchmark since 2026-04: other prompts, one yes or no, an open judge. `wise` is the archived one:
three grades from 0 to 2. Ids, weights and judges differ, so their scores cannot be compared and never stand together.
"""

from collections.abc import Mapping
from pathlib import Path

from clvr_train.evaluation.checkout import (
    PART,
    Asked,
    Benchmark,
    Item,
    Judging,
    Script,
    Verdicts,
    check_distinct,
    find,
    read_array,
    read_results,
    value_of,
)
from clvr_train.evaluation.judging import filled, messages_of, numbers
from clvr_train.evaluation.wording import NoWording, function_value, without
from clvr_train.services.replies import answer_of, quoted

FILES = ("cultural_common_sense", "spatio-temporal_reasoning", "natural_science")
FIELDS = ("Consistency", "Realism", "Aesthetic Quality")
KEYS = ("consistency", "realism", "aesthetic_quality")  # of the scorer's results
# The last id of each category.
VERIFIED = {"CULTURE": 400, "TIME": 520, "SPACE": 640, "BIOLOGY": 760, "PHYSICS": 880, "CHEMISTRY": 1000}
LEGACY = {"CULTURE": 400, "TIME": 567, "SPACE": 700, "BIOLOGY": 800, "PHYSICS": 900, "CHEMISTRY": 1000}
VERIFIED_WEIGHTS = dict.fromkeys(VERIFIED, 0.12) | {"CULTURE": 0.4}
LEGACY_WEIGHTS = dict.fromkeys(LEGACY, 0.1) | {"CULTURE": 0.4, "TIME": 0.167, "SPACE": 0.133}

SYSTEM = "You examine pictures that were drawn from a text which takes knowledge of the world to understand."
VERIFIED_TEXT = """The text: {prompt}
What it means, which is the measure: {explanation}
The picture is right if it shows what is meant, with everything that matters in its right state, place and relation, and
is not broken anywhere that matters for seeing this. Style and beauty do not count. If in doubt, it is not right.
Answer with exactly one line: Score: 1 if it is right, Score: 0 if not."""
LEGACY_TEXT = """The text: {prompt}
What it means: {explanation}
Give three grades of 0, 1 or 2. 2 is for a picture without any fault; if in doubt, give the lower one.
Consistency: whether everything that the text means is in the picture.
Realism: whether it could be a photograph, true to physics and material.
Aesthetic Quality: whether composition, colour and light are those of a work of art.
Answer with exactly three lines:
Consistency: <grade>
Realism: <grade>
Aesthetic Quality: <grade>"""


def load_verified(root: Path) -> Benchmark:
    """WISE Verified: 0 or 1 a picture, `<prompt_id>.png`; 0.4 of culture and 0.12 of each of the five others.

    Raises:
        OSError, ValueError: the checkout lacks a file, or a prompt is none.
    """
    files = [find(root, f"data_verified/{name}_verified.json") for name in FILES]
    scorer = root / "vllm_eval.py"
    text, extra = VERIFIED_TEXT, {"chat_template_kwargs": {"enable_thinking": False}}
    return Benchmark(
        name="wise_verified",
        items=_items(files, VERIFIED),
        binary=True,
        scale=1,
        weights=VERIFIED_WEIGHTS,
        script=lambda images, out, judge: _script(scorer, files, images, out, judge),
        results=lambda out: _results(out, lambda row: row["score"]),
        judging=_judging("Qwen3.5-35B-A3B", 500, scorer, text, _read_verified, extra),
    )


def load_legacy(root: Path) -> Benchmark:
    """WISE as first released: (0.7 consistency + 0.2 realism + 0.1 aesthetics) / 2, from 0 to 1; the six categories
    weigh as many as they have prompts.

    Raises:
        OSError, ValueError: the checkout lacks a file, or a prompt is none.
    """
    files = [find(root, f"WISE_legacy/data/{name}.json", f"data/{name}.json") for name in FILES]
    scorer = files[0].parent.parent / "gpt_eval.py"
    return Benchmark(
        name="wise",
        items=_items(files, LEGACY),
        binary=False,
        scale=1,
        weights=LEGACY_WEIGHTS,
        script=lambda images, out, judge: _script(scorer, files, images, out, judge),
        results=lambda out: _results(out, lambda row: wiscore(*(row[name] for name in KEYS))),
        judging=_judging("gpt-4o-2024-05-13", 2000, scorer, LEGACY_TEXT, _read_legacy, {}),
    )


def wiscore(consistency: float, realism: float, aesthetics: float) -> float:
    """The score of a picture in the first WISE, of three grades from 0 to 2."""
    return (0.7 * consistency + 0.2 * realism + 0.1 * aesthetics) / 2


def _items(files: list[Path], last: Mapping[str, int]) -> list[Item]:
    items = []
    for path in files:
        for number, row in enumerate(read_array(path), start=1):
            where = f"{path}, record {number}"
            name, text = value_of(row, "prompt_id", int, where), value_of(row, "Prompt", str, where)
            value_of(row, "Explanation", str, where)
            if not 1 <= name <= 1000:
                raise ValueError(f"{where}: prompt_id: {name} is not from 1 to 1000")
            tag = next(tag for tag, end in last.items() if name <= end)
            items.append(Item(str(name), tag, text, f"{name}.png", row))
        check_distinct(items, path)
    return items


def _judging(model: str, max_tokens: int, scorer: Path, own: str, read, extra: Mapping) -> Judging:
    given = {"prompt_data": {"Prompt": "", "Explanation": ""}, "image_base64": ""}
    try:
        function_value(scorer, "build_evaluation_messages", given)
        wording = str(scorer)
    except NoWording as error:
        wording = without(error)

    def ask(item: Item, part: str, picture: dict) -> list[dict]:
        if wording == str(scorer):
            given_here = given | {"prompt_data": item.row}
            return filled(function_value(scorer, "build_evaluation_messages", given_here), picture)
        text = own.format(prompt=quoted(item.text), explanation=quoted(item.row["Explanation"]))
        return messages_of(SYSTEM, text, picture)

    return Judging(model, max_tokens, ask, read, wording, extra)


def _read_verified(part: str, text: str) -> float:
    said = answer_of(text)
    value = float(said) if said in ("0", "1") else numbers(text, ["Score"], 1)[0]
    if value not in (0, 1):
        raise ValueError(f"Score: 0 or 1 is needed, got {value:g}")
    return value


def _read_legacy(part: str, text: str) -> float:
    grades = numbers(text, FIELDS, 2)
    if any(grade not in (0, 1, 2) for grade in grades):
        raise ValueError(f"0, 1 or 2 are needed, got {grades}")
    return wiscore(*grades)


def _script(scorer: Path, files: list[Path], images: Path, out: Path, judge: Asked) -> Script:
    """A run for each of the three files, as the authors do; each goes on where it ended."""
    find(scorer.parent, scorer.name)
    runs = []
    for path, name in zip(files, FILES, strict=True):
        words = ["--json_path", str(path), "--image_dir", str(images), "--output_dir", str(out / name)]
        words += ["--api_key", judge.key, "--api_base", judge.url, "--model", judge.model]
        words += ["--result_full", str(out / f"{name}_full.json"), "--result_scores", str(out / f"{name}_scores.jsonl")]
        runs.append([str(scorer), *words, "--max_workers", str(judge.workers)])
    return Script(runs, out, {}, judge.model)


def _results(out: Path, score) -> Verdicts:
    verdicts: Verdicts = {}
    for name in FILES:
        path = out / f"{name}_scores.jsonl"
        for row in read_results(path):
            try:
                value = float(score(row))
                if not 0 <= value <= 1:
                    raise ValueError
                verdicts[str(row["prompt_id"]), PART] = value
            except (KeyError, TypeError, ValueError):
                raise ValueError(f"{path}: a row without prompt_id or score") from None
    return verdicts
