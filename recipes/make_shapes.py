"""Writes trajectories of the shapes world: ShareGPT conversations and images, the format that real data uses (CLVR
3.1).

Writes <out>/{trajectories.jsonl, images/}.
"""

import logging
from pathlib import Path

from omegaconf import DictConfig
from tqdm import tqdm

from clvr_train.data.sharegpt import write_trajectories
from clvr_train.shapes.controller import make_trajectories
from recipes._recipe import recipe

logger = logging.getLogger(__name__)


@recipe("make_shapes")
def main(cfg: DictConfig) -> None:
    trajectories = make_trajectories(cfg.num, seed=cfg.seed, split=cfg.split)
    count = write_trajectories(Path(cfg.out), tqdm(trajectories, desc="make_shapes", total=cfg.num))
    logger.info("%d trajectories in %s", count, cfg.out)


if __name__ == "__main__":
    main()
