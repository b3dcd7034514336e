"""Values with their intervals, one line each, as small SVG: whether two of them differ is seen before it is read."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from stages.config.text import one_line
from stages.reporting.line_plot import Scale, number

_WIDTH, _LEFT, _RIGHT, _TOP, _LINE, _BOTTOM = 380, 136, 16, 10, 22, 24
_LONGEST_NAME = 18
_ACROSS = 6


@dataclass(frozen=True)
class Estimate:
    """One line of the plot."""

    name: str
    value: float
    low: float | None = None
    high: float | None = None
    colour: int = 1


def interval_plot(estimates: Sequence[Estimate], *, label: str, mark: float | None = None, mark_name: str = "") -> str:
    """Return an SVG with a dot and a line for each estimate, an empty string when there is nothing finite to draw.

    `mark` is a value to compare with, such as chance.
    """
    drawn = [one for one in estimates if math.isfinite(one.value)]
    if not drawn:
        return ""
    ends = [end for one in drawn for end in (one.value, one.low, one.high) if end is not None and math.isfinite(end)]
    ends += [] if mark is None else [mark]
    scale = Scale.around(min(ends), max(ends), _LEFT, _WIDTH - _RIGHT, count=4, padded=True)
    floor = _TOP + _LINE * len(drawn)
    summary = f"{label}: " + "; ".join(_spelled(one) for one in drawn)
    parts = [
        f'<svg class="plot" viewBox="0 0 {_WIDTH} {floor + _BOTTOM}" role="img" aria-label="{escape(summary)}">',
        f'<path class="axis" d="M{_LEFT} {floor}H{_WIDTH - _RIGHT}"/>',
    ]
    for tick in scale.ticks:
        parts.append(f'<path class="grid" d="M{scale(tick):.1f} {_TOP}V{floor}"/>')
        parts.append(f'<text x="{scale(tick):.1f}" y="{floor + 15}" text-anchor="middle">{number(tick)}</text>')
    if mark is not None:
        title = f"<title>{escape(mark_name)} {number(mark)}</title>"
        parts.append(f'<path class="mark" d="M{scale(mark):.1f} {_TOP}V{floor}">{title}</path>')
    for position, one in enumerate(drawn):
        parts += _draw(one, scale, _TOP + _LINE * (position + 0.5))
    return "\n".join((*parts, "</svg>"))


def _draw(one: Estimate, scale: Scale, y: float) -> list[str]:
    name = one_line(one.name)
    short = name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 1]}…"
    title = f"<title>{escape(_spelled(one))}</title>"
    parts = [f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{escape(short)}{title}</text>']
    if one.low is not None and one.high is not None and math.isfinite(one.low) and math.isfinite(one.high):
        low, high, cap = scale(one.low), scale(one.high), _ACROSS / 2
        caps = f"M{low:.1f} {y - cap:.1f}v{_ACROSS}M{high:.1f} {y - cap:.1f}v{_ACROSS}"
        path = f"M{low:.1f} {y:.1f}H{high:.1f}{caps}"
        parts.append(f'<path class="line" style="stroke:var(--series-{one.colour})" d="{path}">{title}</path>')
    dot = f'<circle cx="{scale(one.value):.1f}" cy="{y:.1f}" r="4" style="fill:var(--series-{one.colour})">'
    parts.append(f"{dot}{title}</circle>")
    return parts


def _spelled(one: Estimate) -> str:
    between = "" if one.low is None or one.high is None else f" ({number(one.low)} to {number(one.high)})"
    return f"{one_line(one.name)} {number(one.value)}{between}"
