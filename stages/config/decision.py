"""Which model becomes champion, and why: the rules alone, without MLflow, so that every branch can be tested.

A candidate becomes champion when the evaluation shows that it is better on the primary suite, and not worse than its
margin on any guard. It is compared with the champion; without one, with the model that it started from. The primary
suite is the first of `promote.primary` that both were measured on and that the candidate was not trained against: the
reward model that PPO optimised never decides that PPO won.

The aligned models of a run compete, and the best of them is proposed. Testing only that one, on the items that it was
chosen by, would promote too often; so each is tested at its share of the level (Bonferroni), and then all together
promote one that is no better at most at `promote.level`. Guards need no such share, because all of them must hold.

What decides must have been measured against what is champion now. Where it was not, nothing is promoted by numbers. A
person asked by `promotion=approval` has decided before, and that stands whatever the numbers say; the reason states
both.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from stages.config.closing import Approval, Guard, PromoteConfig, Promotion, Verdict
from stages.config.errors import ConfigError
from stages.config.evaluation import (
    CHAMPION_ROLE,
    GOLD_SUITE,
    JUDGE_SUITE,
    REWARD_SUITE,
    Compared,
    Evaluation,
    MeasuredChampion,
    SuiteResult,
)
from stages.config.graph import aligned_models, spec_of_role
from stages.config.selection import learns_from_scores
from stages.config.suites import SUITES

CANDIDATE, CHAMPION, PREVIOUS = "candidate", "champion", "previous"
"""Aliases of registered models in MLflow."""

ROLLED_BACK = "rollback.reason"
"""Tag of a version that was champion and was taken back."""

_CLEAR = "clear the task `evaluate` with its downstream tasks"

_MISSING_AT_MOST = 0.02
"""Share of the opponent's items that a candidate may lack a score for. What it was not measured on may be just what it
fails at: an answer that the rule cannot read, or a value that is not finite."""


@dataclass(frozen=True)
class Candidate:
    """An aligned model of the run, which may become champion."""

    role: str
    fingerprint: str
    rolled_back: str = ""
    """Why it was taken back when it was champion; empty when it was not."""


@dataclass(frozen=True)
class Champion:
    """The champion before this run."""

    version: str
    fingerprint: str
    digest: str = ""

    @staticmethod
    def from_tags(version: str, tags: Mapping[str, str]) -> "Champion":
        return Champion(version, tags.get("lineage.fingerprint", ""), tags.get("lineage.digest", ""))


@dataclass(frozen=True)
class Check:
    """One suite on which the candidate must be better, or not worse than a margin."""

    suite: str
    margin: float
    passed: bool
    why: str
    metric: str = ""
    better: str = ""
    compared: Compared | None = None
    """None where the suite was not measured."""


@dataclass(frozen=True)
class Ruling:
    """What the numbers say about one candidate."""

    role: str
    opponent: str
    """`champion`, or the role of the model that it started from; empty when there is nothing to compare with."""
    level: float
    """Its share of `promote.level`."""
    passed: bool
    reason: str
    primary: Check | None = None
    guards: tuple[Check, ...] = ()


@dataclass(frozen=True)
class Decision:
    """Whether a candidate becomes champion, and why in words for people."""

    promoted: bool
    reason: str
    comparison: str
    """What decided: `champion` or `start` (what the candidate was compared with), `same_model`, `person` or `none`."""
    chosen: str | None = None
    """Role of the aligned model that is proposed."""
    rulings: tuple[Ruling, ...] = ()

    @property
    def ruling(self) -> Ruling | None:
        """That of the proposed model."""
        return next((one for one in self.rulings if one.role == self.chosen), None)

    def record(self) -> dict[str, Any]:
        """As JSON, for promotion.json."""
        return asdict(self)


def decide(
    candidates: Sequence[Candidate], champion: Champion | None, evaluation: Evaluation, config: PromoteConfig
) -> Decision:
    """Choose among the aligned models of a run, and decide whether the chosen one becomes champion.

    Raises ConfigError when a person should have decided and `config` has no answer.
    """
    numbers = decide_by_numbers(candidates, champion, evaluation, config)
    if config.promotion is Promotion.NEVER:
        reason = "promotion=never: the models are registered as candidates only"
        return Decision(False, reason, "none", numbers.chosen, numbers.rulings)
    if config.promotion is not Promotion.APPROVAL or numbers.chosen is None:
        return numbers
    if config.approval is None:
        raise ConfigError(
            "promotion=approval needs a decision, and promote.approval is empty",
            advice="Clear the task `approve` together with its downstream tasks.",
        )
    return _decide_by_person(config.approval, numbers)


def _decide_by_person(approval: Approval, numbers: Decision) -> Decision:
    """Rejecting a model that is champion already takes nothing from it: the previous champion stays."""
    promoted = approval.verdict is Verdict.APPROVED
    if approval.verdict is Verdict.TIMED_OUT:
        verdict = f"no decision until {approval.at}, which counts as a rejection"
    else:
        verdict = f"{approval.verdict.value} by {approval.by or 'an unnamed user'} at {approval.at}"
    reason = f"{verdict}: {approval.comment}" if approval.comment else verdict
    if numbers.comparison == "same_model":
        comparison = "same_model" if promoted else "person"
        return Decision(promoted, f"{reason}; {numbers.reason}", comparison, numbers.chosen, numbers.rulings)
    agree = "agree" if numbers.promoted == promoted else "disagree"
    told = f"{reason}; the numbers {agree}: {numbers.reason}"
    return Decision(promoted, told, "person", numbers.chosen, numbers.rulings)


def decide_by_numbers(
    candidates: Sequence[Candidate], champion: Champion | None, evaluation: Evaluation, config: PromoteConfig
) -> Decision:
    """Say what the numbers decide when no person is asked; `approve` shows it to the person who is."""
    if not candidates:
        return Decision(False, "the run has no aligned model", "none")
    level = config.level / len(candidates)
    wrong = _not_comparable(champion, candidates, evaluation.champion)
    rulings = tuple(
        # Against what they started from, models still rank, so that the best of them is the one proposed.
        _overruled(_rule(one, candidates, None, evaluation, config, level=level), wrong)
        if wrong
        else _rule(one, candidates, champion, evaluation, config, level=level)
        for one in candidates
    )
    best = max(rulings, key=lambda ruling: _strength(ruling, config))
    present = next((one for one in candidates if champion and one.fingerprint == champion.fingerprint), None)
    if present is not None and champion is not None and not best.passed:
        reason = f"the model is champion already (version {champion.version})"
        return Decision(True, reason, "same_model", present.role, rulings)
    comparison = "none" if wrong or best.primary is None else "champion" if champion else "start"
    return Decision(best.passed, best.reason, comparison, best.role, rulings)


def _overruled(ruling: Ruling, wrong: str) -> Ruling:
    reason = f"{spec_of_role(ruling.role).label} is not promoted: {wrong}"
    return replace(ruling, passed=False, reason=reason)


def _strength(ruling: Ruling, config: PromoteConfig) -> tuple[float, ...]:
    """Order of the candidates: one that passes before one that does not, one judged by a preferred suite before one
    judged by another, then by how much better it is at least. The first of equals wins."""
    primary = ruling.primary
    if primary is None or primary.compared is None:
        return (ruling.passed, -len(config.primary), 0.0)
    return (ruling.passed, -config.primary.index(primary.suite), _least_gain(primary.compared, primary.better))


def _rule(
    candidate: Candidate,
    candidates: Sequence[Candidate],
    champion: Champion | None,
    evaluation: Evaluation,
    config: PromoteConfig,
    *,
    level: float,
) -> Ruling:
    label = spec_of_role(candidate.role).label
    opponent = _opponent(candidate, candidates, champion, evaluation)
    primary, passed_over = _primary(candidate, opponent, evaluation, config, level=level)
    who = f"the champion (version {champion.version})" if champion else "the model that it started from"
    if primary is None:
        why = "; ".join(passed_over)
        reason = f"{label} is not promoted: no suite of promote.primary compares it with {who}: {why}"
        return Ruling(candidate.role, opponent, level, False, reason)
    guards = tuple(_guard(guard, candidate, opponent, evaluation, config, level=level) for guard in config.guards)
    broken = [guard for guard in guards if not guard.passed]
    passed = primary.passed and not broken and not candidate.rolled_back
    share = f" (promote.level={config.level:g}, shared by {len(candidates)})" if len(candidates) > 1 else ""
    parts = [f"{label} against {who} at level {level:g}{share}: {primary.why}", *(guard.why for guard in broken)]
    if not broken and (held := [guard.suite for guard in guards if guard.compared]):
        parts.append(f"guards hold: {', '.join(held)}")
    if unmeasured := [guard.suite for guard in guards if guard.passed and not guard.compared]:
        parts.append(f"guards that no model could be measured on: {', '.join(unmeasured)}")
    if candidate.rolled_back:
        parts.append(f"it was champion and was rolled back ({candidate.rolled_back}), so only a person promotes it")
    return Ruling(candidate.role, opponent, level, passed, "; ".join(parts), primary, guards)


def _not_comparable(
    champion: Champion | None, candidates: Sequence[Candidate], measured: MeasuredChampion | None
) -> str:
    """Why the evaluation says nothing about who should be champion now; empty when it does."""
    if champion and any(one.fingerprint == champion.fingerprint for one in candidates):
        return ""
    if measured is not None and measured.missing:
        return (
            f"the champion could not be measured ({measured.missing}); repair it and {_CLEAR}, or let a person decide"
        )
    now = f"version {champion.version} is champion now" if champion else "there is no champion any more"
    if measured is None:
        return f"when it was evaluated, there was no champion to compare with, and {now}; {_CLEAR}" if champion else ""
    content = champion and (not champion.digest or not measured.digest or champion.digest == measured.digest)
    if champion and content and champion.fingerprint == measured.fingerprint:
        return ""
    return f"it was compared with version {measured.version or measured.fingerprint[:12]}, and {now}; {_CLEAR}"


def _opponent(
    candidate: Candidate, candidates: Sequence[Candidate], champion: Champion | None, evaluation: Evaluation
) -> str:
    """The role of what a candidate must be better than: the champion, which may be one of the candidates themselves,
    or what it started from."""
    if champion is not None:
        own = (one.role for one in candidates if one.fingerprint == champion.fingerprint)
        return next(own, CHAMPION_ROLE)
    others = {CHAMPION_ROLE, *(spec.role for spec in aligned_models())}
    starts = (one.against for one in evaluation.comparisons if one.role == candidate.role and one.against not in others)
    return next(starts, "")


def _primary(
    candidate: Candidate, opponent: str, evaluation: Evaluation, config: PromoteConfig, *, level: float
) -> tuple[Check | None, list[str]]:
    """Return the check that decides, and why the suites before it do not."""
    passed_over = []
    for suite in config.primary:
        compared = evaluation.compared(candidate.role, against=opponent, suite=suite)
        known = evaluation.suites.get(suite)
        if suite == REWARD_SUITE and learns_from_scores(spec_of_role(candidate.role)):
            passed_over.append(f"{suite}: it was trained against this reward model")
        elif suite == JUDGE_SUITE and not evaluation.judge_is_proven:
            passed_over.append(f"{suite}: it is not shown to agree with known pairs more often than chance")
        elif suite == GOLD_SUITE and not evaluation.gold_is_proven(min_items=config.min_items):
            passed_over.append(f"{suite}: it is not shown to agree with held-out pairs more often than chance")
        elif known is not None and (lacking := _lacks_all(candidate.role, opponent, known)):
            return Check(suite, config.margin, False, f"{suite}: {lacking}", known.metric, known.better), passed_over
        elif compared is None or known is None:
            passed_over.append(f"{suite}: not measured on both")
        elif not known.better:
            passed_over.append(f"{suite}: its {known.metric} is neither better high nor low")
        else:
            return _check(compared, evaluation, config, margin=config.margin, level=level, must_gain=True), passed_over
    return None, passed_over


def _guard(
    guard: Guard, candidate: Candidate, opponent: str, evaluation: Evaluation, config: PromoteConfig, *, level: float
) -> Check:
    """A suite on which no model could be measured guards nothing, and is told; one that only one of the two has is not
    held, nor is one of a name that no evaluation knows."""
    known = evaluation.suites.get(guard.suite)
    compared = evaluation.compared(candidate.role, against=opponent, suite=guard.suite)
    if known is None and guard.suite not in SUITES:
        why = f"guard {guard.suite} is not held: the evaluation has no suite of this name"
        return Check(guard.suite, guard.margin, False, why)
    if known is None or not any(score.items for score in known.roles.values()):
        return Check(guard.suite, guard.margin, True, f"guard {guard.suite}: no model could be measured on it")
    if compared is None:
        why = f"guard {guard.suite} is not held: the two were not measured on items that both have"
        return Check(guard.suite, guard.margin, False, why, known.metric, known.better)
    if not known.better:
        why = f"guard {guard.suite} is not held: its {known.metric} is neither better high nor low"
        return Check(guard.suite, guard.margin, False, why, known.metric, known.better, compared)
    return _check(compared, evaluation, config, margin=guard.margin, level=level, must_gain=False)


def _check(
    compared: Compared, evaluation: Evaluation, config: PromoteConfig, *, margin: float, level: float, must_gain: bool
) -> Check:
    suite = evaluation.suites[compared.suite]
    found = (
        f"{compared.suite} ({suite.metric}) {compared.difference:+.4g} [{compared.low:+.4g}, {compared.high:+.4g}]"
        f"{'' if suite.better == 'higher' else ', lower is better'}, "
        f"p={compared.p:.4g}, {compared.items} items"
    )
    if incomplete := _incomplete(compared, suite):
        passed, verdict = False, incomplete
    else:
        passed, verdict = _verdict(compared, suite.better, config, margin=margin, level=level, must_gain=must_gain)
    name = "" if must_gain else "guard "
    return Check(compared.suite, margin, passed, f"{name}{found}: {verdict}", suite.metric, suite.better, compared)


def _incomplete(compared: Compared, suite: SuiteResult) -> str:
    """Why a comparison says nothing because the candidate has too few of its opponent's items; empty when it has."""
    both, missing = compared.items, compared.missing
    if missing <= _MISSING_AT_MOST * (both + missing):
        return ""
    return (
        f"it has no score on {missing} of the {both + missing} items that the other has one on, and at most "
        f"{_MISSING_AT_MOST:.0%} may be missing{_reasons(compared.role, suite)}"
    )


def _lacks_all(role: str, opponent: str, suite: SuiteResult) -> str:
    """Why a candidate cannot be compared with an opponent that was measured; empty when it was measured too."""
    ours, theirs = suite.roles.get(role), suite.roles.get(opponent)
    if ours is None or ours.items or theirs is None or not theirs.items:
        return ""
    return f"it has no score on any of the {theirs.items} items that the other has one on{_reasons(role, suite)}"


def _reasons(role: str, suite: SuiteResult) -> str:
    known = suite.roles.get(role)
    skipped = ", ".join(f"{reason} {count}" for reason, count in known.skipped.items()) if known else ""
    return f" (skipped: {skipped})" if skipped else ""


def _verdict(
    compared: Compared, better: str, config: PromoteConfig, *, margin: float, level: float, must_gain: bool
) -> tuple[bool, str]:
    if compared.clusters < config.min_items:
        return False, f"{compared.clusters} independent items are too few (promote.min_items={config.min_items})"
    if compared.level > level * (1 + 1e-9):
        return False, f"its interval is for level {compared.level:g}, not {level:g}; {_CLEAR}"
    least = _least_gain(compared, better)
    if not must_gain:
        held = least >= -margin
        return held, f"it may be worse by {max(0.0, -least):.4g}, {'within' if held else 'over'} its margin {margin:g}"
    if margin > 0:
        held = least > -margin
        return (
            held,
            f"it may be worse by {max(0.0, -least):.4g}, {'within' if held else 'over'} promote.margin={margin:g}",
        )
    if least > 0 and compared.p <= level:
        return True, "it is better"
    needed = (
        f"; {compared.needed_items} items would show it with power {config.power:g}" if compared.needed_items else ""
    )
    return False, f"it is not shown to be better{needed}"


def _least_gain(compared: Compared, better: str) -> float:
    """How much better the candidate is at least; negative when it may be worse."""
    return -compared.high if better == "lower" else compared.low
