"""Line plots as small SVG drawn by hand: colours are CSS variables of the page (light and dark), text stays text, and a
plot weighs a few kilobytes. matplotlib would take a second to import and could do none of the three.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

_WIDTH, _HEIGHT = 380, 220
_LEFT, _RIGHT, _TOP, _BOTTOM = 50, 14, 12, 38
_MAX_POINTS = 300
_SMOOTH_FROM = 40
"""With more points than this the line is an exponential mean, and the measured values stay visible behind it."""


@dataclass(frozen=True)
class Series:
    """One line: `colour` is the number of a CSS variable `--series-N`."""

    name: str
    points: tuple[tuple[float, float], ...]
    colour: int = 1


def line_plot(series: Sequence[Series], *, label: str, x_label: str = "step") -> str:
    """Return an SVG, or an empty string when there is nothing finite to draw."""
    drawn = [cleaned for one in series if (cleaned := _finite(one)).points]
    if not drawn:
        return ""
    xs = [x for one in drawn for x, _ in one.points]
    ys = [y for one in drawn for _, y in one.points]
    x_scale = Scale.around(min(xs), max(xs), _LEFT, _WIDTH - _RIGHT, count=5, padded=False)
    y_scale = Scale.around(min(ys), max(ys), _HEIGHT - _BOTTOM, _TOP, count=5, padded=True)
    summary = f"{label}: " + "; ".join(
        f"{one.name} from {number(one.points[0][1])} to {number(one.points[-1][1])}" for one in drawn
    )
    return "\n".join(
        (
            f'<svg class="plot" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(summary)}">',
            *grid_lines(x_scale, y_scale, x_label),
            *(part for one in drawn for part in _draw(one, x_scale, y_scale)),
            "</svg>",
        )
    )


@dataclass(frozen=True)
class Scale:
    """From values to places on one axis, with round ticks."""

    low: float
    high: float
    start: float
    end: float
    ticks: tuple[float, ...]

    @staticmethod
    def around(low: float, high: float, start: float, end: float, *, count: int, padded: bool) -> "Scale":
        if low == high:
            low, high = low - (abs(low) or 1.0) / 2, high + (abs(high) or 1.0) / 2
        if padded:
            margin = (high - low) * 0.05
            low, high = low - margin, high + margin
        return Scale(low, high, start, end, _ticks(low, high, count))

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def _ticks(low: float, high: float, count: int) -> tuple[float, ...]:
    """Round numbers (1, 2 or 5 times a power of ten) inside the range."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
    first = math.ceil(low / step)
    return tuple(position * step for position in range(first, math.floor(high / step) + 1))


def _finite(series: Series) -> Series:
    points = [(x, y) for x, y in series.points if math.isfinite(x) and math.isfinite(y)]
    return Series(series.name, tuple(points), series.colour)


def _thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most _MAX_POINTS points, first and last included; each is a measured value."""
    if len(points) <= _MAX_POINTS:
        return list(points)
    stride = (len(points) - 1) / (_MAX_POINTS - 1)
    return [points[round(position * stride)] for position in range(_MAX_POINTS)]


def _smoothed(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Exponential mean over about a twentieth of the points, started at the first value."""
    weight = min(1.0, 20 / len(points))
    mean, out = points[0][1], []
    for x, y in points:
        mean += weight * (y - mean)
        out.append((x, mean))
    return out


def grid_lines(x_scale: Scale, y_scale: Scale, x_label: str) -> list[str]:
    """Axes, grid and labels of the plot area that all plots of two axes share."""
    right, floor = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM
    parts = [f'<path class="axis" d="M{_LEFT} {_TOP}V{floor}H{right}"/>']
    for tick in y_scale.ticks:
        y = y_scale(tick)
        parts.append(f'<path class="grid" d="M{_LEFT} {y:.1f}H{right}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">{number(tick)}</text>')
    for tick in x_scale.ticks:
        parts.append(f'<text x="{x_scale(tick):.1f}" y="{floor + 15}" text-anchor="middle">{number(tick)}</text>')
    parts.append(f'<text x="{(_LEFT + right) / 2}" y="{_HEIGHT - 4}" text-anchor="middle">{escape(x_label)}</text>')
    return parts


def _draw(series: Series, x_scale: Scale, y_scale: Scale) -> list[str]:
    style = f'style="stroke:var(--series-{series.colour})"'
    name = f"<title>{escape(series.name)}</title>"
    if len(series.points) == 1:
        x, y = series.points[0]
        dot = f'<circle cx="{x_scale(x):.1f}" cy="{y_scale(y):.1f}" r="3" style="fill:var(--series-{series.colour})">'
        return [f"{dot}{name}</circle>"]
    measured = _path(_thinned(series.points), x_scale, y_scale)
    if len(series.points) <= _SMOOTH_FROM:
        return [f'<path class="line" {style} d="{measured}">{name}</path>']
    mean = _path(_thinned(_smoothed(series.points)), x_scale, y_scale)
    return [
        f'<path class="line faint" {style} d="{measured}"/>',
        f'<path class="line" {style} d="{mean}">{name}</path>',
    ]


def _path(points: Sequence[tuple[float, float]], x_scale: Scale, y_scale: Scale) -> str:
    return "M" + "L".join(f"{x_scale(x):.1f} {y_scale(y):.1f}" for x, y in points)


def number(value: float | None, digits: int = 3) -> str:
    """A short, readable number: 1,234 and 0.00123 and 5e-05; a dash for what was not measured."""
    if value is None or not math.isfinite(value):
        return "–"
    if value == 0:
        return "0"
    if abs(value) >= 1000:
        return f"{value:,.0f}" if abs(value) < 1e9 else f"{value:.3g}"
    if value == int(value):
        return str(int(value))
    if abs(value) < 1e-3:
        return f"{value:.2g}"
    return f"{value:.{digits}g}"
