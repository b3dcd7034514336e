"""The sections of a card that say how a model was judged and how to make it again, in Markdown.

Texts from records are escaped; what strangers need not know is taken out by the caller's `hidden`.
"""

import json
import shlex
from collections.abc import Callable, Mapping
from typing import Any

from stages.config.decision_table import HEAD, decision_rows
from stages.config.evaluation import CHAMPION_ROLE, Compared, SuiteResult
from stages.config.graph import BASE_MODEL, trained_stages
from stages.config.markdown import block, code, plain, table
from stages.config.request import Manifest
from stages.config.text import duration
from stages.reporting.evidence import Evidence

_ARROWS = {"higher": " ↑", "lower": " ↓", "": ""}
_DAG = "llm_pipeline"
Hidden = Callable[[Any], Any]


def label_of(role: str) -> str:
    """A role's name for people."""
    if role == CHAMPION_ROLE:
        return "the champion before it"
    return next((spec.label for spec in trained_stages() if spec.role == role), role)


def measured(evidence: Evidence) -> str:
    """Numbers of its training, of its evaluation, of the suites with intervals, and of comparisons."""
    own = [(plain(name), f"{value:.6g}") for name, value in sorted(evidence.model.metrics.items())]
    parts = [table(("at the end of its training", "value"), own)] if own else []
    role, evaluation = evidence.role, evidence.evaluation
    if evaluation is not None and role:
        prefix = f"{role}/eval/"
        found = sorted(
            (name.removeprefix(f"{role}/"), value)
            for name, value in evaluation.metrics.items()
            if name.startswith(prefix)
        )
        if found:
            head = (f"evaluated {evaluation.created_at[:10]}", "value")
            parts.append(table(head, [(plain(name), f"{value:.6g}") for name, value in found]))
            parts.append(
                f"Scores and win rates are those of the run's own reward model, against {_start(evidence.model)}: they "
                "say how well the model pleases it."
            )
        parts += _suites(evidence, role)
    return "\n\n".join(parts) or "Nothing was measured: the run held no data back."


def _start(model: Manifest) -> str:
    """What the model started from, as it stands in a sentence."""
    kinds = {entry.role: entry.kind for entry in model.inputs}
    label = next((spec.label for spec in trained_stages() if spec.kind == kinds.get("model")), "")
    if label:
        return f"the {label} model that it started from"
    is_given = BASE_MODEL in kinds or any(source.role == BASE_MODEL for source in model.sources)
    return "the given model that it started from" if is_given else "the model that it started from"


def _suites(evidence: Evidence, role: str) -> list[str]:
    suites = {name: suite for name, suite in evidence.judged.suites.items() if role in suite.roles}
    rows = [_suite_row(name, suite, role) for name, suite in suites.items() if suite.roles[role].value is not None]
    parts = []
    if rows:
        parts.append(table(("suite", "metric", "value", "95 % interval", "chance", "items"), rows))
    own = [one for one in evidence.judged.comparisons if one.role == role]
    if own:
        head = ("compared with", "suite", "difference", "range", "p", "items")
        parts.append(table(head, [_comparison_row(one) for one in own]))
        parts.append("Differences are this model minus the other, item by item, by a bootstrap over groups of items.")
    return parts


def _suite_row(name: str, suite: SuiteResult, role: str) -> tuple[str, ...]:
    score = suite.roles[role]
    between = "" if score.low is None or score.high is None else f"{score.low:.4g} to {score.high:.4g}"
    chance = "" if suite.chance is None else f"{suite.chance:.4g}"
    metric = f"{plain(suite.metric)}{_ARROWS[suite.better]}"
    return (plain(name), metric, f"{score.value:.4g}", between, chance, str(score.items))


def _comparison_row(one: Compared) -> tuple[str, ...]:
    between = f"{one.low:+.4g} to {one.high:+.4g}"
    return (
        plain(label_of(one.against)),
        plain(one.suite),
        f"{one.difference:+.4g}",
        between,
        f"{one.p:.3g}",
        str(one.items),
    )


def gates(evidence: Evidence, hidden: Hidden) -> str:
    """Which gates let it pass, with the numbers of those that did not."""
    if not evidence.gates:
        return "No gate has left a record of it."
    rows = []
    for stage, gate in evidence.gates.items():
        failed = [check for check in gate.checks if check.outcome == "failed"]
        what = "; ".join(f"{check.name}: {check.found}, allowed: {check.allowed}" for check in failed)
        by = f" A person let it pass: {gate.override.reason}" if gate.override else ""
        rows.append(
            (
                plain(stage),
                plain(gate.outcome),
                str(len(gate.checks)),
                plain(hidden(f"{what}{by}".strip()), at_most=500),
            )
        )
    return table(("gate after", "outcome", "checks", "what failed"), rows)


def decision(evidence: Evidence, hidden: Hidden) -> str:
    """Whether it became champion, and the numbers that decided; empty when nothing was decided about it."""
    decided = evidence.promotion
    if decided is None or not evidence.role:
        return ""
    role = evidence.own_role  # a later run may have measured it as its champion
    if decided.chosen != role:
        chosen = f"; {label_of(decided.chosen)} was proposed" if decided.chosen else ""
        return f"It was not proposed as champion{plain(chosen)}."
    verdict = "It became champion" if decided.promoted else "It did not become champion"
    parts = [f"{verdict}: {plain(hidden(decided.reason), at_most=1000)}"]
    known = {spec.role for spec in trained_stages()} | {CHAMPION_ROLE, ""}
    own = [ruling for ruling in decided.rulings if ruling.role == role and ruling.opponent in known]
    if own:
        rows = [row for row in decision_rows(decided.decision) if row[0] == label_of(role)]
        parts.append(table(HEAD, [[plain(cell) for cell in row] for row in rows]))
    return "\n\n".join(parts)


def reproduce(evidence: Evidence, hidden: Hidden, *, is_public: bool) -> str:
    """The command that made the run, the code and libraries, and every setting of every stage."""
    model = evidence.model
    versions = model.execution.get("versions")
    known = versions.items() if isinstance(versions, Mapping) else ()
    commit = str(model.execution.get("git_commit", ""))
    made_with = [f"{name} {version}" for name, version in known if version != "not installed"]
    parts = [
        "The same settings and the same inputs have the same fingerprints; on CPUs they give the same weights.",
        f"Code: Athanor{f', commit {code(commit)}' if commit else ''}."
        + (f" Libraries: {plain(', '.join(map(str, made_with)))}." if made_with else "")
        + f" The last stage took {duration(model.cost.wall_seconds)}.",
        _command(evidence.params, hidden, is_public=is_public),
    ]
    for manifest in evidence.family:
        settings = json.dumps(hidden(manifest.config), indent=1, ensure_ascii=False, sort_keys=True)
        parts.append(
            f"<details><summary>Settings of {plain(manifest.stage.value)} (version {manifest.version})</summary>\n\n"
            f"{_fenced(settings, 'json')}\n\n</details>"
        )
    return "\n\n".join(filter(None, parts))


def _command(params: Mapping[str, Any], hidden: Hidden, *, is_public: bool) -> str:
    if not params:
        return ""
    given = {name: value for name, value in params.items() if value not in (None, "", [], {})}
    conf = json.dumps(hidden(given), ensure_ascii=False, sort_keys=True)
    line = f"airflow dags trigger {_DAG} --conf {shlex.quote(conf)}"
    note = (
        "Folders and buckets are left out of it: a source is named by the last part of its address."
        if is_public
        else f"On a local stack `make demo PARAMS=...` takes the same JSON, and the form of the DAG {code(_DAG)} "
        "the same fields."
    )
    return f"The run was started with:\n\n{_fenced(line, 'sh')}\n\n{note}"


def _fenced(text: str, language: str) -> str:
    return block(text).replace("text\n", f"{language}\n", 1)
