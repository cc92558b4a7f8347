"""Collects what a story left under runs/<run>/ into summary.json and report.html, and prints the table of systems.

Reads eval/<system>/evaluation.json, the metrics.jsonl of the training runs, the trajectories of a closed loop and the
seconds of the stages; from these files alone, so it can be run again at any time.
"""

import json
import logging
from pathlib import Path

from omegaconf import DictConfig

from clvr_train.data.readers import read_trajectories
from clvr_train.evaluation.html import trajectory_gallery, write_report
from clvr_train.evaluation.runner import table
from clvr_train.runtime.files import write_atomic
from clvr_train.runtime.metrics import read_metrics
from recipes._recipe import recipe

logger = logging.getLogger(__name__)
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


@recipe("report")
def main(cfg: DictConfig) -> None:
    folder = Path("runs") / cfg.run
    files = sorted(folder.glob("eval/*/evaluation.json"), key=lambda path: path.stat().st_mtime)
    if not files:
        raise FileNotFoundError(f"{folder}/eval/*/evaluation.json: not found; run recipes/evaluate.py first")
    systems = {path.parent.name: json.loads(path.read_text()) for path in files}
    done = sorted(folder.glob(".done/*"), key=lambda path: path.stat().st_mtime)
    seconds = {path.name: int(path.read_text()) for path in done}
    clock = folder / ".seconds"  # of all attempts; stages run side by side, so their sum would say more
    total = int(clock.read_text()) if clock.exists() else sum(seconds.values())
    summary = {"seconds": {"total": total, **seconds}, "systems": systems}
    write_atomic(folder / "summary.json", json.dumps(summary, indent=2) + "\n")
    galleries = []
    for path in folder.glob("eval/*/trajectories.jsonl"):
        if path.stat().st_size == 0:  # the controller drew nothing
            continue
        rows = map(json.loads, (path.parent / "outcomes.jsonl").read_text().splitlines())
        galleries += gallery(path.parent, {row["id"]: row for row in rows}, cfg.galleries)
    if (folder / "data" / "trajectories.jsonl").exists():
        galleries += gallery(folder / "data", {}, cfg.galleries // 2)
    write_report(
        folder / "report.html",
        title=f"CLVR on {cfg.run}",
        summary=summary,
        curves=read_curves(folder),
        galleries=galleries,
        notes=["Pass rate: share of held-out goals that the reader finds fulfilled, with Wilson's 95 % interval."],
    )
    logger.info("%s\n\nsummary: %s\nreport:  %s", table(systems), folder / "summary.json", folder / "report.html")


if __name__ == "__main__":
    main()
