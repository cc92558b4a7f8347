"""Outside benchmarks for `evaluate`: pictures in the layout of the scorer, then scorer or judge, then numbers."""

import json
import logging
from collections.abc import Callable
from pathlib import Path

from omegaconf import DictConfig

from clvr_train.evaluation import echo4o, geneval, prism, wise
from clvr_train.evaluation.checkout import Asked, Benchmark, Item, Verdicts
from clvr_train.evaluation.drawing import Draw, draw_pictures, is_picture, read_facts, write_beside
from clvr_train.evaluation.judging import judge_pictures
from clvr_train.evaluation.scores import outcome_rows, summarise_benchmark
from clvr_train.evaluation.script import score_by_script
from clvr_train.runtime.distributed import World
from clvr_train.runtime.files import write_atomic
from clvr_train.services.chat import ChatClient
from clvr_train.services.options import ChatOptions, checked_url, key_of

logger = logging.getLogger(__name__)
NO_URL = "http://127.0.0.1:1/v1"  # of a scorer that asks no judge
_OPTIONS = ("url", "model", "key_env", "limit", "attempt_s", "deadline_s", "retries", "backoff_s", "max_tokens")
_OPTIONS += ("breaker", "cooldown_s")
# Play no part in the pictures: a run that has them may be scored in another way.
MAY_CHANGE = tuple(f"judge.{name}" for name in (*_OPTIONS, "extra"))
MAY_CHANGE += ("benchmark.scorer", "benchmark.python", "benchmark.args", "benchmark.env")


def build_benchmark(cfg: DictConfig) -> Benchmark:
    """The benchmark of a `benchmark` group other than shapes, and whether it can be scored as asked.

    Raises:
        OSError, ValueError: its checkout lacks something or is none; there is no such scorer; the judge is not named.
    """
    chosen = cfg.benchmark
    root = Path(chosen.root).expanduser().resolve()
    loaders: dict[str, Callable[[], Benchmark]] = {
        "geneval": lambda: geneval.load(root, chosen.samples),
        "geneval_pp": lambda: echo4o.load_geneval_pp(root),
        "imaginebench": lambda: echo4o.load_imaginebench(root),
        "prism": lambda: prism.load(root, chosen.language),
        "wise": lambda: wise.load_legacy(root),
        "wise_verified": lambda: wise.load_verified(root),
    }
    if chosen.name not in loaders:
        raise ValueError(f"benchmark.name={chosen.name!r} is not one of shapes, {', '.join(loaders)}")
    benchmark = loaders[chosen.name]()
    if chosen.scorer not in ("script", "judge"):
        raise ValueError(f"benchmark.scorer={chosen.scorer!r} is not one of script, judge")
    if chosen.scorer == "judge" and benchmark.judging is None:
        raise ValueError(f"benchmark.scorer=judge: {benchmark.name} has no judge, only a script")
    if benchmark.judging is not None:
        if cfg.judge.url is None:
            raise ValueError(f"judge.url=... is needed: {benchmark.name} is scored by {benchmark.judging.model}")
        checked_url(cfg.judge.url)
        key_of(cfg.judge.key_env)
    return benchmark


def draw_benchmark(benchmark: Benchmark, run: Path, world: World, draw: Draw, batch: int) -> None:
    """This rank's share of the pictures, in `run`/images; returns once all ranks have drawn theirs."""
    images = run / "images"
    images.mkdir(exist_ok=True)
    if world.first:
        write_beside(benchmark.beside, images)
    world.phase = "drawing"
    draw_pictures(benchmark.items, images, run, world, draw, batch)
    world.barrier()


def score_benchmark(cfg: DictConfig, benchmark: Benchmark, run: Path) -> None:
    """Scores the pictures of a run and writes outcomes.jsonl and evaluation.json.

    Raises:
        OSError, ValueError: the scorer or the judge failed; the same command goes on from there.
    """
    images = (run / "images").resolve()
    drawn = [item for item in benchmark.items if is_picture(images / item.file)]
    if cfg.benchmark.scorer == "judge":
        found, about = _by_judge(cfg, benchmark, drawn, images, run)
    else:
        found, about = _by_script(cfg, benchmark, images, run)
    verdicts = _complete(benchmark, drawn, found)
    facts = read_facts(run)
    about |= {"mode": cfg.mode, "steps": cfg.steps, "cfg": cfg.cfg, "seed": cfg.seed, "model": str(cfg.model.folder)}
    summary = summarise_benchmark(benchmark, verdicts, facts, **about)
    rows = outcome_rows(benchmark, verdicts, facts)
    write_atomic(run / "outcomes.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    write_atomic(run / "evaluation.json", json.dumps(summary, indent=2, ensure_ascii=False) + "\n")
    logger.info("%s: %s", cfg.run, headline(summary))


def headline(summary: dict) -> str:
    """The score in a line, with all that has to stand beside it."""
    score, se = summary["score"], summary["score_se"]
    words = [summary["benchmark"], "no score" if score is None else f"{score:.4f} (se {se:.4f})"]
    words.append(f"judge {summary['judge']}" if summary["judge"] else "by its own scorer")
    words.append(f"coverage {summary['coverage']:.3f} ({summary['n']} of {summary['num']} answers)")
    if summary["not_drawn"]:
        words.append(f"{summary['not_drawn']} not drawn, counted as 0")
    if summary.get("tags_without"):
        words.append(f"without {', '.join(summary['tags_without'])}")
    if "released_score" in summary:
        words.append(f"by the released scorer's rule {summary['released_score']:.4f}")
    return ", ".join(words)


def _by_judge(
    cfg: DictConfig, benchmark: Benchmark, drawn: list[Item], images: Path, run: Path
) -> tuple[Verdicts, dict]:
    judging = benchmark.judging
    options = {name: cfg.judge[name] for name in _OPTIONS}
    options["model"] = cfg.judge.model or judging.model
    options["max_tokens"] = cfg.judge.max_tokens or judging.max_tokens
    if options["model"] != judging.model:
        logger.warning(
            "judge.model=%s: published %s scores are of %s", options["model"], benchmark.name, judging.model
        )
    fields = {"temperature": 0} | (dict(judging.extra) if cfg.judge.extra else {})
    with ChatClient(ChatOptions(**options)) as client:
        found = judge_pictures(benchmark, drawn, images, run, client, fields)
    about = {"judge": options["model"], "published_judge": judging.model, "wording": judging.wording}
    return found, about | {"scorer": "judge"}


def _by_script(cfg: DictConfig, benchmark: Benchmark, images: Path, run: Path) -> tuple[Verdicts, dict]:
    judging = benchmark.judging
    model = cfg.judge.model or (judging.model if judging else "")
    asked = Asked(cfg.judge.url or NO_URL, model, key_of(cfg.judge.key_env) or "EMPTY", cfg.judge.limit)
    chosen = cfg.benchmark
    options = {"python": chosen.python, "args": list(chosen.args), "env": list(chosen.env)}
    found, judge = score_by_script(benchmark, images, (run / "scorer").resolve(), asked, **options)
    scorer = f"{benchmark.name}'s own script of {chosen.root}"
    return found, {"judge": judge, "published_judge": judging.model if judging else None, "scorer": scorer}


def _complete(benchmark: Benchmark, drawn: list[Item], found: Verdicts) -> Verdicts:
    """A verdict of every answer: 0 of what was not drawn, and missing of what the scorer says nothing of."""
    there = {item.id for item in drawn}
    keys = [(item.id, part) for item in benchmark.items for part in benchmark.parts]
    return {key: found.get(key, "the scorer says nothing of it") if key[0] in there else 0.0 for key in keys}
