"""Points with their intervals on two axes, as small SVG: the frontier of reward against KL."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from stages.config.text import one_line
from stages.reporting.line_plot import Scale, grid_lines, number

_WIDTH, _HEIGHT = 380, 220
_LEFT, _RIGHT, _TOP, _BOTTOM = 50, 14, 12, 38
COLOURS = 4
"""CSS variables `--series-1` and on; further clouds take them again, with squares for dots."""


@dataclass(frozen=True)
class Point:
    """One model; `low` and `high` are the ends of its interval on the vertical axis."""

    name: str
    x: float
    y: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Cloud:
    """The models of one method, and the line through their means, from the weakest pull to the strongest."""

    name: str
    points: tuple[Point, ...]
    line: tuple[tuple[float, float], ...] = ()

    @property
    def drawn(self) -> tuple[Point, ...]:
        return tuple(one for one in self.points if math.isfinite(one.x) and math.isfinite(one.y))


def colour_of(place: int) -> int:
    """The number of the CSS variable of the cloud at a place."""
    return place % COLOURS + 1


def scatter_plot(clouds: Sequence[Cloud], *, label: str, x_label: str, mark: float | None = None) -> str:
    """Return an SVG, an empty string when there is nothing finite to draw; `mark` is a height to compare with."""
    points = [point for cloud in clouds for point in cloud.drawn]
    if not points:
        return ""
    ends = [end for point in points for end in (point.y, *_interval(point))] + ([] if mark is None else [mark])
    xs = [0.0, *(point.x for point in points)]
    x_scale = Scale.around(min(xs), max(xs), _LEFT, _WIDTH - _RIGHT, count=5, padded=True)
    y_scale = Scale.around(min(ends), max(ends), _HEIGHT - _BOTTOM, _TOP, count=5, padded=True)
    spelled = "; ".join(f"{one_line(point.name)} at {number(point.x)}: {number(point.y)}" for point in points)
    parts = [
        f'<svg class="plot" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(f"{label}: {spelled}")}">',
        *grid_lines(x_scale, y_scale, x_label),
    ]
    if mark is not None:
        parts.append(f'<path class="mark" d="M{_LEFT} {y_scale(mark):.1f}H{_WIDTH - _RIGHT}"/>')
    for place, cloud in enumerate(clouds):
        parts += _draw(cloud, place, x_scale, y_scale)
    return "\n".join((*parts, "</svg>"))


def _interval(point: Point) -> tuple[float, ...]:
    low, high = point.low, point.high
    if low is None or high is None or not (math.isfinite(low) and math.isfinite(high)):
        return ()
    return low, high


def _draw(cloud: Cloud, place: int, x_scale: Scale, y_scale: Scale) -> list[str]:
    colour = f"var(--series-{colour_of(place)})"
    parts = []
    line = [(x, y) for x, y in cloud.line if math.isfinite(x) and math.isfinite(y)]
    if len(line) > 1:
        path = "L".join(f"{x_scale(x):.1f} {y_scale(y):.1f}" for x, y in line)
        parts.append(f'<path class="line faint" style="stroke:{colour}" d="M{path}"/>')
    for point in cloud.drawn:
        x, y = x_scale(point.x), y_scale(point.y)
        title = f"<title>{escape(one_line(point.name))}: {number(point.y)} at {number(point.x)}</title>"
        if ends := _interval(point):
            low, high = (y_scale(end) for end in ends)
            parts.append(f'<path class="line" style="stroke:{colour}" d="M{x:.1f} {low:.1f}V{high:.1f}">{title}</path>')
        if place < COLOURS:
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" style="fill:{colour}">{title}</circle>')
        else:
            square = f'x="{x - 3.5:.1f}" y="{y - 3.5:.1f}" width="7" height="7"'
            parts.append(f'<rect {square} style="fill:{colour}">{title}</rect>')
    return parts
