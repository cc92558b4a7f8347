"""A page of one run, or a comparison of several evaluation runs; made of what they left, so at any time again.

`run=NAME` reads runs/NAME/. A training gets runs/NAME/report.html: curves of all metrics, rollouts by reward with what
they were drawn from and judged by, grids. A story, a folder of runs with eval/<system>/evaluation.json, gets
summary.json too, and its table of systems. `runs=[A,B,...]` compares evaluation runs on the same prompts: tables here,
runs/<run>/comparison.json and comparison.html.
"""

import json
import logging
from pathlib import Path

from omegaconf import DictConfig

from clvr_train.data.readers import read_trajectories
from clvr_train.evaluation.comparison import text, write_comparison
from clvr_train.evaluation.html import trajectory_gallery, write_report
from clvr_train.evaluation.run_page import curves_section, files_section, grids_section, rollouts_section
from clvr_train.evaluation.runner import table
from clvr_train.evaluation.runs import compare_runs, read_outcomes
from clvr_train.runtime.files import write_atomic
from clvr_train.runtime.metrics import read_metrics
from recipes._recipe import recipe

logger = logging.getLogger(__name__)
# Of a story: what its page shows of these runs first.
CURVES = {
    "sft": {"loss": "SFT of the DiT: loss"},
    "controller": {"loss": "SFT of the controller: loss"},
    "pprl": {
        "reward": "PPRL: reward",
        "loss": "PPRL: loss (tells nothing of progress)",
        "kl": "PPRL: distance to the SFT policy",
        "flat_groups": "PPRL: share of flat groups",
    },
}


def read_curves(folder: Path) -> dict[str, list[tuple[float, float]]]:
    """Title -> points, for every training run that is there."""
    curves = {}
    for run, titles in CURVES.items():
        if (folder / run / "metrics.jsonl").exists():
            rows = read_metrics(folder / run)
            for key, title in titles.items():
                curves[title] = [(row["step"], row[key]) for row in rows if key in row]
    return curves


def gallery(folder: Path, outcomes: dict[str, dict], limit: int) -> list[dict]:
    """Trajectories of a folder for the report, those with most rounds first."""
    trajectories = sorted(read_trajectories(folder), key=lambda t: -len(t.images))[:limit]
    result = []
    for t in trajectories:
        verdict = outcomes.get(t.id)
        note = "" if verdict is None else f"{'passes' if verdict['passed'] else 'fails'}, {len(t.images)} images"
        result.append(trajectory_gallery(t, note))
    return result


def trajectories_of(evaluation: Path, limit: int) -> list[dict]:
    """The gallery of an evaluation that drew trajectories."""
    file = evaluation / "trajectories.jsonl"
    if not file.exists() or file.stat().st_size == 0:  # the controller drew nothing
        return []
    return gallery(evaluation, {row["id"]: row for row in read_outcomes(evaluation)}, limit)


def training_sections(folder: Path, prefix: str, limit: int) -> list[tuple[str, str]]:
    """Heading and content for what a training run has left."""
    sections = [(f"{prefix}metrics", curves_section(read_metrics(folder)))]
    if (folder / "rollouts.jsonl").exists():
        sections.append((f"{prefix}rollouts", rollouts_section(folder, limit)))
    pictures = grids_section(folder)
    return sections + ([(f"{prefix}grids", pictures)] if pictures else [])


def report_story(folder: Path, evaluations: list[Path], cfg: DictConfig) -> None:
    """summary.json, report.html, and the table of systems."""
    systems = {path.parent.name: json.loads(path.read_text()) for path in evaluations}
    done = sorted(folder.glob(".done/*"), key=lambda path: path.stat().st_mtime)
    seconds = {path.name: int(path.read_text()) for path in done}
    clock = folder / ".seconds"  # of all attempts; stages run side by side, so their sum would say more
    total = int(clock.read_text()) if clock.exists() else sum(seconds.values())
    summary = {"seconds": {"total": total, **seconds}, "systems": systems}
    write_atomic(folder / "summary.json", json.dumps(summary, indent=2) + "\n")
    galleries = [one for path in evaluations for one in trajectories_of(path.parent, cfg.galleries)]
    if (folder / "data" / "trajectories.jsonl").exists():
        galleries += gallery(folder / "data", {}, cfg.galleries // 2)
    sections = []
    for path in sorted(folder.glob("*/metrics.jsonl")):
        sections += training_sections(path.parent, f"{path.parent.name}: ", cfg.galleries // 4)
    write_report(
        folder / "report.html",
        title=f"CLVR on {cfg.run}",
        summary=summary,
        curves=read_curves(folder),
        galleries=galleries,
        sections=sections,
        notes=["Pass rate: share of held-out goals that the reader finds fulfilled, with Wilson's 95 % interval."],
    )
    logger.info("%s\n\nsummary: %s\nreport:  %s", table(systems), folder / "summary.json", folder / "report.html")


def report_run(folder: Path, cfg: DictConfig) -> None:
    """report.html of a training run, or of an evaluation."""
    evaluation = folder / "evaluation.json"
    systems = {cfg.run: json.loads(evaluation.read_text())} if evaluation.exists() else {}
    if (folder / "metrics.jsonl").exists():
        sections = training_sections(folder, "", cfg.galleries)
    else:
        sections = [("grids", grids_section(folder))]
    sections.append(("Files", files_section(folder)))
    write_report(
        folder / "report.html",
        title=cfg.run,
        summary={"systems": systems},
        curves={},
        galleries=trajectories_of(folder, cfg.galleries),
        sections=[(heading.capitalize(), content) for heading, content in sections if content],
    )
    logger.info("report: %s", folder / "report.html")


def report_comparison(folder: Path, names: list[str]) -> None:
    """comparison.json, comparison.html, and the tables of any number of evaluation runs."""
    if len(set(names)) < len(names):
        raise ValueError(f"runs={names}: a run is named twice")
    folders = {name: Path("runs") / name for name in names}
    rows = {name: read_outcomes(path) for name, path in folders.items()}
    files = {name: path / "evaluation.json" for name, path in folders.items()}
    about = {name: json.loads(file.read_text()) for name, file in files.items() if file.exists()}
    comparison = compare_runs(rows, about)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / "comparison.json", json.dumps(comparison, indent=2) + "\n")
    write_comparison(folder / "comparison.html", comparison)
    logger.info("%s\n\n%s\n\n%s", text(comparison), comparison["method"], folder / "comparison.html")


@recipe("report")
def main(cfg: DictConfig) -> None:
    folder = Path("runs") / cfg.run
    if cfg.runs:
        report_comparison(folder, [str(name).removeprefix("runs/").rstrip("/") for name in cfg.runs])
        return
    evaluations = sorted(folder.glob("eval/*/evaluation.json"), key=lambda path: path.stat().st_mtime)
    if evaluations:
        report_story(folder, evaluations, cfg)
    elif (folder / "metrics.jsonl").exists() or (folder / "evaluation.json").exists():
        report_run(folder, cfg)
    else:
        raise FileNotFoundError(
            f"{folder}: neither metrics.jsonl nor evaluation.json nor eval/*/evaluation.json is there; "
            "run=NAME names a run to show, runs=[A,B] evaluation runs to compare"
        )


if __name__ == "__main__":
    main()
