"""What an evaluation publishes: `metrics.json` and `samples.json` for reading, `scores.parquet` and
`responses.parquet` for comparing later.

Every number is finite. What could not be measured is left out, and counted with its reason.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from stages.config.closing import WIN_RATE, EvaluateConfig
from stages.config.evaluation import CHAMPION_ROLE
from stages.config.graph import REWARD_MODEL, aligned_models
from stages.config.records import without_non_finite
from stages.data.tokens.views import Split
from stages.job.context import StageContext
from stages.judge.aggregates import metrics_of, reward_quality, unigram_perplexity, win_rates, without_infinite
from stages.judge.bench import Bench, Measured, Unit
from stages.judge.by_reason import by_reason, flat_by_reason
from stages.judge.judges.pairwise_suite import facts_of, silent_judge
from stages.judge.scores import Column, write_scores
from stages.judge.statistics import compare, interval
from stages.judge.subjects import scorer_role
from stages.judge.suite import Measurement, Suite

METRICS, SAMPLES = "metrics.json", "samples.json"
_LEVEL = 0.95
"""Of the intervals."""


def report_of(context: StageContext, bench: Bench, measured: Measured, left_out: dict[str, str]) -> dict[str, Any]:
    """Return the content of metrics.json."""
    config = context.config
    assert isinstance(config, EvaluateConfig)
    numbers = {role: metrics_of(role, bench, measured) for role in bench.subjects.roles}
    for role, rate in win_rates(list(numbers), bench.subjects.start, measured).items():
        numbers[role][WIN_RATE] = rate
    quality = reward_quality(bench, measured)
    suites = suites_of(bench, measured)
    left_out = left_out | _unmeasured(suites)
    for name, values in {**numbers, scorer_role(): quality}.items():
        left_out |= without_infinite(name, values)
    unigram = unigram_perplexity(bench.heldout)
    champion = champion_of(context, bench)
    judge = facts_of(measured, start=bench.subjects.start, settings=config.judge)
    left_out |= silent_judge(measured, start=bench.subjects.start)
    return {
        "models": numbers,
        **({} if unigram is None else {"unigram_perplexity": unigram}),
        "reward": quality,
        "suites": suites,
        "comparisons": comparisons_of(context, bench, measured),
        **({"by_reason": reasons} if (reasons := by_reason(bench, measured)) else {}),
        **({"champion": champion} if champion else {}),
        **({"judge": judge} if judge else {}),
        **({"left_out": left_out} if left_out else {}),
        "data": _data(context, bench),
        "reward_fingerprint": context.identity_of(scorer_role(), REWARD_MODEL) or None,
    }


def flat(report: Mapping[str, Any]) -> dict[str, float]:
    """Return the metrics of the manifest: `<role>/eval/...`, `<role>/suite/<suite>/<metric>`, and the judge's own."""
    found = {f"{role}/{name}": value for role, metrics in report["models"].items() for name, value in metrics.items()}
    for name, suite in report["suites"].items():
        for role, result in suite["roles"].items():
            if "value" in result:
                found[f"{role}/suite/{name}/{suite['metric']}"] = result["value"]
    unigram = report.get("unigram_perplexity")
    found |= flat_by_reason(report.get("by_reason", []))
    return found | report["reward"] | ({} if unigram is None else {"eval/unigram_perplexity": unigram})


def suites_of(bench: Bench, measured: Measured) -> dict[str, Any]:
    """Return every suite with what each model got, and how sure that is."""
    suites: dict[str, Any] = {}
    for unit in _published(bench, measured):
        entry = suites.setdefault(unit.suite.name, _facts(unit.suite))
        entry["roles"][unit.role] = _result(measured[unit.key])
    return suites


def comparisons_of(context: StageContext, bench: Bench, measured: Measured) -> list[dict[str, Any]]:
    """Return each aligned model compared with the champion, with the model that it started from, and with the other
    aligned ones, of which one may be champion already; suite by suite, on the items that both have a score for. What
    only the other has is counted: a model must not win by the items that it failed."""
    config = context.config
    assert isinstance(config, EvaluateConfig)
    chosen, start = config.comparison, bench.subjects.start
    aligned = [spec.role for spec in aligned_models() if spec.role in bench.subjects.roles]
    suites = {unit.suite.name: unit.suite for unit in _published(bench, measured) if unit.suite.better}
    found = []
    for role in aligned:
        for against in (CHAMPION_ROLE, start, *(other for other in aligned if other != role)):
            for suite in suites.values():
                ours, theirs = (measured.get((one, suite.name)) for one in (role, against))
                if ours is None or theirs is None:
                    continue
                comparison = compare(
                    column(ours),
                    column(theirs),
                    level=chosen.level,
                    power=chosen.power,
                    least_difference=chosen.least_difference,
                    better=suite.better,
                )
                if comparison is not None:
                    found.append({"role": role, "against": against, "suite": suite.name, **asdict(comparison)})
    return found


def champion_of(context: StageContext, bench: Bench) -> dict[str, Any]:
    """Return who the champion is, or why it was not measured; empty where there is none."""
    config = context.config
    assert isinstance(config, EvaluateConfig)
    address = config.champion.removeprefix("models:/")
    name, _, version = address.rpartition("/")
    named = {"name": name, "version": version} if address else {}
    if CHAMPION_ROLE in bench.subjects.roles:
        ref = context.inputs[CHAMPION_ROLE]
        return {**named, "fingerprint": ref.fingerprint, "digest": ref.digest, "uri": ref.uri}
    if missing := bench.subjects.missing_champion or config.champion_missing:
        return {**named, "missing": missing}
    return {}


def samples_of(bench: Bench, measured: Measured, *, num_samples: int) -> list[dict[str, Any]]:
    """Return the first prompts with the most probable answer of every model; a score that is no number is null."""
    shown = {role: _by_item(measured, role, "shown") for role in bench.subjects.roles}
    scored = {role: _by_item(measured, role, "shown_score") for role in bench.subjects.roles}
    return [
        {
            "prompt": prompt.text,
            "responses": {role: found[prompt.id].response for role, found in shown.items() if prompt.id in found},
            "scores": {
                role: found[prompt.id].value if prompt.id in found else None
                for role, found in scored.items()
                if (role, "shown_score") in measured and prompt.id in shown[role]
            },
        }
        for prompt in bench.heldout.prompts[:num_samples]
    ]


def write_results(folder: Path, report: Mapping[str, Any], samples: Sequence[Any], scores: Measured) -> None:
    """Write all files of the evaluation."""
    (folder / METRICS).write_text(json.dumps(report, indent=1, allow_nan=False))
    whole, _ = without_non_finite(list(samples))
    text = json.dumps(whole, indent=1, ensure_ascii=False, allow_nan=False)
    (folder / SAMPLES).write_text(text, encoding="utf-8")
    write_scores(folder, {(suite, role): found.scores for (role, suite), found in scores.items()})


def in_order(bench: Bench, measured: Measured) -> Measured:
    """Everything measured, also what no table shows and metrics are made of, in an order that does not depend on which
    worker measured what."""
    return {unit.key: measured[unit.key] for unit in bench.units if unit.key in measured}


def column(measured: Measurement) -> Column:
    """Return a measurement as a column of scores.parquet would be read."""
    scores = sorted(measured.scores, key=lambda score: score.item)
    return Column(
        items=np.asarray([score.item for score in scores], dtype=object),
        clusters=np.asarray([score.cluster or score.item for score in scores], dtype=object),
        values=np.asarray([score.value for score in scores], dtype=np.float64),
    )


def _published(bench: Bench, measured: Measured) -> list[Unit]:
    return [unit for unit in bench.units if unit.is_published and unit.key in measured]


def _facts(suite: Suite) -> dict[str, Any]:
    return {
        "metric": suite.metric,
        "better": suite.better,
        "chance": suite.chance,
        "digest": suite.digest,
        "items": len(suite),
        "roles": {},
    }


def _result(found: Measurement) -> dict[str, Any]:
    """The mean with its interval; without a score only what was skipped."""
    skipped = dict(sorted(found.skipped.items()))
    scores = column(found)
    known = interval(scores.values, scores.clusters, level=_LEVEL)
    return {**(asdict(known) if known else {"items": 0}), "skipped": skipped}


def _unmeasured(suites: Mapping[str, Any]) -> dict[str, str]:
    """Suites that no model could be measured on, with the reasons."""
    found = {}
    for name, suite in suites.items():
        if all("value" not in result for result in suite["roles"].values()):
            reasons = sorted({reason for result in suite["roles"].values() for reason in result["skipped"]})
            found[f"suite {name}"] = f"no model could be measured on any of its {suite['items']} items: " + (
                ", ".join(reasons) or "it is empty"
            )
    return found


def _by_item(measured: Measured, role: str, suite: str) -> dict[str, Any]:
    found = measured.get((role, suite))
    return {score.item: score for score in found.scores} if found else {}


def _data(context: StageContext, bench: Bench) -> dict[str, Any]:
    heldout = bench.heldout
    return {
        "digest": context.inputs["tokens"].digest,
        "num_document_tokens": len(heldout.row_numbers) * heldout.tokens.sequence_length,
        "num_documents": len(heldout.documents),
        "num_conversations": len(heldout.conversations),
        "num_preferences": len(heldout.pairs),
        "num_prompts": len(heldout.prompts),
        "heldout_document_tokens": heldout.tokens.documents(Split.HELDOUT).num_items,
        **({"texts_missing": bench.texts_missing} if bench.texts_missing else {}),
    }
