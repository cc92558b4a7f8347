"""The report of a run: one HTML file that opens anywhere without a network."""

import base64
import io
import math
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from PIL.Image import Image

from clvr_train.data.images import open_image
from clvr_train.method.trajectory import Trajectory
from clvr_train.runtime.files import write_atomic

_STYLE = """
:root { color-scheme: light dark; --line: #8886; --soft: #8882; --ink: #2a6fdb; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2rem; } h3 { font-size: 1rem; margin: 0; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
.curves { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 20rem), 1fr)); gap: 1rem; }
figure { margin: 0; }
figcaption, .quiet { font-size: .85rem; opacity: .8; }
svg { width: 100%; height: auto; background: var(--soft); border-radius: .4rem; }
svg path { fill: none; stroke: var(--ink); stroke-width: 2; }
svg text { fill: currentColor; font-size: 11px; }
article { border: 1px solid var(--line); border-radius: .4rem; padding: .8rem; margin: 1rem 0; }
.rounds { display: flex; flex-wrap: wrap; gap: 1rem; margin-top: .6rem; }
.rounds > div { flex: 1 1 11rem; max-width: 18rem; overflow-wrap: anywhere; }
img { width: 100%; max-width: 12rem; image-rendering: pixelated; border: 1px solid var(--line); }
"""
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 400, 220, 52, 12, 12, 26  # px of a curve's drawing


def write_report(
    path: Path,
    *,
    title: str,
    summary: dict[str, Any],
    curves: dict[str, list[tuple[float, float]]],
    galleries: Sequence[dict[str, Any]],
    notes: Sequence[str] = (),
) -> None:
    """Write the report; every text is escaped, every image is inside the file.

    Args:
        summary: as in `summary.json`: `systems` (name -> `pass_rate, ci95, mean_score, n, steps, cfg,
            mode, tags`) and `seconds` (stage -> seconds); a value that is missing shows as a dash.
        curves: title -> points (x, y); points that are not finite are left out.
        galleries: trajectories: `title`, `subtitle` and `rounds`, each with `text`, `image`
            (PIL or None) and `caption`.
        notes: paragraphs for the end.

    Raises:
        FileNotFoundError: the folder of `path` is missing.
    """
    body = [f"<h1>{escape(title)}</h1>"]
    if summary.get("systems"):
        body += ["<h2>Systems</h2>", _systems(summary["systems"])]
    if curves:
        figures = "".join(_curve(name, points) for name, points in curves.items())
        body += ["<h2>Curves</h2>", f'<div class="curves">{figures}</div>']
    if galleries:
        body += ["<h2>Trajectories</h2>", *(_gallery(gallery) for gallery in galleries)]
    if summary.get("seconds"):
        rows = [[name, f"{seconds:,.0f} s"] for name, seconds in summary["seconds"].items()]
        body += ["<h2>Time</h2>", _table(["stage", "time"], rows)]
    body += [f"<p>{escape(note)}</p>" for note in notes]
    page = (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{_STYLE}</style></head>\n<body>\n{chr(10).join(body)}\n</body></html>\n"
    )
    write_atomic(Path(path), page)


def _systems(systems: dict[str, dict[str, Any]]) -> str:
    tags = list(dict.fromkeys(tag for system in systems.values() for tag in system.get("tags", {})))
    head = ["system", "pass rate", "95 % interval", "mean score", "goals", "steps", "CFG", "mode", *tags]
    rows = []
    for name, system in systems.items():
        interval = system.get("ci95")
        row = [
            name,
            _number(system.get("pass_rate")),
            "–" if interval is None else f"{_number(interval[0])} to {_number(interval[1])}",
            _number(system.get("mean_score")),
            *(_text(system.get(key)) for key in ("n", "steps", "cfg", "mode")),
            *(_number(_rate(system.get("tags", {}).get(tag))) for tag in tags),
        ]
        rows.append(row)
    return _table(head, rows)


def _rate(tag: Any) -> float | None:
    """A tag holds its pass rate, alone or beside its count."""
    return tag.get("pass_rate") if isinstance(tag, dict) else tag


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _text(value: Any) -> str:
    return "–" if value is None else str(value)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    lines = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    table = f"<table><thead><tr>{top}</tr></thead><tbody>{lines}</tbody></table>"
    return f'<div class="wide">{table}</div>'


def _curve(title: str, points: Sequence[tuple[float, float]]) -> str:
    caption = f"<figcaption>{escape(title)}</figcaption>"
    finite = [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]
    if not finite:
        return f'<figure>{caption}<p class="quiet">no values</p></figure>'
    xs, ys = zip(*finite, strict=True)
    (x0, x1), (y0, y1) = (min(xs), max(xs)), (min(ys), max(ys))
    across, up = (x1 - x0) or 1.0, (y1 - y0) or 1.0  # a single value is a flat line
    right, floor = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM
    places = (
        f"{_LEFT + (x - x0) / across * (right - _LEFT):.1f},{floor - (y - y0) / up * (floor - _TOP):.1f}"
        for x, y in finite
    )
    labels = (
        f'<text x="4" y="{_TOP + 10}">{y1:.3g}</text><text x="4" y="{floor}">{y0:.3g}</text>'
        f'<text x="{_LEFT}" y="{_HEIGHT - 8}">{x0:g}</text>'
        f'<text x="{right}" y="{_HEIGHT - 8}" text-anchor="end">{x1:g}</text>'
    )
    # A curve of one point is drawn as a dot: a line of no length with round ends.
    drawing = f'<path stroke-linecap="round" d="M{" L".join(places)}{" h0.1" if len(finite) == 1 else ""}"/>'
    box = f'viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(title)}"'
    return f"<figure>{caption}<svg {box}>{drawing}{labels}</svg></figure>"


def trajectory_gallery(trajectory: Trajectory, note: str = "") -> dict[str, Any]:
    """A trajectory as one of the `galleries` of a report."""
    rounds = [
        {"text": s.reasoning, "image": open_image(s.image) if s.image is not None else None, "caption": s.action}
        for s in trajectory.steps
    ]
    return {"title": trajectory.goal, "subtitle": note, "rounds": rounds}


def _gallery(gallery: dict[str, Any]) -> str:
    rounds = "".join(
        f"<div>{_image(each.get('image'), each.get('caption', ''))}"
        f"<p>{escape(each.get('text', ''))}</p></div>"
        for each in gallery["rounds"]
    )
    subtitle = f'<div class="quiet">{escape(gallery.get("subtitle", ""))}</div>'
    return (
        f'<article><h3>{escape(gallery["title"])}</h3>{subtitle}<div class="rounds">{rounds}</div></article>'
    )


def _image(image: Image | None, caption: str) -> str:
    text = f"<figcaption>{escape(caption)}</figcaption>"
    if image is None:
        return f"<figure>{text}</figure>"
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<figure><img alt="{escape(caption)}" src="data:image/png;base64,{data}">{text}</figure>'
