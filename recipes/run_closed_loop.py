"""Closed-loop inference: the controller reasons, looks and decides, the diffusion model draws (CLVR 3.3, A.8).

Writes runs/<run>/{config.yaml, trajectories.jsonl, images/, closed_loop.json, pages/}: the trajectories have the format
that training reads, the summary says for every goal why it ended and what it cost, and `pages/` shows each to people.
The same command again draws the goals that an interrupted one has not, and those whose controller gave no reply.
"""

from omegaconf import DictConfig

from recipes._build import build_budget
from recipes._closed_loop import draw_goals, read_goals
from recipes._recipe import recipe, run_folder


@recipe("run_closed_loop")
def main(cfg: DictConfig) -> None:
    build_budget(cfg)  # a bound that is none is known before anything is written
    goals = read_goals(cfg)
    draw_goals(cfg, run_folder(cfg), goals)


if __name__ == "__main__":
    main()
