"""What a run has left (metrics.jsonl, rollouts.jsonl, PNGs, JSON) as parts of a page; nothing else is read."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from PIL.Image import Image

from clvr_train.data.images import ImageError, open_image
from clvr_train.evaluation.html import details, figures, grid, lines, listing, pictures, table
from clvr_train.evaluation.plots import Points

# The first that a name matches; together they hold every metric.
FAMILIES = {
    "Validation": r"val_|validation",
    "Reward": r"reward|part_|score|held_out|merged",
    "Loss": r"loss|mean_token_accuracy",
    "Policy": r"kl$|v_minus|v_norm|anchor|old_decay|sentinel|saturated|diversity|energy|advantage|r_",
    "Groups": r".*(groups|scores|share)$|flat$",
    "Judge": r"judge_",
    "Optimiser": r"grad_norm|lr$|skipped",
    "Data": r"refused|epoch|data_|items|samples|tokens|.*_cut",
    "Time and memory": r"seconds|time_|mfu|memory|nfe|.*_s$|.*_per_s$|.*_gib$|.*_bytes$",
    "Other": r"",
}
# Metrics that share a frame: its title, and the name of the curve.
TOGETHER = (
    (r"(?P<title>.*loss)_(?P<name>\d+)_references", "{} by number of references"),
    (r"(?P<title>.*loss)_t(?P<name>[\d.e-]+)", "{} by time"),
    (r"(?P<title>.*loss)_turn_(?P<name>\d+)", "{} by turn"),
    (r"(?P<title>.*)_(?P<name>q\d+)", "{}: quantiles"),
    (r"(?P<title>.*)_(?P<name>top\d+)", "{}: means of the best, in %"),
    (r"(?P<title>seconds|time)_(?P<name>.*)", "{} by phase"),
)
OPEN = ("Reward", "Loss", "Validation")  # families that are shown at first
NUM_GRIDS = 4  # of each kind of picture
NUM_EPOCHS = 3  # whose rollouts are shown
SMALL_PX = 256  # longest side of a rollout
MOST_BYTES = 200_000  # of a JSON file that is shown as it stands
GAP_PX = 2  # between the cells of a grid


def curves_of(rows: Sequence[Mapping[str, float]]) -> dict[str, dict[str, dict[str, Points]]]:
    """Family -> title -> name -> points, of the lines of a metrics.jsonl."""
    points: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        for name, value in row.items():
            if name != "step":
                points.setdefault(name, []).append((row["step"], value))
    return {
        family: {title: {name: points[metric] for metric, name in frame.items()} for title, frame in frames.items()}
        for family, frames in frames_of(points).items()
    }


def frames_of(metrics: Iterable[str]) -> dict[str, dict[str, dict[str, str]]]:
    """Family -> title of a frame -> metric -> the name of its curve there."""
    result: dict[str, dict[str, dict[str, str]]] = {family: {} for family in FAMILIES}
    for metric in metrics:
        family = next(family for family, pattern in FAMILIES.items() if re.match(pattern, metric))
        title, name = _frame(metric)
        result[family].setdefault(title, {})[metric] = name
    return {family: dict(sorted(frames.items())) for family, frames in result.items() if frames}


def _frame(metric: str) -> tuple[str, str]:
    for pattern, title in TOGETHER:
        match = re.fullmatch(pattern, metric)
        if match:
            return title.format(match["title"]), match["name"]
    return metric, ""


def curves_section(rows: Sequence[Mapping[str, float]]) -> str:
    """All curves by family, and the last value of every metric."""
    parts = [details(f"{family} ({len(frames)})", figures(frames), shown=family in OPEN)
             for family, frames in curves_of(rows).items()]  # fmt: skip
    last: dict[str, tuple[float, float]] = {}
    for row in rows:
        last |= {name: (row["step"], value) for name, value in row.items() if name != "step"}
    values = [[name, f"{value:.5g}", f"{step:g}"] for name, (step, value) in last.items()]
    return "".join(parts) + details("Last values", table(["metric", "value", "step"], values))


def grids_section(folder: Path) -> str:
    """The run's pictures, of each kind (`step-*.png`, `epoch-*.png`, others) the first, the last and some between."""
    kinds: dict[str, list[Path]] = {}
    for file in sorted([*folder.glob("*.png"), *folder.glob("samples/*.png")]):
        kinds.setdefault(re.sub(r"\d+", "", file.stem), []).append(file)
    return "".join(grid(file) for files in kinds.values() for file in spread(files, NUM_GRIDS))


def spread(items: Sequence[Any], number: int) -> list:
    """So many of the items, first and last among them, evenly between."""
    if len(items) <= number:
        return list(items)
    return [items[round(i * (len(items) - 1) / (number - 1))] for i in range(number)]


def files_section(folder: Path) -> str:
    """The run's config and its small JSON files as they stand."""
    files = [*folder.glob("config.yaml"), *sorted(folder.glob("*.json"))]
    return "".join(
        details(file.name, listing(file.read_text(encoding="utf-8", errors="replace")))
        for file in files if file.stat().st_size <= MOST_BYTES
    )  # fmt: skip


def read_rollouts(folder: Path) -> dict[int, list[list[dict]]]:
    """Epoch -> groups of the lines of rollouts.jsonl, of the epochs to show: some of those with a grid, else the last.

    Raises:
        ValueError: a line that is not the last one is damaged; names the file and the line.
    """
    path = folder / "rollouts.jsonl"
    grids = sorted(int(file.stem.removeprefix("epoch-")) for file in folder.glob("samples/epoch-[0-9]*.png"))
    chosen, last, epochs = set(spread(grids, NUM_EPOCHS)), 0, {}
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith("\n"):  # a kill, or a run that is writing it now
                break
            try:
                row = json.loads(line)
                epoch, k, _ = row["epoch"], row["k"], row["reward"]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path}:{number}: not a rollout with epoch, k and reward ({error!r})") from error
            if not grids and epoch > last:
                chosen, last, epochs = {epoch}, epoch, {}
            if epoch in chosen:
                groups = epochs.setdefault(epoch, [])
                if k == 0 or not groups:
                    groups.append([])
                groups[-1].append(row)
    return epochs


def rollouts_section(folder: Path, limit: int) -> str:
    """Of every epoch that is shown, its first `limit` groups: goal, reasoning, references, prompts, rollouts by reward.

    Raises: as `read_rollouts`.
    """
    epochs = read_rollouts(folder)
    parts = []
    for epoch, groups in sorted(epochs.items(), reverse=True):
        picture, reason = _grid_of(folder / "samples" / f"epoch-{epoch:05d}.png")
        cut = [(rows, _cells(rows, number, groups, picture)) for number, rows in enumerate(groups[:limit])]
        shown = "".join(_group(rows, cells) for rows, cells in cut)
        more = f"<p>{len(groups) - limit} groups more</p>" if len(groups) > limit else ""
        parts.append(details(f"Epoch {epoch}", reason + shown + more, shown=epoch == max(epochs)))
    return "".join(parts)


def _grid_of(file: Path) -> tuple[Image | None, str]:
    """The epoch's picture, or None and why in HTML."""
    if not file.exists():
        return None, ""
    try:
        return open_image(file), ""
    except ImageError as error:
        return None, f'<p class="quiet">{escape(str(error))}</p>'


def by_reward(rows: Sequence[Mapping]) -> list[int]:
    """The places of a group's rollouts, best reward first, those without one at the end."""
    return sorted(range(len(rows)), key=lambda place: -(rows[place]["reward"] or 0.0))


def _cells(rows: Sequence[Mapping], number: int, groups: Sequence[Sequence], picture: Image | None) -> dict:
    """Place of a rollout -> its picture, and `references` -> theirs, cut out of the grid of the epoch.

    Rows that say where they are (`cell`, `reference_cells`: x, y, width, height) are believed. Without, the grid has a
    row a group and a column a rollout, best first; where its size is not of that, nothing is cut.
    """
    if picture is None:
        return {"references": []}

    def cut(box: Sequence[int]) -> Image:
        x, y, width, height = box
        return picture.crop((x, y, x + width, y + height))

    if any("cell" in row for row in rows):
        found = {place: cut(row["cell"]) for place, row in enumerate(rows) if row.get("cell")}
        return found | {"references": [cut(box) for box in rows[0].get("reference_cells") or []]}
    columns = max(map(len, groups))
    if picture.width % columns or picture.height % len(groups):
        return {"references": []}
    width, height = picture.width // columns, picture.height // len(groups)
    size = width - GAP_PX, height - GAP_PX
    cells = {place: cut((column * width, number * height, *size)) for column, place in enumerate(by_reward(rows))}
    return cells | {"references": []}


def _group(rows: Sequence[Mapping], cells: Mapping) -> str:
    first = rows[0]
    goal, _, reasoning = (first.get("context") or "").partition("\n")
    heading = f"<h3>{escape(goal or str(first.get('trajectory')))}</h3>"
    quiet = f'<div class="quiet">{escape(str(first.get("trajectory")))}, step {first.get("step")}</div>'
    body = f"<h4>Reasoning</h4>{lines(reasoning)}" if reasoning else ""
    if cells["references"]:
        images = [(image, f"reference {n}", "") for n, image in enumerate(cells["references"], start=1)]
        body += f"<h4>References</h4>{pictures(images, SMALL_PX)}"
    prompts = [(name, first.get(key)) for name, key in (("scene", "p_t2i"), ("edit", "p_i2i")) if first.get(key)]
    if prompts:
        body += "<h4>Proxy prompt</h4>" + "".join(f"<p>{name}: {escape(text)}</p>" for name, text in prompts)
    body += f"<h4>Rollouts by reward</h4>{_rollouts(rows, cells)}"
    return f"<article>{heading}{quiet}{body}</article>"


def _rollouts(rows: Sequence[Mapping], cells: Mapping) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row.get("parts") or {}))
    order = by_reward(rows)
    cut = [(cells[place], f"{_number(rows[place]['reward'])}, k {rows[place]['k']}", "") for place in order
           if place in cells]  # fmt: skip
    columns = {"k": lambda row: str(row["k"]), "reward": lambda row: _number(row["reward"])}
    columns |= {name: lambda row, name=name: _number((row.get("parts") or {}).get(name)) for name in names}
    columns |= {"advantage": lambda row: _number(row.get("advantage")), "r": lambda row: _number(row.get("r"))}
    if any(row.get("missing") for row in rows):
        columns["missing"] = lambda row: row.get("missing") or ""
    values = [[column(rows[place]) for column in columns.values()] for place in order]
    said = [(rows[place]["k"], rows[place].get("transcript")) for place in order]
    words = "".join(f"<h4>k {k}</h4>{lines(text)}" for k, text in said if text)
    return (
        (pictures(cut, SMALL_PX) if cut else "")
        + table(list(columns), values)
        + (details("The judge's words", words) if words else "")
    )


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
