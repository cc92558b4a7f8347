"""PRISM-Bench (github.com/rongyaofang/prism-bench): seven tracks, each picture judged for alignment and aesthetics."""

from collections.abc import Mapping
from pathlib import Path

from clvr_train.evaluation.checkout import (
    Asked,
    Benchmark,
    Item,
    Judging,
    Script,
    Verdicts,
    find,
    read_lines,
    value_of,
)
from clvr_train.evaluation.judging import filled, json_field, messages_of
from clvr_train.evaluation.wording import NoWording, function_value, without
from clvr_train.services.replies import quoted, strict_json

TRACKS = ("imagination", "entity", "text_rendering", "style", "affection", "composition", "long_text")
PARTS = ("alignment", "aesthetic")
LANGUAGES = ("en", "zh")
SCORER = "evaluation/eval_gpt41.py"

SYSTEM = "You grade pictures that were drawn from a text. You are strict."
LOOKS_FOR = {
    "imagination": "whether what is unreal in the text is shown, and shown inventively",
    "entity": "whether the named beings, things and places can be recognised as themselves",
    "text_rendering": "whether the demanded writing is there, letter by letter, and legible",
    "style": "whether the picture is in the demanded style throughout",
    "affection": "whether the demanded feeling or mood is conveyed",
    "composition": "whether everything is where the text puts it, in number, place and relation",
    "long_text": "whether every detail of the long text is there",
}
ALIGNMENT = """Judge how far the picture is what the text says. First of all look at {looks_for}.
Begin at 10. Take off 7 to 10 points where the main thing is missing or wrong, 4 to 6 for a clear fault, 1 to 3 for a
small one. The lowest score is 0."""
AESTHETIC = """Judge how well the picture is made, whatever the text says: form, light, sharpness, composition.
Begin at 10. Take off 7 to 10 points for broken bodies or shapes, 4 to 6 for clear faults of texture or blending, 1 to 3
for small ones. The lowest score is 0."""
FORM = """Answer with one JSON object and nothing else: {{"justification": "a sentence", "score": 0 to 10}}
The text: {text}"""


def load(root: Path, language: str) -> Benchmark:
    """The benchmark with the captions of a language: pictures `<track>/<i>.png` from 0, values from 0 to 10.

    The score is the mean of all values, of both parts, as the released scorer's; what it skips in silence is counted.

    Raises:
        OSError, ValueError: the checkout lacks a file, or a prompt is none; the language is none of the two.
    """
    if language not in LANGUAGES:
        raise ValueError(f"benchmark.language={language!r} is not one of {', '.join(LANGUAGES)}")
    items, longest = [], 0
    for track in TRACKS:
        path = find(root, f"captions/{language}/{track}.jsonl")
        rows = read_lines(path)
        longest = max(longest, len(rows))
        for number, row in enumerate(rows):
            text = value_of(row, "prompt", str, f"{path}, prompt {number + 1}")
            items.append(Item(f"{track}/{number}", track, text, f"{track}/{number}.png", row))

    def script(images: Path, out: Path, judge: Asked) -> Script:
        words = ["--image_path", str(images), "--api_key", judge.key, "--base_url", judge.url]
        words += ["--api_model", judge.model, "--num_images", str(longest), "--output_dir", str(out)]
        words += ["--zh"] if language == "zh" else []
        return Script([[str(find(root, SCORER)), *words]], out, {}, judge.model)

    return Benchmark(
        name="prism",
        items=items,
        binary=False,
        scale=10,
        weights={},
        script=script,
        results=_results,
        judging=_judging(root / SCORER),
        parts=PARTS,
    )


def _judging(scorer: Path) -> Judging:
    try:
        templates = function_value(scorer, "get_message_templates", {})
        for track in TRACKS:
            _authors(templates, track, "alignment", "", {})
            _authors(templates, track, "aesthetic", "", {})
        wording = str(scorer)
    except NoWording as error:
        templates, wording = None, without(error)
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        templates, wording = None, without(NoWording(f"{scorer}: {error}"))

    def ask(item: Item, part: str, picture: dict) -> list[dict]:
        if templates is not None:
            return _authors(templates, item.tag, part, item.text, picture)
        task = ALIGNMENT.format(looks_for=LOOKS_FOR[item.tag]) if part == "alignment" else AESTHETIC
        return messages_of(SYSTEM, f"{task}\n{FORM.format(text=quoted(item.text))}", picture)

    return Judging("gpt-4.1-2025-04-14", 4096, ask, _read, wording, {"seed": 42, "top_p": 1.0})


def _authors(templates: Mapping, track: str, part: str, text: str, picture: dict) -> list[dict]:
    """The authors' messages: a system's words, and a user's with a place for the text."""
    system, user = templates[part][track] if part == "alignment" else templates[part]
    said = user["content"][0]["text"].format(text_prompt=text)
    return filled([system, {"role": user["role"], "content": [{"type": "text", "text": said}]}], picture)


def _read(part: str, text: str) -> float:
    value = json_field(text, "score")
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 10:
        raise ValueError(f"score: a number from 0 to 10 is needed, got {repr(value)[:40]}")
    return float(value)


def _results(out: Path) -> Verdicts:
    """A file a value, `<part>/<track>/<i>.jsonl`; what has none was skipped."""
    verdicts: Verdicts = {}
    for part in PARTS:
        for path in out.glob(f"{part}/*/*.jsonl"):
            key = f"{path.parent.name}/{path.stem}", part
            try:
                row = strict_json(path.read_text(encoding="utf-8"))
                value = row["score"]
                if isinstance(value, bool) or not 0 <= value <= 10:
                    raise ValueError(f"score {value!r} is beyond 0 to 10")
                verdicts[key] = float(value)
            except (ValueError, KeyError, TypeError) as error:
                verdicts[key] = f"{path.name}: {type(error).__name__} {error}"
    return verdicts
