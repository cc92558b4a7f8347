"""Makes the saved view of a Weights & Biases project in which a run's metrics stand as in its report.

Reads the names in runs/<run>/metrics.jsonl and writes runs/<run>/wandb_workspace.json, what the server is sent; with
`upload=true` it is saved there (key from the environment: WANDB_API_KEY). Needs `pip install -e '.[workspace]'`.
"""

import json
import logging
from pathlib import Path

from omegaconf import DictConfig

from clvr_train.evaluation.run_page import frames_of
from clvr_train.runtime.files import write_atomic
from clvr_train.runtime.metrics import read_metrics
from recipes._recipe import recipe

logger = logging.getLogger(__name__)


def metric_sections(folder: Path) -> dict[str, dict[str, list[str]]]:
    """Family -> title of a plot -> the metrics in it, of all lines of a run's log."""
    names = dict.fromkeys(name for row in read_metrics(folder) for name in row if name != "step")
    return {family: {title: list(frame) for title, frame in frames.items()}
            for family, frames in frames_of(names).items()}  # fmt: skip


@recipe("wandb_workspace")
def main(cfg: DictConfig) -> None:
    folder = Path("runs") / cfg.run
    sections = metric_sections(folder)
    if cfg.upload and not cfg.entity:
        raise ValueError("upload=true needs entity=NAME, the user or team that has the project")
    try:
        from clvr_train.runtime.workspace import save, specification, workspace
    except ModuleNotFoundError as error:
        raise ValueError(f"{error.name}: not installed; pip install -e '.[workspace]'") from error
    view = workspace(cfg.project, cfg.entity or "entity", cfg.name, sections, list(cfg.media))
    file = folder / "wandb_workspace.json"
    write_atomic(file, json.dumps(specification(view), indent=2) + "\n")
    logger.info("%d plots in %d sections: %s", sum(map(len, sections.values())), len(sections), file)
    if cfg.upload:
        logger.info("saved: %s", save(view))


if __name__ == "__main__":
    main()
