"""Plots as inline SVG: no script, no font or style from elsewhere, colours that follow the page's."""

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape

Points = Sequence[tuple[float, float]]  # (x, y)
Interval = tuple[str, float, float, float]  # name, value, and the ends of its interval

STYLE = """
.curves { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 20rem), 1fr)); gap: 1rem; }
svg { width: 100%; height: auto; background: var(--soft); border-radius: .4rem; }
svg path, svg line { fill: none; stroke: var(--ink); stroke-width: 2; }
svg circle, svg .band { fill: var(--ink); stroke: none; } svg .band { opacity: .2; }
svg text { fill: currentColor; font-size: 11px; }
svg .rule { stroke: var(--line); stroke-width: 1; }
.c0 { --ink: #2a6fdb; } .c1 { --ink: #d1495b; } .c2 { --ink: #2a9d63; } .c3 { --ink: #b7791f; } .c4 { --ink: #8e5bd0; }
.c5 { --ink: #1b98a6; } .c6 { --ink: #8a8a8a; } .c7 { --ink: #c04fa0; }
.legend span { color: var(--ink); margin-right: .8em; }
"""
NUM_COLOURS = 8
MOST_POINTS = 400  # of a curve that are drawn; more are means of neighbours, with their range as a band
MOST_LETTERS = 40  # of a name in a plot
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 400, 220, 52, 12, 12, 26  # px of a curve's drawing
_ROW = 24  # px of a row of `intervals`


def curve(title: str, series: Points | Mapping[str, Points], *, dots: bool = False) -> str:
    """A figure of one curve, or of several by name in one frame; points that are not finite are left out.

    Args:
        dots: marks every point and draws no line between them.
    """
    named = {name: _finite(points) for name, points in _by_name(series).items()}
    named = {name: points for name, points in named.items() if points}
    caption = f"<figcaption>{escape(title)}</figcaption>"
    if not named:
        return f'<figure>{caption}<p class="quiet">no values</p></figure>'
    xs, ys = zip(*(point for points in named.values() for point in points), strict=True)
    (x0, x1), (y0, y1) = (min(xs), max(xs)), (min(ys), max(ys))
    across, up = (x1 - x0) or 1.0, (y1 - y0) or 1.0  # a single value is a flat line
    right, floor = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM

    def place(x: float, y: float) -> str:
        return f"{_LEFT + (x - x0) / across * (right - _LEFT):.1f},{floor - (y - y0) / up * (floor - _TOP):.1f}"

    drawn = [_dots(points, place) if dots else _line(points, place) for points in named.values()]
    inside = "".join(f'<g class="c{n % NUM_COLOURS}">{one}</g>' for n, one in enumerate(drawn))
    inside += (
        f'<text x="4" y="{_TOP + 10}">{y1:.3g}</text><text x="4" y="{floor}">{y0:.3g}</text>'
        f'<text x="{_LEFT}" y="{_HEIGHT - 8}">{x0:g}</text>'
        f'<text x="{right}" y="{_HEIGHT - 8}" text-anchor="end">{x1:g}</text>'
    )
    return f"<figure>{caption}{_svg(title, _HEIGHT, inside)}{_legend(named)}</figure>"


def intervals(title: str, rows: Sequence[Interval]) -> str:
    """A figure of values with their intervals, a row each, on one scale."""
    caption = f"<figcaption>{escape(title)}</figcaption>"
    rows = [row for row in rows if all(map(math.isfinite, row[1:]))]
    if not rows:
        return f'<figure>{caption}<p class="quiet">no values</p></figure>'
    low, high = min(row[2] for row in rows), max(row[3] for row in rows)
    low, high = (low - 0.5, high + 0.5) if low == high else (low, high)
    left, right, height = 12, _WIDTH - 12, 2 * _ROW * len(rows) + _ROW

    def x(value: float) -> str:
        return f"{left + (value - low) / (high - low) * (right - left):.1f}"

    inside = ""
    if low < 0 < high:
        inside += f'<line class="rule" x1="{x(0)}" y1="0" x2="{x(0)}" y2="{height - _ROW}"/>'
    for number, (name, value, lo, hi) in enumerate(rows):
        y = 2 * _ROW * number + 40
        label = f"{escape(_short(name))}: {value:.3f}"
        inside += (
            f'<g class="c{number % NUM_COLOURS}"><text x="{left}" y="{y - 16}">{label}</text>'
            f'<line x1="{x(lo)}" y1="{y}" x2="{x(hi)}" y2="{y}"/><circle cx="{x(value)}" cy="{y}" r="5"/></g>'
        )
    inside += (
        f'<text x="{left}" y="{height - 6}">{low:.3g}</text>'
        f'<text x="{right}" y="{height - 6}" text-anchor="end">{high:.3g}</text>'
    )
    return f"<figure>{caption}{_svg(title, height, inside)}</figure>"


def thinned(points: Points) -> list[tuple[float, float, float, float]]:
    """(x, mean, lowest, highest) of at most MOST_POINTS runs of neighbouring points, in order."""
    size = -(-len(points) // MOST_POINTS)
    parts = [points[start : start + size] for start in range(0, len(points), size)]
    means = [(part[-1][0], math.fsum(y for _, y in part) / len(part)) for part in parts]
    return [(x, y, min(p[1] for p in part), max(p[1] for p in part))
            for (x, y), part in zip(means, parts, strict=True)]  # fmt: skip


def _by_name(series: Points | Mapping[str, Points]) -> dict[str, Points]:
    return dict(series) if isinstance(series, Mapping) else {"": series}


def _finite(points: Points) -> list[tuple[float, float]]:
    return [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]


def _line(points: Points, place: Callable[[float, float], str]) -> str:
    """A curve of one point is drawn as a dot: a line of no length with round ends."""
    few = thinned(points)
    line = " L".join(place(x, y) for x, y, _, _ in few)
    band = ""
    if len(few) < len(points):
        edge = [place(x, high) for x, _, _, high in few] + [place(x, low) for x, _, low, _ in reversed(few)]
        band = f'<polygon class="band" points="{" ".join(edge)}"/>'
    return f'{band}<path stroke-linecap="round" d="M{line}{" h0.1" if len(few) == 1 else ""}"/>'


def _dots(points: Points, place: Callable[[float, float], str]) -> str:
    places = [place(x, y).split(",") for x, y in points]
    return "".join(f'<circle cx="{x}" cy="{y}" r="5"/>' for x, y in places)


def _svg(title: str, height: int, inside: str) -> str:
    return f'<svg viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="{escape(title)}">{inside}</svg>'


def _short(name: str) -> str:
    """As much of the end of a name as a plot is wide."""
    return name if len(name) <= MOST_LETTERS else f"…{name[-MOST_LETTERS:]}"


def _legend(names: Mapping[str, Points]) -> str:
    if list(names) == [""]:
        return ""
    spans = "".join(f'<span class="c{n % NUM_COLOURS}">{escape(name)}</span>' for n, name in enumerate(names))
    return f'<div class="quiet legend">{spans}</div>'
