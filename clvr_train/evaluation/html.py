"""Pages in one HTML file that open anywhere, on a phone too, without a network: their parts, and the usual order."""

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from PIL.Image import Image

from clvr_train.data.images import ImageError, open_image
from clvr_train.evaluation.plots import STYLE, Points, curve
from clvr_train.method.trajectory import Trajectory
from clvr_train.runtime.files import write_atomic

_STYLE = """
:root { color-scheme: light dark; --line: #8886; --soft: #8882; --ink: #2a6fdb; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 0 auto; padding: 1rem; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2rem; } h3 { font-size: 1rem; margin: 0; }
h4 { font-size: 1rem; margin: 1rem 0 .4rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: Canvas; }
@media (max-width: 40rem) { th:first-child, td:first-child { white-space: normal; min-width: 7rem; } }
.wide + .curves { margin-top: 1rem; }
figure { margin: 0; }
figcaption, .quiet { font-size: .85rem; opacity: .8; }
article { border: 1px solid var(--line); border-radius: .4rem; padding: .8rem; margin: 1rem 0; }
summary { cursor: pointer; font-weight: 600; margin: .6rem 0; }
pre { overflow: auto; max-height: 30rem; font-size: .85rem; background: var(--soft); padding: .6rem; }
.lines { white-space: pre-line; }
.rounds { display: flex; flex-wrap: wrap; gap: 1rem; margin-top: .6rem; }
.rounds > div { flex: 1 1 9rem; max-width: 18rem; }
img { width: 100%; max-width: 12rem; border: 1px solid var(--line); }
img.small { image-rendering: pixelated; }
img.grid { max-width: 100%; width: auto; }
"""
PICTURE_PX, GRID_PX = 768, 1600  # longest sides of pictures in a page
SMALL_PX = 128  # whose pixels are shown as squares


def write_report(
    path: Path,
    *,
    title: str,
    summary: dict[str, Any],
    curves: Mapping[str, Points | Mapping[str, Points]],
    galleries: Sequence[dict[str, Any]],
    notes: Sequence[str] = (),
    sections: Sequence[tuple[str, str]] = (),
) -> None:
    """Write the report; every text is escaped, every image is inside the file.

    Args:
        summary: as in `summary.json`: `systems` (name -> `pass_rate, ci95, mean_score, n, steps, cfg,
            mode, tags`) and `seconds` (stage -> seconds); a value that is missing shows as a dash.
        curves: title -> points (x, y), or name -> points for several curves in one frame; points that are not finite
            are left out.
        galleries: trajectories: `title`, `subtitle` and `rounds`, each with `text`, `image`
            (PIL or None) and `caption`.
        notes: paragraphs for the end.
        sections: heading and HTML (made by this module's functions, so escaped), before the notes.

    Raises:
        FileNotFoundError: the folder of `path` is missing.
    """
    body = [f"<h1>{escape(title)}</h1>"]
    if summary.get("systems"):
        body += ["<h2>Systems</h2>", _systems(summary["systems"])]
    if curves:
        body += ["<h2>Curves</h2>", figures(curves)]
    if galleries:
        body += ["<h2>Trajectories</h2>", *(_gallery(gallery) for gallery in galleries)]
    if summary.get("seconds"):
        rows = [[name, f"{seconds:,.0f} s"] for name, seconds in summary["seconds"].items()]
        body += ["<h2>Time</h2>", table(["stage", "time"], rows)]
    for heading, content in sections:
        body += [f"<h2>{escape(heading)}</h2>", content]
    body += [f"<p>{escape(note)}</p>" for note in notes]
    page = (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{_STYLE}{STYLE}</style></head>\n<body>\n{chr(10).join(body)}\n</body></html>\n"
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
    return table(head, rows)


def _rate(tag: Any) -> float | None:
    """A tag holds its pass rate, alone or beside its count."""
    return tag.get("pass_rate") if isinstance(tag, dict) else tag


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _text(value: Any) -> str:
    return "–" if value is None else str(value)


def figures(curves: Mapping[str, Points | Mapping[str, Points]]) -> str:
    """Curves side by side, as many as there is room for."""
    return f'<div class="curves">{"".join(curve(name, points) for name, points in curves.items())}</div>'


def details(heading: str, content: str, *, shown: bool = False) -> str:
    """What opens at a click; `content` is HTML."""
    return f"<details{' open' if shown else ''}><summary>{escape(heading)}</summary>{content}</details>"


def listing(text: str) -> str:
    """A text as it stands."""
    return f"<pre>{escape(text)}</pre>"


def lines(text: str) -> str:
    """A paragraph that keeps its line breaks."""
    return f'<p class="lines">{escape(text)}</p>'


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of texts, in a box of its own that scrolls where the screen is narrow."""
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    lines = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    table = f"<table><thead><tr>{top}</tr></thead><tbody>{lines}</tbody></table>"
    return f'<div class="wide">{table}</div>'


def trajectory_gallery(trajectory: Trajectory, note: str = "") -> dict[str, Any]:
    """A trajectory as one of the `galleries` of a report."""
    rounds = [
        {"text": s.reasoning, "image": open_image(s.image) if s.image is not None else None, "caption": s.action}
        for s in trajectory.steps
    ]
    return {"title": trajectory.goal, "subtitle": note, "rounds": rounds}


def _gallery(gallery: dict[str, Any]) -> str:
    rounds = [
        (each.get("image"), each.get("caption", ""), f"<p>{escape(each.get('text', ''))}</p>")
        for each in gallery["rounds"]
    ]
    subtitle = f'<div class="quiet">{escape(gallery.get("subtitle", ""))}</div>'
    return f"<article><h3>{escape(gallery['title'])}</h3>{subtitle}{pictures(rounds)}</article>"


def pictures(items: Sequence[tuple[Image | None, str, str]], longest_px: int = PICTURE_PX) -> str:
    """Pictures side by side: each None or an image, its caption, and HTML beneath."""
    inside = "".join(f"<div>{_image(image, caption, longest_px)}{below}</div>" for image, caption, below in items)
    return f'<div class="rounds">{inside}</div>'


def grid(file: Path) -> str:
    """A picture of a run in full width, made smaller beyond GRID_PX; what cannot be shown says why in its place."""
    try:
        image = open_image(file)
    except ImageError as error:
        return f'<p class="quiet">{escape(str(error))}</p>'
    return _image(image, file.name, GRID_PX, "grid")


def _image(image: Image | None, caption: str, longest_px: int, kind: str = "") -> str:
    text = f"<figcaption>{escape(caption)}</figcaption>"
    if image is None:
        return f"<figure>{text}</figure>"
    kind = kind or ("small" if max(image.size) <= SMALL_PX else "")
    form, options = "PNG", {}
    if max(image.size) > longest_px:  # of a size for photographs, of which a PNG would be large
        image = image.convert("RGB")
        image.thumbnail((longest_px, longest_px))
        form, options = "WEBP", {"quality": 85}
    buffer = io.BytesIO()
    image.save(buffer, format=form, **options)
    source = f"data:image/{form.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return f'<figure><img class="{kind}" alt="{escape(caption)}" src="{source}">{text}</figure>'
