"""The decision about a champion as a table of plain texts, one for `approve` and the report alike."""

from collections.abc import Iterator, Mapping

from stages.config.decision import Check, Decision, Ruling
from stages.config.evaluation import CHAMPION_ROLE, SuiteResult, SuiteScore
from stages.config.graph import spec_of_role

HEAD = ("model", "compared with", "suite", "difference", "interval", "p", "items", "needed", "must be", "verdict")
ARROWS = {"higher": " ↑", "lower": " ↓", "": ""}
"""Behind the name of a metric: which way is better."""


def decision_rows(decision: Decision) -> list[tuple[str, ...]]:
    """One row for each suite that decided about a candidate, below HEAD; the proposed model comes first."""
    order = sorted(decision.rulings, key=lambda ruling: ruling.role != decision.chosen)
    return [row for ruling in order for row in _rows(ruling)]


def _rows(ruling: Ruling) -> Iterator[tuple[str, ...]]:
    label, against = label_of(ruling.role), label_of(ruling.opponent) if ruling.opponent else "–"
    if ruling.primary is None:
        yield (label, against, *("–",) * 7, "not comparable")
        return
    least = f"above {-ruling.primary.margin:g}" if ruling.primary.margin else "better"
    yield (label, against, *_numbers(ruling.primary), least, "passes" if ruling.primary.passed else "fails")
    for guard in ruling.guards:
        kept = "held" if guard.passed else "not held"
        verdict = kept if guard.compared else "not measured" if guard.passed else "not held: not measured on both"
        yield (label, against, *_numbers(guard), f"at most {guard.margin:g} worse", verdict)


def _numbers(check: Check) -> tuple[str, ...]:
    name = f"{check.suite}, {check.metric}{ARROWS[check.better]}" if check.metric else check.suite
    if (found := check.compared) is None:
        return (name, *("–",) * 5)
    needed = "–" if found.needed_items is None else str(found.needed_items)
    interval = f"{found.low:+.4g} to {found.high:+.4g}"
    items = f"{found.items}, {found.missing} missing" if found.missing else str(found.items)
    return (name, f"{found.difference:+.4g}", interval, f"{found.p:.3g}", items, needed)


def suite_rows(suites: Mapping[str, SuiteResult], roles: list[str]) -> list[tuple[str, ...]]:
    """One row for each suite: its name and metric, then what each role got, with its 95 % interval."""
    return [
        (
            f"{name}, {suite.metric}{ARROWS[suite.better]}",
            *(_score(suite.roles.get(role)) for role in roles),
        )
        for name, suite in suites.items()
    ]


def _score(score: SuiteScore | None) -> str:
    if score is None or score.value is None:
        return "–"
    interval = "" if score.low is None or score.high is None else f" [{score.low:.4g}, {score.high:.4g}]"
    return f"{score.value:.4g}{interval}"


def label_of(role: str) -> str:
    """A role's name for people; the champion is no stage of the run."""
    return "Champion" if role == CHAMPION_ROLE else spec_of_role(role).label
