"""Offline teacher: a judgeable proxy prompt for every step of every trajectory, stored beside them (CLVR 3.2).

Writes <data.folder>/{proxy_prompts.jsonl, rejected.jsonl}.
"""

import logging
from pathlib import Path

from omegaconf import DictConfig
from tqdm import tqdm

from clvr_train.data.refusals import Refusals
from clvr_train.proxy.prompts import write_proxy_prompts
from clvr_train.shapes.teacher import ShapesTeacher
from recipes._data import read_folder, truncated
from recipes._recipe import recipe

logger = logging.getLogger(__name__)
TEACHERS = {"shapes": ShapesTeacher}


@recipe("make_proxy_prompts")
def main(cfg: DictConfig) -> None:
    if cfg.teacher not in TEACHERS:
        raise ValueError(f"teacher={cfg.teacher!r} is not one of {', '.join(TEACHERS)}")
    folder = Path(cfg.data.folder)
    refusals = Refusals(folder, cfg.data.max_refused)
    samples = truncated(read_folder(folder, refusals, decode=False), folder)
    written, rejected = write_proxy_prompts(TEACHERS[cfg.teacher](), tqdm(samples, desc="make_proxy_prompts"), folder)
    logger.info("%d proxy prompts, %d contexts rejected, in %s", written, rejected, folder)


if __name__ == "__main__":
    main()
