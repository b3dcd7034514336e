"""What the report says about suites: every model on every suite with its interval, and who is better than whom.

All of it is read from metrics.json and promotion.json; nothing is computed here, so that page, approval and decision
cannot disagree. Evaluations of earlier releases have no suites, and then there is no section.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from stages.config.decision_table import ARROWS, HEAD, decision_rows
from stages.config.evaluation import CHAMPION_ROLE, ByReason, Compared, SuiteResult, SuiteScore
from stages.config.graph import spec_of_role, trained_stages
from stages.config.principles import Area
from stages.config.text import one_line
from stages.reporting.figures import Figure, figure_data
from stages.reporting.interval_plot import Estimate, interval_plot
from stages.reporting.line_plot import number
from stages.reporting.names import in_order, name_of, start_of
from stages.reporting.story import Story
from stages.reporting.tables import Cell, Table, code, num, shown, text

_COLOURS = 4
_NO_REASON = "none"
_LONGEST = 400
"""Characters of an answer in a table."""


@dataclass(frozen=True)
class SuiteView:
    """One suite: its figure, and what each model got."""

    name: str
    summary: str
    figure: Figure | None
    table: Table
    changes: Table | None = None


def suites_table(story: Story) -> Table | None:
    """All suites and all models in one table, each value with its 95 % interval."""
    suites = story.evaluation.suites
    roles = _roles(suites)
    if not roles:
        return None
    rows = [_row(name, suite, roles) for name, suite in suites.items()]
    head = ("suite", "metric", "chance", "items", *(name_of(role, story) for role in roles))
    notes = ["Each value with its 95 % interval, by a bootstrap over groups of items."]
    if any(suite.chance is not None for suite in suites.values()):
        notes.append("Green: the interval is better than chance.")
    champion = story.evaluation.champion
    if champion and champion.missing:
        notes.append(f"The champion was not measured: {champion.missing}.")
    return Table("Suites", head, tuple(rows), " ".join(notes))


def _row(name: str, suite: SuiteResult, roles: list[str]) -> tuple[Cell, ...]:
    cells = [_cell(suite.roles.get(role), suite) for role in roles]
    chance = "" if suite.chance is None else number(suite.chance)
    return (text(name), text(f"{suite.metric}{ARROWS[suite.better]}"), shown(chance), num(suite.items), *cells)


def _cell(score: SuiteScore | None, suite: SuiteResult) -> Cell:
    if score is None or score.value is None:
        return Cell("–", is_number=True)
    return Cell(number(score.value), is_number=True, is_best=suite.is_above_chance(score), detail=_interval(score))


def _interval(score: SuiteScore) -> str:
    return "" if score.low is None or score.high is None else f"{number(score.low)} to {number(score.high)}"


def reasons_table(story: Story) -> Table | None:
    """Accuracy on held-out pairs by what raters found the chosen reply better in; None where no pair has a reason."""
    found = story.evaluation.by_reason
    if not found:
        return None
    scores = {(one.suite, one.role, one.reason): one for one in found}
    reasons = [name for name in (*(area.value for area in Area), _NO_REASON) if any(name == key[2] for key in scores)]
    suites = dict.fromkeys(one.suite for one in found)
    rows = []
    for suite in suites:
        for role in in_order({one.role for one in found if one.suite == suite}):
            cells = [_by_reason(scores.get((suite, role, reason))) for reason in reasons]
            rows.append((text(name_of(role, story)), text(suite), *cells))
    head = ("model", "suite", *("no reason" if name == _NO_REASON else name for name in reasons))
    note = (
        "Share of the pairs that the model tells right, by the reason for which raters chose: a pair with two reasons "
        "counts in both. Each with its 95 % interval. Green: the interval is better than chance."
    )
    return Table("Held-out pairs by reason", head, tuple(rows), note)


def _by_reason(score: ByReason | None) -> Cell:
    if score is None:
        return Cell("–", is_number=True)
    between = f"{number(score.low)} to {number(score.high)}, {score.items} pairs"
    return Cell(number(score.value), is_number=True, is_best=score.low > 0.5, detail=between)


def _roles(suites: Mapping[str, SuiteResult]) -> list[str]:
    return in_order({role for suite in suites.values() for role in suite.roles})


def suite_views(story: Story) -> list[SuiteView]:
    """Every suite for itself."""
    return [_view(name, suite, story) for name, suite in story.evaluation.suites.items()]


def _view(name: str, suite: SuiteResult, story: Story) -> SuiteView:
    roles = in_order(suite.roles)
    rows = [_score_row(role, suite.roles[role], story) for role in roles]
    head = ("model", suite.metric or "value", "low", "high", "items", "skipped", "why")
    title = f"{name}: {suite.metric}{ARROWS[suite.better]}"
    estimates, numbers = [], []
    for position, role in enumerate(roles):
        score, model = suite.roles[role], name_of(role, story)
        if score.value is not None:
            estimates.append(Estimate(model, score.value, score.low, score.high, 1 + position % _COLOURS))
            numbers.append((model, score.value, score.low, score.high, score.items))
    svg = interval_plot(estimates, label=title, mark=suite.chance, mark_name="chance")
    data = figure_data(f"suite {name}", ("model", suite.metric or "value", "low", "high", "items"), numbers)
    chance = "" if suite.chance is None else f", chance {number(suite.chance)}"
    return SuiteView(
        name=name,
        summary=f"{suite.metric}{ARROWS[suite.better]}, {suite.items} items{chance}",
        figure=Figure(title, svg, (), data) if svg else None,
        table=Table(f"{name}, {suite.metric}", head, tuple(rows), f"Digest of items and settings: {suite.digest[:16]}"),
        changes=_changes(name, suite, story),
    )


def _changes(name: str, suite: SuiteResult, story: Story) -> Table | None:
    """The items that alignment changed most, gains first."""
    found = story.changes.get(name)
    if not found:
        return None
    after, before = name_of(story.changed, story), name_of(start_of(story.changed, story), story)
    with_text = any(one.response_before or one.response_after for one in found)
    rows = []
    for one in sorted(found, key=lambda one: one.before - one.after, reverse=suite.better == "lower"):
        gained = bool(suite.better) and (one.after > one.before) == (suite.better == "higher")
        value = Cell(number(one.after), is_number=True, is_best=gained, is_worst=bool(suite.better) and not gained)
        texts = [text(one_line(said, at_most=_LONGEST)) for said in (one.response_before, one.response_after)]
        rows.append((code(one.item), num(one.before), value, *(texts if with_text else ())))
    head = ("item", before, after, *((f"{before} said", f"{after} said") if with_text else ()))
    return Table(
        f"Items of {name} that changed most", head, tuple(rows), "All scores are in the evaluation's artifact."
    )


def _score_row(role: str, score: SuiteScore, story: Story) -> tuple[Cell, ...]:
    why = ", ".join(f"{reason} {count}" for reason, count in sorted(score.skipped.items()))
    values = (num(score.value), num(score.low), num(score.high), num(score.items), num(sum(score.skipped.values())))
    return (text(name_of(role, story)), *values, text(why or "–"))


def comparison_figures(story: Story) -> list[Figure]:
    """For each pair of models the differences by suite; those on another scale have a figure of their own."""
    pairs: dict[tuple[str, str], list[Compared]] = {}
    for one in story.evaluation.comparisons:
        pairs.setdefault((one.role, one.against), []).append(one)
    figures = []
    for (role, against), found in pairs.items():
        by_metric: dict[str, list[Compared]] = {}
        for one in found:
            suite = story.evaluation.suites.get(one.suite)
            by_metric.setdefault(suite.metric if suite else "", []).append(one)
        for metric, same in by_metric.items():
            title = f"{name_of(role, story)} minus {name_of(against, story)}: {metric or 'difference'}"
            figures.append(_difference_figure(title, same, story))
    return [figure for figure in figures if figure.svg]


def _difference_figure(title: str, found: list[Compared], story: Story) -> Figure:
    estimates = [Estimate(one.suite, one.difference, one.low, one.high, _verdict_colour(one, story)) for one in found]
    svg = interval_plot(estimates, label=title, mark=0.0, mark_name="no difference")
    data = figure_data(
        title,
        ("suite", "difference", "low", "high", "level", "p", "items", "clusters", "needed items"),
        [
            (one.suite, one.difference, one.low, one.high, one.level, one.p, one.items, one.clusters, one.needed_items)
            for one in found
        ],
    )
    return Figure(title, svg, (), data)


def _gain(one: Compared, story: Story) -> str:
    """Whether the difference is for the better, for the worse, or may be neither."""
    suite = story.evaluation.suites.get(one.suite)
    if suite is None or not suite.better or one.low <= 0 <= one.high:
        return ""
    return "better" if (one.low > 0) == (suite.better == "higher") else "worse"


def _verdict_colour(one: Compared, story: Story) -> int:
    return {"better": 3, "worse": 2, "": 1}[_gain(one, story)]


def comparisons_table(story: Story) -> Table | None:
    """Aligned models against the champion and against what they started from."""
    found = story.evaluation.comparisons
    if not found:
        return None
    order = sorted(found, key=lambda one: (one.against != CHAMPION_ROLE, one.against, one.role))
    rows = []
    for one in order:
        gain = _gain(one, story)
        suite = story.evaluation.suites.get(one.suite)
        metric = f"{suite.metric}{ARROWS[suite.better]}" if suite else ""
        rows.append(
            (
                text(name_of(one.role, story)),
                text(name_of(one.against, story)),
                text(one.suite),
                text(metric),
                Cell(
                    f"{one.difference:+.3g}",
                    is_number=True,
                    is_best=gain == "better",
                    is_worst=gain == "worse",
                    detail=f"{one.low:+.3g} to {one.high:+.3g}",
                ),
                num(one.p),
                num(one.items),
                num(one.clusters),
                num(one.needed_items),
            )
        )
    level = found[0].level
    note = (
        "Mean difference on the items that both models have. The true one is below its range, and above it, at a rate "
        f"of at most {level:g} each. Clusters are groups of items that depend on each other, such as those of one "
        "prompt. Needed: so many items would show this difference with the power that the run asks for."
    )
    head = ("model", "minus", "suite", "metric", "difference", "p", "items", "clusters", "needed")
    return Table("Compared item by item", head, tuple(rows), note)


def judge_table(story: Story) -> Table | None:
    """What the model that judges is worth, and win rates as if all answers were equally long."""
    judge = story.evaluation.judge
    if judge is None:
        return None
    rows = []
    if judge.agreement is not None:
        agreed = judge.agreement
        between = f"{number(agreed.low)} to {number(agreed.high)}"
        cell = Cell(number(agreed.accuracy), is_number=True, is_worst=not judge.better_than_chance, detail=between)
        rows.append((text("agrees with people's pairs (ties count one half)"), cell, num(agreed.items)))
        rows.append(
            (text("of the pairs that it decided"), num(agreed.accuracy_decided), shown(f"{agreed.decided:.0%}"))
        )
        rows.append((text("prefers what stands first (0.5: neither)"), num(agreed.first_place), shown("")))
    for role in in_order(judge.length_controlled):
        found = judge.length_controlled[role]
        against = name_of(judge.against, story)
        what = f"{name_of(role, story)} wins against {against}, at equal length"
        cell = Cell(number(found.win_rate), is_number=True, detail=f"{number(found.low)} to {number(found.high)}")
        rows.append((text(what), cell, shown("")))
    if not rows:
        return None
    name = judge.model or "the given model"
    worth = "" if judge.better_than_chance else " It is not shown to agree better than chance: do not rely on it."
    note = f"{name}, by {judge.method}, both orders; disagreement with itself counts as a tie.{worth}"
    return Table("The judge that is a model", ("", "value", "items"), tuple(rows), note)


def decision_table(story: Story) -> Table | None:
    """What promotion was decided by, the same rows that `approve` shows; None for records of earlier releases."""
    if story.promotion is None or not story.promotion.rulings:
        return None
    known = {spec.role for spec in trained_stages()} | {CHAMPION_ROLE, ""}
    decision = story.promotion.decision
    if any({ruling.role, ruling.opponent} - known for ruling in decision.rulings):
        return None  # of a later release, whose stages this one does not know
    rows = decision_rows(decision)
    chosen = spec_of_role(decision.chosen).label if decision.chosen in known and decision.chosen else ""
    return Table(
        "The decision",
        HEAD,
        tuple(tuple(_decided(cell, column) for column, cell in enumerate(row)) for row in rows),
        f"Proposed: {chosen}." if chosen else "",
    )


def _decided(cell: str, column: int) -> Cell:
    is_number = HEAD[column] in ("difference", "interval", "p", "items", "needed")
    return Cell(
        cell, is_number=is_number, is_best=cell in ("passes", "held"), is_worst=cell.startswith(("fails", "not held"))
    )
