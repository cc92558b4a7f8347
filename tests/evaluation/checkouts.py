"""Miniature checkouts of the outside benchmarks, in their formats: a few prompts, and what stands for scorers."""

import json
from collections.abc import Sequence
from pathlib import Path

from clvr_train.evaluation.prism import TRACKS


def write_lines(path: Path, rows: Sequence[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def write_array(path: Path, rows: Sequence[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows, indent=2), encoding="utf-8")
    return path


def write_script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


# Says of a picture that it is right unless its prompt has the word "bench" in it, or its sample is the last one.
GENEVAL_SCORER = """
import argparse, json, os, sys
parser = argparse.ArgumentParser()
parser.add_argument("imagedir"); parser.add_argument("--outfile"); parser.add_argument("--model-path")
args = parser.parse_args()
assert args.model_path == "detector" and os.environ["DETECTOR"] == "on", "no detector"
assert "RANK" not in os.environ
with open(args.outfile, "w") as out:
    for folder in os.listdir(args.imagedir):
        metadata = json.load(open(os.path.join(args.imagedir, folder, "metadata.jsonl")))
        for name in sorted(os.listdir(os.path.join(args.imagedir, folder, "samples"))):
            path = os.path.join(args.imagedir, folder, "samples", name)
            correct = "bench" not in metadata["prompt"] and name == "0000.png"
            row = {"filename": path, "tag": metadata["tag"], "prompt": metadata["prompt"], "correct": correct}
            out.write(json.dumps(row | {"reason": "", "metadata": json.dumps(metadata)}) + "\\n")
print("Function 'load_models' executed")
"""


def geneval(root: Path) -> Path:
    """Two tags: three prompts of the first, one of the second."""
    rows = [
        {"tag": "single_object", "include": [{"class": name, "count": 1}], "prompt": f"a photo of a {name}"}
        for name in ("bench", "clock", "dog")
    ]
    exclude = [{"class": "cup", "count": 4}]
    rows.append({"tag": "counting", "include": [{"class": "cup", "count": 3}], "exclude": exclude, "prompt": "3 cups"})
    write_lines(root / "prompts" / "evaluation_metadata.jsonl", rows)
    write_script(root / "evaluation" / "evaluate_images.py", GENEVAL_SCORER)
    return root


GENEVAL_PP = [
    {"tag": "counting", "include": [{"class": "cup", "count": 2}], "exclude": [{"class": "cup", "count": 3}],
     "prompt": "A photo of two cups"},
    {"tag": "counting", "include": [{"class": "dog", "count": 3}], "exclude": [{"class": "dog", "count": 4}],
     "prompt": "A photo of three dogs"},
    {"tag": "size_spatial_attr", "include": [{"class": "bus", "count": 1, "size": "larger", "region": "left"},
     {"class": "cat", "count": 1, "size": "smaller", "region": "right"}], "prompt": "A photo of a larger bus"},
    {"tag": "color_attr", "include": [{"class": "tie", "count": 1, "color": "red"}], "prompt": "A photo of a red tie"},
]  # fmt: skip

IMAGINE_TYPES = ("COLOR", "COLOR", "SIZE", "MATERIAL", "TIME", "Multi-Object")
IMAGINE_SCRIPT = '''
"""Stands for the released scorer: what it asks is read from here, what it does is written at the end."""
import json
import sys


def build_messages(prompt_data, image_base64):
    return [
        {"role": "system", "content": [{"type": "text", "text": "Words of the authors."}]},
        {
            "role": "user",
            "content": [
                {"type": "text", "text": f"""Grade it.
PROMPT: "{prompt_data['instruction']}"
EXPLANATION: "{prompt_data['note']}"
"""},
                {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{image_base64}"}},
            ],
        },
    ]
'''


def echo4o(root: Path) -> Path:
    """Four prompts of GenEval++ in three tags; six of ImagineBench in all four groups."""
    write_lines(root / "test_scripts" / "Geneval++.jsonl", GENEVAL_PP)
    rows = [
        {"id": i, "instruction": f"A photo of thing {i}.", "note": f"Note {i}.", "type": kind}
        for i, kind in enumerate(IMAGINE_TYPES, start=1)
    ]
    write_lines(root / "test_scripts" / "Imagine.jsonl", rows)
    return root


def prism(root: Path, language: str = "en") -> Path:
    """Two prompts a track."""
    for track in TRACKS:
        rows = [{"prompt": f"{track} number {i}"} for i in range(2)]
        write_lines(root / "captions" / language / f"{track}.jsonl", rows)
    return root


def _wise(first: Sequence[int], category: str) -> list[dict]:
    return [
        {"Prompt": f"Prompt {i}", "Explanation": f"Means {i}", "Category": category, "Subcategory": "x", "prompt_id": i}
        for i in first
    ]


def wise(root: Path) -> Path:
    """Both versions, side by side as in the repository; ids 401 to 1000 fall into other categories in each."""
    for folder, end in ((root / "data_verified", "_verified"), (root / "WISE_legacy" / "data", "")):
        write_array(folder / f"cultural_common_sense{end}.json", _wise([1, 2, 3, 400], "Cultural knowledge"))
        write_array(folder / f"spatio-temporal_reasoning{end}.json", _wise([401, 540], "time"))
        write_array(folder / f"natural_science{end}.json", _wise([750, 850, 950], "Biology"))
    return root
