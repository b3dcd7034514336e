"""What PPO optimised next to what it never saw, over the root of KL, as Gao et al. 2022 draw over-optimisation."""

import math
from collections.abc import Iterable

from stages.config.evaluation import REWARD_SUITE
from stages.config.graph import aligned_models
from stages.reporting.figures import Figure, figure_data
from stages.reporting.line_plot import Series, line_plot
from stages.reporting.names import name_of, start_of
from stages.reporting.story import Story

_PROXY, _GOLD, _KL = "eval/score", "eval/gold_score", "eval/kl"
"""Keys of a history: scores of answers to held-out prompts, and how far the policy is from its start."""
GOLD_SUITE = "gold"
_ROOT = "root of KL"

Points = tuple[tuple[float, float], ...]


def figures(story: Story) -> list[Figure]:
    """One figure for each aligned model whose history or evaluation has a gold scorer."""
    found = []
    for spec in aligned_models():
        name = name_of(spec.role, story)
        of_history = _of_history(spec.role, story)
        # One evaluation, at the end of a training, is less than the two points of `evaluate`.
        is_curve = of_history is not None and len(of_history[1]) > 1
        series = of_history if is_curve else _of_evaluation(spec.role, story) or of_history
        if series is not None:
            found.append(_figure(f"{name}: proxy and gold over the root of KL", *series))
    return [figure for figure in found if figure is not None]


def _of_history(role: str, story: Story) -> tuple[Points, Points] | None:
    """While it trained: on held-out prompts, at every evaluation."""
    history = story.histories.get(role) or []
    rows = [row for row in history if row.get(_KL) is not None and row.get(_GOLD) is not None]
    proxy = _points((row[_KL], row.get(_PROXY)) for row in rows)
    gold = _points((row[_KL], row[_GOLD]) for row in rows)
    return (proxy, gold) if gold else None


def _of_evaluation(role: str, story: Story) -> tuple[Points, Points] | None:
    """Start and end only: the start is at KL 0."""
    kl = story.metrics_of(role).get(_KL)
    start = start_of(role, story)
    if kl is None or not start or GOLD_SUITE not in story.evaluation.suites:
        return None

    def ends(suite: str) -> Points:
        roles = story.evaluation.suites[suite].roles if suite in story.evaluation.suites else {}
        values = [(0.0, roles[start].value if start in roles else None)]
        values.append((kl, roles[role].value if role in roles else None))
        return _points(values)

    gold = ends(GOLD_SUITE)
    return (ends(REWARD_SUITE), gold) if len(gold) == 2 else None


def _points(pairs: Iterable[tuple[float, float | None]]) -> Points:
    """A KL that sampling made negative is none."""
    found = ((math.sqrt(max(kl, 0.0)), value) for kl, value in pairs if value is not None)
    return tuple(sorted(found))


def _figure(title: str, proxy: Points, gold: Points) -> Figure | None:
    series = [Series("reward model (proxy)", proxy, 1), Series("gold scorer", gold, 2)]
    drawn = [one for one in series if one.points]
    svg = line_plot(drawn, label=title, x_label=f"{_ROOT} (nats a response)")
    by_root: dict[float, dict[str, float]] = {}
    for one in drawn:
        for root, value in one.points:
            by_root.setdefault(root, {})[one.name] = value
    names = [one.name for one in drawn]
    rows = [(root, *(values.get(name) for name in names)) for root, values in sorted(by_root.items())]
    data = figure_data(title, (_ROOT, *names), rows)
    return Figure(title, svg, tuple((one.name, one.colour) for one in drawn), data) if svg else None
