"""GenEval++ and ImagineBench (github.com/yejy53/Echo-4o, `test_scripts/`): one picture a prompt, before a judge."""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

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
    read_lines,
    read_results,
    value_of,
)
from clvr_train.evaluation.judging import filled, json_field, messages_of, numbers
from clvr_train.evaluation.wording import NoWording, constant, function_value, without
from clvr_train.services.replies import quoted, strict_json

PP_PROMPTS, PP_SCORER = "Geneval++.jsonl", "Eval-gpt-4.1-geneval++.py"
IMAGINE_PROMPTS, IMAGINE_SCORER = "Imagine.jsonl", "Eval-gpt-4.1-Imagine.py"
FULL, SCORES = "full.json", "scores.jsonl"
TAGS = {
    "COLOR": "Attribute shift",
    "SHAPE": "Attribute shift",
    "SIZE": "Attribute shift",
    "MATERIAL": "Hybridization",
    "COMBINATION": "Hybridization",
    "TIME": "Spatiotemporal",
    "ENVIRONMENT": "Spatiotemporal",
    "Multi-Object": "Multi-Object",
    "TWO_OBJECT": "Multi-Object",
}
WEIGHTS = {"Attribute shift": 3, "Hybridization": 2, "Spatiotemporal": 2, "Multi-Object": 2}
FIELDS = ("Fantasy Fulfillment", "Identity Preservation", "Aesthetic Quality")

PP_SYSTEM = """You check pictures against a list of requirements. The picture is right only if every requirement holds:
the kinds of things, how many there are of each, their colours, their sizes, and where in the picture they are. It must
also be one coherent picture that could be a photograph: no drawing, no collage, no panels. In doubt it is not right.
Answer with one JSON object and nothing else: {"correct": 1 or 0, "reason": "..."}"""
IMAGINE_SYSTEM = "You grade pictures of things that do not exist. You are strict: 10 is for one without any fault."
IMAGINE_TEXT = """The picture was drawn from this prompt: {instruction}
What it asks for: {note}
Give three whole numbers from 0 (not at all) to 10 (without fault).
Fantasy Fulfillment: whether what is unreal in the prompt is there, wholly and convincingly.
Identity Preservation: whether the thing itself can still be recognised, in realistic detail.
Aesthetic Quality: whether the picture is clear, realistic and pleasant to look at.
Answer with three lines, each followed by a line with a reason:
Fantasy Fulfillment: <number>
Reason: <one sentence>
Identity Preservation: <number>
Reason: <one sentence>
Aesthetic Quality: <number>
Reason: <one sentence>"""


def load_geneval_pp(root: Path) -> Benchmark:
    """GenEval++: pictures `1.jpg`, `2.jpg`, ... by the line of the prompt; the score is the mean of the tags'
    accuracies.

    Raises:
        OSError, ValueError: the checkout lacks a file, or a prompt is none.
    """
    path = _find(root, PP_PROMPTS)
    items = []
    for number, row in enumerate(read_lines(path), start=1):
        where = f"{path}, prompt {number}"
        tag, text = value_of(row, "tag", str, where), value_of(row, "prompt", str, where)
        _check_things(row, where)
        items.append(Item(str(number), tag, text, f"{number}.jpg", row))
    return Benchmark(
        name="geneval_pp",
        items=items,
        binary=True,
        scale=1,
        weights={item.tag: 1 for item in items},
        script=lambda images, out, judge: _pp_script(path, images, out, judge),
        results=_pp_results,
        judging=_pp_judging(path.with_name(PP_SCORER)),
    )


def load_imaginebench(root: Path) -> Benchmark:
    """ImagineBench: pictures `<id>.png`; 0.8 of the lower of fulfilment and identity, 0.2 of aesthetics, from 0 to 10.

    The released scorer looks for its fourth group under a name that the data does not have, and so leaves it out of the
    score; here it counts, and the score without it is given as well.

    Raises:
        OSError, ValueError: the checkout lacks a file, or a prompt is none.
    """
    path = _find(root, IMAGINE_PROMPTS)
    items = []
    for number, row in enumerate(read_lines(path), start=1):
        where = f"{path}, prompt {number}"
        name, kind = value_of(row, "id", int, where), value_of(row, "type", str, where)
        text = value_of(row, "instruction", str, where)
        value_of(row, "note", str, where)
        if kind not in TAGS:
            raise ValueError(f"{where}: type {kind!r} is not one of {', '.join(TAGS)}")
        items.append(Item(str(name), TAGS[kind], text, f"{name}.png", row))
    check_distinct(items, path)
    return Benchmark(
        name="imaginebench",
        items=items,
        binary=False,
        scale=10,
        weights=WEIGHTS,
        released={tag: weight for tag, weight in WEIGHTS.items() if tag != "Multi-Object"},
        script=lambda images, out, judge: _imagine_script(path, images, out, judge),
        results=_imagine_results,
        judging=_imagine_judging(path.with_name(IMAGINE_SCORER)),
    )


def _find(root: Path, name: str) -> Path:
    return find(root, f"test_scripts/{name}", name)


def _check_things(row: Mapping[str, Any], where: str) -> None:
    for name in ("include", "exclude"):
        if name == "include" or name in row:
            for thing in value_of(row, name, list, where):
                if not isinstance(thing, dict):
                    raise ValueError(f"{where}: {name}: objects are needed, got {repr(thing)[:60]}")
                value_of(thing, "class", str, f"{where}: {name}")
                if "count" in thing:
                    value_of(thing, "count", int, f"{where}: {name}")


def checklist(row: Mapping[str, Any]) -> str:
    """What must and must not be in the picture of a GenEval++ prompt, a line each."""
    lines = []
    for thing in row["include"]:
        count = thing.get("count", 1)
        words = [thing[name] for name in ("size", "color") if thing.get(name)]
        words = [str(count), *map(str, words), thing["class"] + ("s" if count > 1 else "")]
        place = f", in the {thing['region']} part of the picture" if thing.get("region") else ""
        lines.append(f"- {' '.join(words)}{place}")
    lines += [f"- no more than {thing.get('count', 1) - 1} of: {thing['class']}" for thing in row.get("exclude", ())]
    return "\n".join(lines)


def _pp_judging(scorer: Path) -> Judging:
    try:
        system, wording = constant(scorer, "SYSTEM_PROMPT"), str(scorer)
        wording += " (SYSTEM_PROMPT; the checklist is clvr_train's)"
    except NoWording as error:
        system, wording = PP_SYSTEM, without(error)

    def ask(item: Item, part: str, picture: dict) -> list[dict]:
        text = f"Instruction:\n{item.text}\n\nExpectation checklist:\n{checklist(item.row)}"
        return messages_of(system, text, picture)

    return Judging("gpt-4.1", 200, ask, _pp_read, wording)


def _pp_read(part: str, text: str) -> float:
    value = json_field(text, "correct")
    if value not in (0, 1):
        raise ValueError(f"correct: 0 or 1 is needed, got {repr(value)[:40]}")
    return float(value)


def _pp_script(prompts: Path, images: Path, out: Path, judge: Asked) -> Script:
    """Its paths are fixed, relative to where it runs: `Geneval++.jsonl`, `image/`, `Output.json`; so is the judge."""
    shutil.copyfile(prompts, out / PP_PROMPTS)
    if not (out / "image").exists():
        os.symlink(images, out / "image", target_is_directory=True)
    scorer = find(prompts.parent, PP_SCORER)
    return Script([[str(scorer)]], out, {"OPENAI_API_KEY": judge.key, "OPENAI_BASE_URL": judge.url}, "gpt-4.1")


def _pp_results(out: Path) -> Verdicts:
    path = out / "Output.json"
    verdicts: Verdicts = {}
    try:
        for row in strict_json(path.read_text(encoding="utf-8"))["overall_results"]:
            value, reason = row["result"].get("correct"), row["result"].get("reason", "")
            verdicts[str(row["id"]), PART] = float(value) if value in (0, 1) else str(reason) or "not judged"
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not the results of {PP_SCORER} ({error})") from None
    return verdicts


def _imagine_judging(scorer: Path) -> Judging:
    given = {"prompt_data": {"instruction": "", "note": ""}, "image_base64": ""}
    try:
        function_value(scorer, "build_messages", given)
        wording = str(scorer)
    except NoWording as error:
        wording = without(error)

    def ask(item: Item, part: str, picture: dict) -> list[dict]:
        if wording == str(scorer):
            return filled(function_value(scorer, "build_messages", given | {"prompt_data": item.row}), picture)
        text = IMAGINE_TEXT.format(instruction=quoted(item.text), note=quoted(item.row["note"]))
        return messages_of(IMAGINE_SYSTEM, text, picture)

    return Judging("gpt-4.1-2025-04-14", 1024, ask, _imagine_read, wording)


def _imagine_read(part: str, text: str) -> float:
    fulfilment, identity, aesthetics = numbers(text, FIELDS, 10)
    return 0.8 * min(fulfilment, identity) + 0.2 * aesthetics


def _imagine_script(prompts: Path, images: Path, out: Path, judge: Asked) -> Script:
    paths = ["--json_path", str(prompts), "--image_dir", str(images), "--output_dir", str(out)]
    rest = ["--api_key", judge.key, "--model", judge.model, "--result_full", FULL, "--result_scores", SCORES]
    scorer = str(find(prompts.parent, IMAGINE_SCORER))
    return Script([[scorer, *paths, *rest]], out, {"OPENAI_BASE_URL": judge.url}, judge.model)


def _imagine_results(out: Path) -> Verdicts:
    """The scorer's numbers; where it has read fewer than three it goes on with -1, and where the judge failed with 0:
    both are missing here.
    """
    verdicts: Verdicts = {}
    for row in read_results(out / SCORES):
        try:
            name, score = str(row["id"]), float(row["Weighted Score"])
            numbers(row["evaluation_text"], FIELDS, 10)
            verdicts[name, PART] = score
        except (KeyError, TypeError, AttributeError):
            raise ValueError(f"{out / SCORES}: a row without id, score or text") from None
        except ValueError as error:
            verdicts[name, PART] = f"reply: {error}"
    return verdicts
