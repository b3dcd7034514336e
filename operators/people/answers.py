"""The answers of raters as data: what was asked and answered, and the preference pairs that follow from it."""

import csv
import hashlib
import io
import json
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from operators.failures import StageDataFailed
from operators.people.rating import LABELS, Outcome, read_responses
from stages.artifacts.addresses import artifact_uri
from stages.artifacts.hits import find_hit
from stages.artifacts.manifests import canonical_json, content_digest, publish, read_manifest, upload_files, utc_now
from stages.artifacts.store import Store
from stages.config.collect import RateConfig
from stages.config.graph import GRAPH, Stage
from stages.config.request import ArtifactRef, InputEntry, Manifest, RunInfo

PREFERENCES_FILE = "preferences.jsonl"
_ANSWER_COLUMNS = ("prompt_id", "outcome", "order", "ranking", "reasons", "comment", "by", "at")
_INPUT_FIELDS = {"kind", "uri", "fingerprint", "digest"}


def pairs_of(row: Mapping[str, Any], answer: Mapping[str, Any]) -> list[dict[str, Any]]:
    """All ordered pairs of a ranking, k(k-1)/2 of k responses, in the format of a `preferences` source."""
    ranked = [row["responses"][index] for index in answer["ranking"]]
    judged = {name: answer[name] for name in ("reasons", "comment", "by", "at", "order")}
    return [
        {"prompt": row["prompt"], "chosen": better, "rejected": worse, "prompt_id": row["id"], **judged}
        for place, better in enumerate(ranked)
        for worse in ranked[place + 1 :]
    ]


def account(rows: Sequence[Mapping[str, Any]], answers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Questions by outcome; raises AssertionError unless they sum to the questions asked."""
    outcomes = Counter(Outcome(answer["outcome"]) for answer in answers)
    ledger = {"asked": len(rows), **{outcome.value: outcomes[outcome] for outcome in Outcome}}
    if ledger["asked"] != sum(outcomes.values()):
        raise AssertionError(f"the ledger of the answers does not conserve: {ledger}")
    return ledger


def complete(
    rows: Sequence[Mapping[str, Any]], answers: Iterable[Mapping[str, Any] | None], questions: Sequence[Any]
) -> list[dict[str, Any]]:
    """One answer for each prompt, in their order; a task that ended without one (marked failed) left it unanswered."""
    given = {answer["index"]: dict(answer) for answer in answers if answer is not None}
    silent = {"outcome": Outcome.UNANSWERED.value, "ranking": [], "reasons": [], "by": "", "at": ""}
    silent["comment"] = "the task ended without an answer"
    return [
        {**given.get(index, {**silent, "index": index, "order": questions[index]["order"]}), "prompt_id": row["id"]}
        for index, row in enumerate(rows)
    ]


def publish_preferences(
    store: Store, responses: ArtifactRef, answers: Sequence[Mapping[str, Any]], *, run: RunInfo
) -> tuple[ArtifactRef, Manifest]:
    """Publish the pairs that follow from the answers, with their lineage to the responses and to the model."""
    rows = read_responses(responses)
    ledger = account(rows, answers)
    pairs = [
        pair
        for row, answer in zip(rows, answers, strict=True)
        if answer["outcome"] == Outcome.ANSWERED
        for pair in pairs_of(row, answer)
    ]
    if not pairs:
        raise StageDataFailed(
            f"No answer prefers one response to another: {ledger}.",
            advice="Nothing is published. Clear the tasks `rate` to ask again.",
        )
    digest = hashlib.sha256(canonical_json([dict(answer) for answer in answers])).hexdigest()
    config, spec = RateConfig(answers_digest=digest), GRAPH[Stage.RATE]
    found = find_hit(store, Stage.RATE, config, inputs={"responses": responses})
    identity = found.fingerprint
    if existing := found.manifest:
        return existing.ref(artifact_uri(store, spec.kind, identity)), existing
    with tempfile.TemporaryDirectory() as scratch:
        lines = "".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs)
        (Path(scratch) / PREFERENCES_FILE).write_text(lines, encoding="utf-8")
        (Path(scratch) / "answers.csv").write_text(_csv(answers), encoding="utf-8")
        files = upload_files(store, Path(scratch), kind=spec.kind, fingerprint=identity)
    model = [entry for entry in read_manifest(responses).inputs if entry.role == "model"]
    manifest = Manifest(
        kind=spec.kind,
        stage=spec.stage,
        version=spec.version,
        fingerprint=identity,
        digest=content_digest(files),
        files=files,
        inputs=(InputEntry(role="responses", **responses.model_dump(include=_INPUT_FIELDS)), *model),
        config=config.model_dump(mode="json"),
        execution={"airflow.dag_id": run.dag_id, "airflow.run_id": run.airflow_run_id},
        metrics={"rate/pairs": float(len(pairs)), **{f"rate/{name}": float(count) for name, count in ledger.items()}},
        ledger={"questions": ledger, "pairs": len(pairs)},
        created_at=utc_now(),
    )
    return publish(store, manifest), manifest


def _csv(answers: Sequence[Mapping[str, Any]]) -> str:
    """Every answer as a table, including those without a pair; rankings in the letters that were shown."""
    text = io.StringIO()
    writer = csv.DictWriter(text, _ANSWER_COLUMNS)
    writer.writeheader()
    for answer in answers:
        letters = [LABELS[answer["order"].index(index)] for index in answer["ranking"]]
        told = {"ranking": " > ".join(letters), "reasons": " ".join(answer["reasons"])}
        told["order"] = " ".join(str(index) for index in answer["order"])
        writer.writerow({name: told.get(name, answer[name]) for name in _ANSWER_COLUMNS})
    return text.getvalue()
