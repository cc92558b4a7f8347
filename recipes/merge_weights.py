"""Delta-space weight merge: base + distillation delta + alignment delta, transformer only (CLVR 3.4, A.1).

Writes runs/<run>/{config.yaml, merge.json, model/}; `model/` is a diffusers folder that draws in few steps without
guidance, its README.md records the three sources.
"""

import json
import logging

from omegaconf import DictConfig

from clvr_train.models.klein import save_klein
from clvr_train.models.merge import file_hash, merge_transformers
from clvr_train.runtime.files import write_atomic
from recipes._build import build_klein, is_finished
from recipes._recipe import recipe, run_folder

logger = logging.getLogger(__name__)


@recipe("merge_weights")
def main(cfg: DictConfig) -> None:
    run = run_folder(cfg)
    if is_finished(run):
        return
    base = build_klein(cfg.model, "base", cfg.base)
    distilled = build_klein(cfg.model, "distilled", cfg.distilled)
    aligned = build_klein(cfg.model, "base", cfg.aligned)
    transformer, report = merge_transformers(
        base, distilled, aligned, alpha_distill=cfg.alpha_distill, alpha_align=cfg.alpha_align
    )
    for name in ("shift_distill", "shift_align"):
        if report["total"][name] > cfg.max_shift:
            logger.warning(
                "%s is %.3f, above max_shift=%.3f: the merge is only valid while deltas are small", name,
                report["total"][name], cfg.max_shift,
            )  # fmt: skip
    sources = {name: {"folder": str(part.folder), "sha256": file_hash(part)} for name, part in
               (("base", base), ("distilled", distilled), ("aligned", aligned))}  # fmt: skip
    alphas = {"alpha_distill": cfg.alpha_distill, "alpha_align": cfg.alpha_align}
    text = json.dumps({"sources": sources, **alphas, **report}, indent=2)
    write_atomic(run / "merge.json", text + "\n")  # before the model, which says that the run is finished
    save_klein(base.folder, transformer, run / "model", distilled=True)
    card = f"# Merged Klein model\n\nDelta-space weight merge.\n\n```json\n{text}\n```\n"
    write_atomic(run / "model" / "README.md", card)
    total = report["total"]
    logger.info(
        "relative shifts: distillation %.3f, alignment %.3f; cosine of the deltas %.3f",
        total["shift_distill"], total["shift_align"], total["cosine"],
    )  # fmt: skip


if __name__ == "__main__":
    main()
