"""Checkouts of outside benchmarks that are no good, replies that are no score, words read from a scorer's source."""

import json
import os

import pytest
from omegaconf import OmegaConf
from PIL import Image

from clvr_train.evaluation import echo4o, geneval, judging, prism, wise
from clvr_train.evaluation.checkout import PART, Asked
from clvr_train.evaluation.script import score_by_script
from clvr_train.evaluation.wording import NoWording, constant, function_value
from recipes import evaluate
from recipes._benchmarks import build_benchmark
from tests.evaluation import checkouts

LOADERS = {
    "geneval": (checkouts.geneval, lambda root: geneval.load(root, 4), "prompts/evaluation_metadata.jsonl"),
    "geneval_pp": (checkouts.echo4o, echo4o.load_geneval_pp, "test_scripts/Geneval++.jsonl"),
    "imaginebench": (checkouts.echo4o, echo4o.load_imaginebench, "test_scripts/Imagine.jsonl"),
    "prism": (checkouts.prism, lambda root: prism.load(root, "en"), "captions/en/style.jsonl"),
    "wise": (checkouts.wise, wise.load_legacy, "WISE_legacy/data/natural_science.json"),
    "wise_verified": (checkouts.wise, wise.load_verified, "data_verified/natural_science_verified.json"),
}
by_name = pytest.mark.parametrize("name", LOADERS)


def refused(name, root):
    """What the benchmark says of a checkout, in a line."""
    with pytest.raises((OSError, ValueError)) as error:
        LOADERS[name][1](root)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500
    return str(error.value)


@pytest.fixture
def broken(tmp_path):
    """broken(name, content) -> what the benchmark says of a checkout whose file has this content; None: no file."""

    def load(name, content):
        make, _, file = LOADERS[name]
        path = make(tmp_path / "checkout") / file
        path.unlink()
        if content is not None:
            path.write_bytes(content)
        said = refused(name, tmp_path / "checkout")
        assert str(path) in said
        return said

    return load


@by_name
def test_a_checkout_that_lacks_something_is_named(name, broken, tmp_path):
    assert f"benchmark.root={tmp_path / 'none'}: no such folder" in refused(name, tmp_path / "none")
    assert "not found; benchmark.root is the folder" in broken(name, None)
    assert "no prompts in it" in broken(name, b"[]" if "wise" in name else b"\n \n")


@by_name
def test_a_prompt_file_of_something_else_is_named(name, broken):
    assert "not UTF-8" in broken(name, b'{"prompt": "\xff\xfe"}')
    assert "not JSON" in broken(name, b'{"prompt": "a bro')
    assert "not a JSON object" in broken(name, b"[1]")
    row = {"prompt": "x" * 10_000_000}
    huge = json.dumps([row] if "wise" in name else row).encode()
    assert "longer than 1048576 bytes, which no prompt is" in broken(name, huge)


ROWS = {
    "geneval": {"tag": "t", "include": [], "prompt": "p"},
    "geneval_pp": {"tag": "t", "include": [{"class": "cup", "count": 2}], "prompt": "p"},
    "imaginebench": {"id": 1, "instruction": "i", "note": "n", "type": "COLOR"},
    "prism": {"prompt": "p"},
    "wise": {"Prompt": "p", "Explanation": "e", "prompt_id": 750},
    "wise_verified": {"Prompt": "p", "Explanation": "e", "prompt_id": 750},
}


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [(name, field, value) for name, row in ROWS.items() for field in row for value in (None, True, [], "\ud800")
     if field != "include" or name != "geneval"],
)  # fmt: skip
def test_a_field_of_another_kind_is_named_with_its_record(name, field, value, broken):
    row = ROWS[name] | {field: value}
    said = broken(name, json.dumps([row] if "wise" in name else row).encode())
    assert f"{field}" in said and " 1: " in said


@pytest.mark.parametrize(
    ("name", "rows", "message"),
    [
        ("imaginebench", [{"id": 1}, {"id": 1}], "the id 1 comes twice"),
        ("imaginebench", [{"type": "COLOUR"}], "type 'COLOUR' is not one of COLOR, SHAPE"),
        ("wise", [{}, {}], "the id 750 comes twice"),
        ("wise_verified", [{"prompt_id": 1001}], "prompt_id: 1001 is not from 1 to 1000"),
        ("geneval_pp", [{"include": ["cup"]}], "include: objects are needed"),
        ("geneval_pp", [{"include": [{"class": "cup", "count": "2"}]}], "count: a whole number is needed"),
    ],
)
def test_records_that_contradict_each_other_or_the_format_are_named(name, rows, message, broken):
    whole = [ROWS[name] | row for row in rows]
    text = json.dumps(whole) if "wise" in name else "\n".join(map(json.dumps, whole))
    assert message in broken(name, text.encode())


def test_the_two_versions_of_wise_read_different_files_with_different_ids(tmp_path):
    root = checkouts.wise(tmp_path)
    legacy, verified = (
        {item.id: item.tag for item in load(root).items} for load in (wise.load_legacy, wise.load_verified)
    )
    assert legacy["540"] == "TIME" and verified["540"] == "SPACE"
    assert (root / "data_verified").rename(root / "elsewhere")
    assert "data_verified/cultural_common_sense_verified.json: not found" in refused("wise_verified", root)
    assert wise.load_legacy(root).name == "wise"


JUDGE = {"url": "http://h/v1", "key_env": None}


@pytest.mark.parametrize(
    ("name", "options", "judge", "message"),
    [
        ("geneval", {"root": "nowhere"}, {}, "nowhere: no such folder"),
        ("genevil", {}, {}, "benchmark.name='genevil' is not one of shapes, geneval, geneval_pp"),
        ("wise", {}, {"url": None}, "judge.url=... is needed: wise is scored by gpt-4o-2024-05-13"),
        ("wise", {}, {"url": "http://a:b@h/v1"}, "url of h: without name, password"),
        ("wise", {}, {"key_env": "NO_SUCH_KEY"}, "key_env=NO_SUCH_KEY: the environment variable is not set"),
        ("geneval", {"scorer": "judge"}, {}, "geneval has no judge, only a script"),
        ("wise", {"scorer": "both"}, {}, "'both' is not one of script, judge"),
        ("prism", {"language": "de"}, {}, "benchmark.language='de' is not one of en, zh"),
    ],
)
def test_what_cannot_be_scored_is_refused_before_anything_is_drawn(name, options, judge, message, tmp_path):
    make = LOADERS[name][0] if name in LOADERS else checkouts.wise
    chosen = {"name": name, "root": str(make(tmp_path / "checkout")), "samples": 1, "language": "en"}
    chosen["scorer"] = "script" if name == "geneval" else "judge"
    cfg = OmegaConf.create({"benchmark": chosen | options, "judge": JUDGE | judge})
    with pytest.raises((OSError, ValueError)) as error:
        build_benchmark(cfg)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_checkout_that_is_none_is_one_line_of_the_recipe(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        evaluate.main(["benchmark=geneval", "benchmark.root=nowhere"])
    assert end.value.code == 1
    assert capsys.readouterr().err == f"error: benchmark.root={tmp_path}/nowhere: no such folder\n"
    assert not (tmp_path / "runs").exists()


FIELDS = echo4o.FIELDS


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("Score: 1", 1), ("**Score**: 0", 0), ("Score：1", 1), ("<think>Score: 0?</think>\nScore: 1", 1), ("1", 1),
        ("```\nScore: 1\n```", 1), ("score 1", 1), ("Score: 2", None), ("Score: 0.5", None),
        ("Score: 0\nScore: 1", None),
        ("Score: 0 or 1", 0), ("Score: 0-1", None), ("Score: 1/2", None), ("I give it a 1.", None), ("", None),
    ],
)  # fmt: skip
def test_a_yes_or_no_of_wise(text, value):
    if value is None:
        with pytest.raises(ValueError):
            wise._read_verified(PART, text)
    else:
        assert wise._read_verified(PART, text) == value


def test_grades_of_the_first_wise():
    assert wise._read_legacy(PART, "Consistency: 2\nRealism: 1\nAesthetic Quality: 0") == pytest.approx(0.8)
    for text in ("Consistency: 3\nRealism: 1\nAesthetic Quality: 0", "Consistency: 2\nRealism: 1", "2\n1\n0"):
        with pytest.raises(ValueError):
            wise._read_legacy(PART, text)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ('{"justification": "x", "score": 7}', 7), ('Here:\n{"justification": "x", "score": 7.5,\n}', 7.5),
        ('{" justification ": "x", "score ": 0}', 0), ('{"score": 11}', None), ('{"score": "7"}', None),
        ('{"score": true}', None), ('{"score": NaN}', None), ('{"score": 1, "score": 2}', None), ("7", None),
        ('{"justification": "x"}', None), ("[" * 5000, None),
    ],
)  # fmt: skip
def test_an_object_of_prism(text, value):
    if value is None:
        with pytest.raises(ValueError):
            prism._read("aesthetic", text)
    else:
        assert prism._read("aesthetic", text) == value


def test_verdicts_of_geneval_pp():
    assert [echo4o._pp_read(PART, json.dumps({"correct": value})) for value in (1, 0, True)] == [1, 0, 1]
    for text in ('{"correct": -1}', '{"correct": "yes"}', "correct: 1"):
        with pytest.raises(ValueError):
            echo4o._pp_read(PART, text)


def test_numbers_may_stand_in_words_but_not_in_doubt():
    text = "Fantasy Fulfillment: 8 - nearly\nReason: 9\n\n- **Identity Preservation:** 7.5\nAesthetic Quality: 10/10"
    assert judging.numbers(text, FIELDS, 10) == [8, 7.5, 10]
    wrong = [text.replace("8", "8-9"), text.replace("10/10", "11"), text.replace("7.5", "seven"), f"{text}\n{text}"]
    for bad in wrong:
        with pytest.raises(ValueError):
            judging.numbers(bad, FIELDS, 10)


SOURCE = '''
import os
WORDS = """of the authors"""
BUILT = os.environ["HOME"]


def messages(row, picture):
    """Put together."""
    system = {"role": "system", "content": WORDS_HERE}
    return [system, {"role": "user", "content": [{"type": "text", "text": f"About {row['text']}."}]}]


def runs(row):
    os.system("touch ran")
    return "x"


def calls(row):
    return f"{row['text'].upper()}"
'''


def test_wording_is_read_and_nothing_is_run(tmp_path):
    path = checkouts.write_script(tmp_path / "scorer.py", SOURCE)
    assert constant(path, "WORDS") == "of the authors"
    given = {"row": {"text": "a dog {x}"}, "WORDS_HERE": "w"}
    assert function_value(path, "messages", given) == [
        {"role": "system", "content": "w"}, {"role": "user", "content": [{"type": "text", "text": "About a dog {x}."}]}
    ]  # fmt: skip
    assert function_value(path, "runs", given) == "x" and not (tmp_path / "ran").exists()
    for name, values in (("calls", given), ("messages", {}), ("none", given)):
        with pytest.raises(NoWording):
            function_value(path, name, values)
    for name in ("BUILT", "NONE"):
        with pytest.raises(NoWording):
            constant(path, name)
    with pytest.raises(NoWording, match="No such file"):
        constant(tmp_path / "none.py", "WORDS")
    with pytest.raises(NoWording):
        constant(checkouts.write_script(tmp_path / "bad.py", "def ("), "WORDS")


PRISM_SCORER = '''
import argparse, json, pathlib
def get_message_templates():
    system = {"role": "system", "content": "s"}
    one = [system, {"role": "user", "content": [{"type": "text", "text": "Align: {text_prompt}"}]}]
    two = [system, {"role": "user", "content": [{"type": "text", "text": "Form: {text_prompt}"}]}]
    return {"alignment": {"affection": one, "composition": one, "entity": one, "imagination": one, "style": one,
                          "text_rendering": one, "long_text": one}, "aesthetic": two}
if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    for name in ("image_path", "api_key", "base_url", "api_model", "num_images", "output_dir"):
        parser.add_argument("--" + name, required=True)
    args = parser.parse_args()
    assert args.num_images == "2" and args.api_model == "judge" and args.base_url == "http://h/v1"
    for part in ("alignment", "aesthetic"):
        for picture in pathlib.Path(args.image_path).glob("*/*.png"):
            out = pathlib.Path(args.output_dir, part, picture.parent.name, picture.stem + ".jsonl")
            out.parent.mkdir(parents=True, exist_ok=True)
            if part == "alignment" or picture.stem == "0":
                out.write_text(json.dumps({"justification": "x", "score": 8 if part == "alignment" else 5}))
    print("key", args.api_key)
'''
WISE_SCORER = '''
import argparse, json
parser = argparse.ArgumentParser()
for name in ("json_path", "image_dir", "output_dir", "api_key", "api_base", "model", "result_full", "result_scores"):
    parser.add_argument("--" + name, required=True)
parser.add_argument("--max_workers", type=int)
args = parser.parse_args()
with open(args.result_scores, "w") as file:
    for row in json.load(open(args.json_path)):
        if row["prompt_id"] != 540:
            grades = {"score": 1.0} if "verified" in args.json_path else {
                "consistency": 2.0, "realism": 1.0, "aesthetic_quality": 0.0}
            file.write(json.dumps({"prompt_id": row["prompt_id"], "Subcategory": "x", **grades}) + "\\n")
'''
PP_SCORER = '''
import json, os, pathlib
SYSTEM_PROMPT = """Authors' words."""
if __name__ == "__main__":
    assert os.environ["OPENAI_API_KEY"] == "key" and os.environ["OPENAI_BASE_URL"] == "http://h/v1"
    results = []
    for number, line in enumerate(open("Geneval++.jsonl"), start=1):
        assert (pathlib.Path("image") / f"{number}.jpg").exists()
        result = [{"correct": 1, "reason": ""}, {"correct": 0, "reason": ""}, {"correct": -1, "reason": "3 retries"}]
        results.append({"id": number, "tag": json.loads(line)["tag"], "prompt": "", "result": result[(number - 1) % 3]})
    json.dump({"overall_results": results}, open("Output.json", "w"))
'''
IMAGINE_SCORER = '''
import argparse, json, os
parser = argparse.ArgumentParser()
for name in ("json_path", "image_dir", "output_dir", "api_key", "model", "result_full", "result_scores"):
    parser.add_argument("--" + name, required=True)
args = parser.parse_args()
with open(os.path.join(args.output_dir, args.result_scores), "w") as file:
    for line in open(args.json_path):
        row = json.loads(line)
        text, score = "Fantasy Fulfillment: 8\\nIdentity Preservation: 7\\nAesthetic Quality: 5", 6.6
        if row["id"] == 2:  # as the released scorer goes on after a reply without two of the numbers
            text, score = "Fantasy Fulfillment: 8", -1.0
        if row["id"] == 3:
            text, score = "Evaluation failed after 3 attempts.", 0
        file.write(json.dumps({"id": row["id"], "type": "x", "Weighted Score": score, "evaluation_text": text}) + "\\n")
'''


@pytest.fixture
def scored(tmp_path):
    """scored(benchmark) -> what the benchmark's script says of pictures, the judge, and its log."""

    def score(benchmark):
        images, out = tmp_path / "images", tmp_path / "scorer"
        for item in benchmark.items:
            (images / item.file).parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8)).save(images / item.file)
        found, judge = score_by_script(benchmark, images, out, Asked("http://h/v1", "judge", "key", 3), python=None)
        return found, judge, (out / "scorer.log").read_text()

    return score


def test_the_script_of_prism_skips_and_is_counted(scored, tmp_path):
    root = checkouts.prism(tmp_path / "prism")
    checkouts.write_script(root / prism.SCORER, PRISM_SCORER)
    benchmark = prism.load(root, "en")
    found, judge, log = scored(benchmark)
    assert judge == "judge" and len(found) == 21 and found["style/1", "alignment"] == 8
    assert ("style/1", "aesthetic") not in found and found["style/0", "aesthetic"] == 5
    assert "--api_key <redacted>" in log
    messages = benchmark.judging.ask(benchmark.items[0], "aesthetic", {"type": "image_url"})
    assert messages[1]["content"] == [{"type": "text", "text": "Form: imagination number 0"}, {"type": "image_url"}]
    assert benchmark.judging.wording == str(root / prism.SCORER)


@pytest.mark.parametrize(
    ("load", "script", "value"),
    [(wise.load_verified, "vllm_eval.py", 1), (wise.load_legacy, "WISE_legacy/gpt_eval.py", 0.8)],
)
def test_the_script_of_wise_runs_for_each_file(load, script, value, scored, tmp_path):
    root = checkouts.wise(tmp_path / "wise")
    checkouts.write_script(root / script, WISE_SCORER)
    found, judge, log = scored(load(root))
    assert judge == "judge" and log.count("$ ") == 3
    assert {key[0] for key in found} == {"1", "2", "3", "400", "401", "750", "850", "950"}
    assert list(found.values()) == pytest.approx([value] * 8)


def test_the_script_of_geneval_pp_runs_where_its_paths_lead(scored, tmp_path):
    root = checkouts.echo4o(tmp_path / "echo")
    checkouts.write_script(root / "test_scripts" / echo4o.PP_SCORER, PP_SCORER)
    benchmark = echo4o.load_geneval_pp(root)
    found, judge, _ = scored(benchmark)
    assert judge == "gpt-4.1" and [found[str(i), PART] for i in (1, 2, 3, 4)] == [1, 0, "3 retries", 1]
    system, _ = benchmark.judging.ask(benchmark.items[0], PART, {})
    assert system["content"] == "Authors' words." and "the checklist is clvr_train's" in benchmark.judging.wording


def test_the_script_of_imaginebench_is_not_believed_where_it_has_read_nothing(scored, tmp_path):
    root = checkouts.echo4o(tmp_path / "echo")
    checkouts.write_script(root / "test_scripts" / echo4o.IMAGINE_SCORER, IMAGINE_SCORER)
    found, judge, _ = scored(echo4o.load_imaginebench(root))
    assert judge == "judge" and [found[str(i), PART] for i in (1, 4, 5, 6)] == [6.6] * 4
    assert all("0 lines" in found[str(i), PART] for i in (2, 3))


def test_a_scorer_that_leaves_nothing_or_cannot_be_run_is_named(scored, tmp_path, monkeypatch):
    root = checkouts.geneval(tmp_path / "geneval")
    checkouts.write_script(root / geneval.SCORER, "print('nothing to do')")
    with pytest.raises(FileNotFoundError, match=r"results.jsonl: the scorer has left no results; see .*scorer.log"):
        scored(geneval.load(root, 1))
    monkeypatch.setenv("RANK", "1")
    checkouts.write_script(root / geneval.SCORER, "import os; print(os.environ['RANK'])")
    with pytest.raises(ChildProcessError, match="ended with status 1 .*KeyError: 'RANK'"):
        scored(geneval.load(root, 1))
    assert os.environ["RANK"] == "1"
    images = tmp_path / "images"
    for bad in ("NAME", "=x"):
        with pytest.raises(ValueError, match="benchmark.env: NAME=value is needed"):
            score_by_script(geneval.load(root, 1), images, tmp_path / "o", Asked("", "", "", 1), python=None, env=[bad])
