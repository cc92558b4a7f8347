"""Delta-space weight merge: base + distillation delta + alignment delta, transformer only (CLVR 3.4, A.1).

Writes runs/<run>/{config.yaml, merge.json, merge.html, model/}; `model/` is a diffusers folder that draws in few steps
without guidance, its README.md records the sources. With `alphas` every pair of weights is merged and scored on goals
of the shapes world first (sweep.json), and the best one is kept.
"""

import json
import logging
import shutil
from pathlib import Path

from omegaconf import DictConfig

from clvr_train.evaluation.html import write_report
from clvr_train.evaluation.runner import Goal, single_step, summarise, table
from clvr_train.models.klein import PRECISIONS, check_kind, publish_klein
from clvr_train.models.merge import Sources, merge_transformers, open_sources
from clvr_train.models.sampler import Sampler
from clvr_train.runtime.files import write_atomic
from clvr_train.shapes.benchmark import benchmark_goals, grade
from recipes._build import build_conditioner, build_klein, is_finished
from recipes._recipe import recipe, run_folder

logger = logging.getLogger(__name__)


def merge(cfg: DictConfig, sources: Sources, alphas: tuple[float, float], target: Path) -> dict:
    """Merges with a pair of weights (distillation, alignment) into a Klein folder; what merge.json says."""
    report = {
        "sources": {
            name: {"folder": str(getattr(cfg, name)), "sha256": part.sha256()}
            for name, part in sources.parts().items()
        },
        "alpha_distill": alphas[0],
        "alpha_align": alphas[1],
    }

    def write(folder: Path) -> None:
        dtype = None if cfg.precision is None else PRECISIONS[cfg.precision]
        report.update(merge_transformers(sources, *alphas, folder, dtype))
        card = f"# Merged Klein model\n\nDelta-space weight merge.\n\n```json\n{json.dumps(report, indent=2)}\n```\n"
        (folder.parent / "README.md").write_text(card, encoding="utf-8")

    publish_klein(Path(cfg.base), target, write, distilled=True)
    return report


def sweep(cfg: DictConfig, sources: Sources, run: Path) -> tuple[float, float]:
    """Scores every pair of `alphas`, writes sweep.json, and returns the pair with the best mean score."""
    goals = [Goal(f"{n}", *row) for n, row in enumerate(benchmark_goals(cfg.validation.num, seed=cfg.validation.seed))]
    rows, candidate = {}, run / "candidate"
    for pair in map(tuple, cfg.alphas):
        merge(cfg, sources, pair, candidate)
        klein = build_klein(cfg.model, "distilled", candidate)
        steps, guidance, batch = cfg.validation.steps, cfg.validation.cfg, cfg.validation.batch
        sampler = Sampler(build_conditioner(klein, cfg.model), steps=steps, cfg=guidance, batch=batch)
        outcomes, _ = single_step(sampler, goals, grade, cfg.validation.seed, batch)
        rows[pair] = summarise(outcomes, steps=steps, cfg=guidance, mode="single_step")
        shutil.rmtree(candidate)
    logger.info("%s", table({f"{d:g}, {a:g}": row for (d, a), row in rows.items()}))
    listed = [{"alpha_distill": d, "alpha_align": a, **row} for (d, a), row in rows.items()]
    write_atomic(run / "sweep.json", json.dumps(listed, indent=2) + "\n")
    return max(rows, key=lambda pair: rows[pair]["mean_score"])


def curves(report: dict) -> dict[str, list[tuple[float, float]]]:
    """Shifts and cosine over the depth of each kind of block, for the report's plots."""
    titles = {"shift_distill": "shift of the distillation", "shift_align": "shift of the alignment", "cosine": "cosine"}
    result: dict[str, list[tuple[float, float]]] = {}
    for block, values in report["blocks"].items():
        kind, _, depth = block.rpartition(".")
        for key, title in titles.items():
            result.setdefault(f"{kind}: {title}", []).append((int(depth), values[key]))
    return {title: sorted(points) for title, points in result.items()}


@recipe("merge_weights")
def main(cfg: DictConfig) -> None:
    if cfg.precision is not None and cfg.precision not in PRECISIONS:
        raise ValueError(f"precision={cfg.precision!r} is not one of {', '.join(PRECISIONS)}")
    if any(len(pair) != 2 for pair in cfg.alphas):
        raise ValueError(f"alphas={list(cfg.alphas)}: pairs are needed, [alpha_distill, alpha_align]")
    run = run_folder(cfg)
    if is_finished(run):
        return
    for folder, kind in ((cfg.base, "base"), (cfg.distilled, "distilled"), (cfg.aligned, "base")):
        check_kind(Path(folder), kind)
    sources = open_sources(Path(cfg.base), Path(cfg.distilled), Path(cfg.aligned), cfg.lora and Path(cfg.lora))
    alphas = sweep(cfg, sources, run) if cfg.alphas else (cfg.alpha_distill, cfg.alpha_align)
    shutil.rmtree(run / "candidate", ignore_errors=True)
    report = merge(cfg, sources, alphas, run / "merged")
    for name in ("shift_distill", "shift_align"):
        if report["total"][name] > cfg.max_shift:
            logger.warning(
                "%s is %.3f, above max_shift=%.3f: the merge is only valid while deltas are small", name,
                report["total"][name], cfg.max_shift,
            )  # fmt: skip
    write_atomic(run / "merge.json", json.dumps(report, indent=2) + "\n")
    write_report(run / "merge.html", title="Weight merge", summary={}, curves=curves(report), galleries=[])
    (run / "merged").rename(run / "model")  # last: it says that the run is finished
    total = report["total"]
    logger.info(
        "relative shifts: distillation %.3f, alignment %.3f; cosine of the deltas %.3f",
        total["shift_distill"], total["shift_align"], total["cosine"],
    )  # fmt: skip


if __name__ == "__main__":
    main()
