"""Writes trajectories of the shapes world: ShareGPT conversations and images, the format that real data uses (CLVR
3.1).

Writes runs/<run>/{config.yaml, trajectories.jsonl, images/}. The benchmark's goals are of a third split, which no
trajectory is written for.
"""

import logging

from omegaconf import DictConfig
from tqdm import tqdm

from clvr_train.data.sharegpt import write_trajectories
from clvr_train.shapes.controller import Habits, ScriptedController, make_trajectories
from recipes._recipe import recipe, run_folder

logger = logging.getLogger(__name__)
SPLITS = ("train", "rl")


@recipe("make_shapes")
def main(cfg: DictConfig) -> None:
    if cfg.split not in SPLITS:
        raise ValueError(f"split={cfg.split!r} is not one of {', '.join(SPLITS)}")
    controller = ScriptedController(Habits(**cfg.habits))
    run = run_folder(cfg)
    trajectories = make_trajectories(cfg.num, seed=cfg.seed, split=cfg.split, controller=controller)
    count = write_trajectories(run, tqdm(trajectories, desc="make_shapes", total=cfg.num))
    logger.info("%d trajectories in %s", count, run)


if __name__ == "__main__":
    main()
