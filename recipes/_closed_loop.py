"""What recipes share that draw goals in closed loop: goals from a config, going on after an interruption, saving."""

import json
import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import transformers
from omegaconf import DictConfig
from tqdm import tqdm

from clvr_train.data.readers import load_trajectories
from clvr_train.data.records import shown
from clvr_train.data.sharegpt import FILE_NAME, write_trajectories
from clvr_train.evaluation.html import trajectory_gallery, write_report
from clvr_train.inference.closed_loop import Result, run_closed_loop
from clvr_train.inference.loop import checked_goal
from clvr_train.runtime.files import write_atomic
from recipes._build import build_budget, build_controller, build_loop

logger = logging.getLogger(__name__)
SAVE_EVERY_S = 30.0


def read_goals(cfg: DictConfig) -> list[tuple[str, str]]:
    """(id, text) of every goal that the config names.

    Raises:
        ValueError: there is none, one is no goal (`inference.loop.checked_goal`), or the file is no text.
    """
    texts = [(f"goals[{number}]", str(goal)) for number, goal in enumerate(cfg.goals)]
    if cfg.goals_file is not None:
        try:
            content = sys.stdin.buffer.read() if cfg.goals_file == "-" else Path(cfg.goals_file).read_bytes()
            lines = content.decode().splitlines()
        except UnicodeDecodeError as error:
            raise ValueError(f"{cfg.goals_file}: not a text file in UTF-8") from error
        texts += [(f"{cfg.goals_file}:{number}", line) for number, line in enumerate(lines, start=1)]
    goals = []
    for place, text in texts:
        try:
            goals += [checked_goal(text)] if text.strip() else []
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from error
    if not goals:
        raise ValueError("there is no goal; give goals=[...] or goals_file=...")
    return [(f"goal-{number:04d}", text) for number, text in enumerate(goals, start=1)]


def ended_before(run: Path, goals: list[tuple[str, str]]) -> dict[str, Result]:
    """Results of an earlier command on this run; not those whose controller gave no reply."""
    if not (run / "closed_loop.json").exists():
        return {}
    rows = json.loads((run / "closed_loop.json").read_text(encoding="utf-8"))
    drawn = {each.id: each for each in load_trajectories(run / FILE_NAME)} if any(r["images"] for r in rows) else {}
    results = {}
    for row in rows:
        if row["goal"] != dict(goals).get(row["id"]):
            raise ValueError(f"{run}: {row['id']} was another goal, {shown(row['goal'])}; choose another run=...")
        if not row["stop_reason"].startswith("controller: "):
            facts = row["stop_reason"], row["nfe"], tuple(row["turn_seconds"])
            results[row["id"]] = Result(drawn.get(row["id"]), *facts)
    return results


def save(run: Path, goals: list[tuple[str, str]], results: dict[str, Result]) -> None:
    """Writes trajectories and summary of the goals that have ended."""
    ended = [(name, text, results[name]) for name, text in goals if name in results]
    facts = {name: {"closed_loop": result.facts()} for name, _, result in ended}
    write_trajectories(run, [r.trajectory for _, _, r in ended if r.trajectory is not None], facts)
    rows = [{"id": name, "goal": text, **result.facts()} for name, text, result in ended]
    write_atomic(run / "closed_loop.json", json.dumps(rows, indent=2, ensure_ascii=False) + "\n")


def write_page(run: Path, name: str, goal: str, result: Result) -> None:
    note = "{stop_reason}: {images} images, {nfe} network evaluations, {seconds} s".format(**result.facts())
    galleries = [trajectory_gallery(result.trajectory, note)] if result.trajectory else []
    page = run / "pages" / f"{name}.html"
    write_report(page, title=goal, summary={}, curves={}, galleries=galleries, notes=[note])


def draw_goals(cfg: DictConfig, run: Path, goals: Sequence[tuple[str, str]]) -> tuple[dict[str, Result], int]:
    """Draws the goals that an earlier command on this run has not, and saves all; results by id, and the network
    evaluations of an image.
    """
    goals, budget = list(goals), build_budget(cfg)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    results = ended_before(run, goals)
    to_do = [(name, text) for name, text in goals if name not in results]
    loop = build_loop(cfg, build_controller(cfg.controller))
    (run / "pages").mkdir(exist_ok=True)
    saved = time.monotonic()

    def keep(name: str, result: Result) -> None:
        nonlocal saved
        results[name] = result
        write_page(run, name, dict(goals)[name], result)
        if time.monotonic() - saved > SAVE_EVERY_S:
            save(run, goals, results)
            saved = time.monotonic()

    with tqdm(total=len(goals), initial=len(results), desc=cfg.run) as bar:
        draw, options = loop.sampler.draw, loop.options
        try:
            run_closed_loop(loop.controller, draw, to_do, budget=budget, active=cfg.active, on_done=bar.update,
                            on_result=keep, **options)  # fmt: skip
        finally:
            if results:
                save(run, goals, results)
    drawn = sum(result.trajectory is not None for result in results.values())
    logger.info("%d of %d goals drawn, in %s", drawn, len(goals), run)
    lost = [result.stop_reason for result in results.values() if result.stop_reason.startswith("controller: ")]
    if lost:
        logger.warning("%d goals got no reply (%s); the same command again draws them", len(lost), lost[0])
    return results, loop.sampler.nfe_per_image
