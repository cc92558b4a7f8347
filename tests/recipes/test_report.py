"""The report of what runs have left: of a training, an evaluation, a story, and of several evaluations compared."""

import json
from pathlib import Path

import pytest
from PIL import Image

from clvr_train.evaluation.runner import Outcome, rows, summarise
from recipes.report import main
from tests.evaluation.pages import parse
from tests.evaluation.test_run_page import make_grid, rollout, write_rollouts


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """runs/s, a story: a training run and three evaluations, of which two are on the same goals."""
    folder = tmp_path_factory.mktemp("report")
    run = folder / "runs/s/pprl"
    run.mkdir(parents=True)
    lines = [{"step": step, "reward": step / 4, "loss": 1.0, "kl": None if step == 1 else 0.1} for step in (1, 2, 3)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 4, "rew')
    write_rollouts(run, [rollout(3, group, k, k / 2) for group in range(2) for k in range(2)])
    make_grid(run, 3)
    Image.new("RGB", (30, 20), "blue").save(run / "samples/step-000003.png")
    (run / "config.yaml").write_text("run: s/pprl\n")
    for name, shift, goal in (("base", 3, "goal"), ("merged", 2, "goal"), ("other", 2, "another goal")):
        evaluation = folder / "runs/s/eval" / name
        evaluation.mkdir(parents=True)
        tags, facts = ("single", "two"), {"rounds": 1, "nfe": 4, "seconds": 0.1}
        outcomes = [Outcome(f"eval-{n}", tags[n % 2], 1 + n % 3, f"{goal} {n}", n % shift > 0, 0.5, **facts)
                    for n in range(12)]  # fmt: skip
        summary = summarise(outcomes, steps=4, cfg=1.0, mode="single_step")
        (evaluation / "evaluation.json").write_text(json.dumps(summary))
        (evaluation / "outcomes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(outcomes)))
    return folder


@pytest.fixture(autouse=True)
def here(place: Path, monkeypatch) -> Path:
    monkeypatch.chdir(place)
    return place / "runs"


def test_a_training_gets_its_page(here: Path) -> None:
    main(["run=s/pprl"])
    page = parse(here / "s/pprl/report.html")
    assert not page.elsewhere and page.viewport and page.tables_outside == 0
    for text in ("reward", "kl", "goal 0", "scene: scene 1", "step-000003.png", "run: s/pprl\n", "0.75"):
        assert text in page.texts, text
    assert page.tags.count("svg") == 3 and page.tags.count("img") == 4 + 2


def test_an_evaluation_gets_its_page(here: Path) -> None:
    main(["run=s/eval/base"])
    page = parse(here / "s/eval/base/report.html")
    assert not page.elsewhere and "s/eval/base" in page.texts and "0.667" in page.texts


def test_a_story_keeps_its_summary_and_shows_its_trainings(here: Path, caplog) -> None:
    with caplog.at_level("INFO"):
        main(["run=s"])
    summary = json.loads((here / "s/summary.json").read_text())
    assert set(summary) == {"seconds", "systems"} and set(summary["systems"]) == {"base", "merged", "other"}
    evaluation = json.loads((here / "s/eval/base/evaluation.json").read_text())
    assert summary["systems"]["base"] == evaluation and summary["seconds"] == {"total": 0}
    page = parse(here / "s/report.html")
    assert not page.elsewhere and page.viewport and page.tables_outside == 0
    assert {"PPRL: reward", "pprl: metrics", "pprl: rollouts", "base", "merged"} <= set(page.texts)
    assert "pass rate" in caplog.text and "report.html" in caplog.text


def test_evaluations_are_compared_in_all_three_forms(here: Path, caplog) -> None:
    with caplog.at_level("INFO"):
        main(["runs=[s/eval/base,runs/s/eval/merged]"])
    found = json.loads((here / "report/comparison.json").read_text())
    assert list(found["systems"]) == ["s/eval/base", "s/eval/merged"]
    difference = found["differences"]["s/eval/merged - s/eval/base"]
    assert difference["pass_rate"]["difference"] == pytest.approx(6 / 12 - 8 / 12) and difference["prompts"] == 12
    assert set(difference["tags"]) == {"single", "two"} and set(difference["rounds"]) == {"1"}
    assert found["systems"]["s/eval/base"]["steps"] == 4
    page = parse(here / "report/comparison.html")
    assert not page.elsewhere and page.viewport and "s/eval/merged" in page.texts
    assert "s/eval/merged - s/eval/base" in caplog.text and "Wilson" in caplog.text


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["run=none"], "runs/none: neither metrics.jsonl nor evaluation.json nor eval/*/evaluation.json is there"),
        ([], "runs/report: neither metrics.jsonl"),
        (["runs=[s/pprl]"], "runs/s/pprl/outcomes.jsonl: not found; name runs of recipes/evaluate.py"),
        (["runs=[s/eval/base,s/eval/base]"], "a run is named twice"),
        (["runs=[s/eval/base,s/eval/other]"], "s/eval/other: prompt 'eval-0' is another one than in s/eval/base"),
    ],
)
def test_bad_input_is_one_line(here: Path, capsys, overrides: list[str], message: str) -> None:
    with pytest.raises(SystemExit) as end:
        main(["run=report", *overrides])
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert end.value.code == 1 and len(lines) == 1 and message in lines[0], lines
