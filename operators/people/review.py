"""The task between the stages that make data and `curate`, where a person reads examples of it before it is used.

It asks on Airflow's page of required actions, as `approve` does. A rejection, or no answer in time, fails the task with
the person's reason: nothing is curated, so nothing is trained. The answer is kept in the run's folder and in MLflow,
and in no fingerprint: data that was approved is the same data.
"""

import logging
from collections.abc import Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from airflow.providers.standard.operators.hitl import ApprovalOperator, HITLOperator
from airflow.sdk.exceptions import AirflowSkipException

from operators.failures import MadeDataRejected, StageConfigFailed, as_stage_failures
from operators.links import ReportLink
from operators.people.approval import comment_field, read_answer
from operators.people.asking import ask_once, with_usable_fields
from stages.artifacts.made_samples import Drawn, draw_samples
from stages.artifacts.manifests import read_manifest
from stages.config.closing import Verdict
from stages.config.graph import AI_FEEDBACK, GRAPH, SYNTHESIS, Stage
from stages.config.made_counts import made_rows, spent, step_counts
from stages.config.markdown import block, code, link, plain, table
from stages.config.pipeline import PipelineConfig
from stages.config.request import ArtifactRef, Manifest, RunInfo
from stages.config.review import REVIEW_RECORD, REVIEW_TASK, ReviewRecord, review_key
from stages.config.text import one_line

if TYPE_CHECKING:
    from stages.artifacts.store import Store

logger = logging.getLogger(__name__)

_LONGEST_TEXT = 2_000


class MadeDataReview(ApprovalOperator):
    """Show what models have made; return the ReviewRecord as JSON, or fail. Skips itself unless the run asks for it."""

    ui_color = "#f7ead7"

    def __init__(
        self, *, task_id: str = REVIEW_TASK, resolve_task_id: str = "resolve", store_uri: str = "", **kwargs: Any
    ) -> None:
        kwargs.setdefault("subject", "Use the data that models of this run have made?")
        kwargs["params"] = {"comment": comment_field()}  # in place of the DAG's, which Airflow passes here
        kwargs.setdefault("response_timeout", timedelta(days=7))  # until the run's configuration is read
        super().__init__(task_id=task_id, defaults=self.REJECT, **kwargs)
        self.resolve_task_id = resolve_task_id
        self.store_uri = store_uri

    def execute(self, context: Any) -> Any:
        ti = context["ti"]
        with as_stage_failures():
            run, _, config = self._read_run(ti)
            if not config.reviewed or config.dry_run:
                raise AirflowSkipException(
                    f"this run asks no person about made data (review_made_data={config.review_made_data}, "
                    f"{AI_FEEDBACK}={config.ai_feedback}, {SYNTHESIS}={config.synthesis}, dry_run={config.dry_run})"
                )
            pages = {stage: ti.xcom_pull(task_ids=stage.value, key=ReportLink().xcom_key) for stage in config.reviewed}
            self.subject, self.body = question(run, config, _made(ti, config), pages)
        self.response_timeout = timedelta(hours=config.review.timeout_hours)
        return ask_once(self, context, super().execute)

    def execute_complete(self, context: Any, event: dict[str, Any]) -> dict[str, Any]:
        """Keep the answer, then fail unless it is an approval; past ApprovalOperator, which would skip the stages
        after a rejection, so that the run would end as if nothing had been wrong."""
        timed_out = bool(event.get("timedout"))
        given = HITLOperator.execute_complete(self, context, with_usable_fields(self, event))
        answer = read_answer(given, timed_out=timed_out)
        with as_stage_failures():
            run, store, config = self._read_run(context["ti"])
            made = _made(context["ti"], config)
            record = ReviewRecord(artifacts={stage.value: ref for stage, ref in made.items()}, answer=answer)
            keep(store, run.run_id, record)
        tell_mlflow(run, record)
        self.log.info("The made data was %s.", one_line(record.summary()))
        if not record.is_approved:
            raise rejected(record, config)
        return record.model_dump(mode="json")

    def _read_run(self, ti: Any) -> "tuple[RunInfo, Store, PipelineConfig]":
        from operators.prepare import load_config
        from stages.artifacts.addresses import open_default_store

        run, store = (
            RunInfo.model_validate(ti.xcom_pull(task_ids=self.resolve_task_id)),
            open_default_store(self.store_uri),
        )
        return run, store, load_config(store, run)


def _made(ti: Any, config: PipelineConfig) -> dict[Stage, ArtifactRef]:
    """What the stages under review have published."""
    found = {}
    for stage in config.reviewed:
        if (published := ti.xcom_pull(task_ids=stage.value)) is None:
            raise StageConfigFailed(
                f"There is nothing to read: task {stage.value!r} left no artifact.",
                advice=f"Clear {stage.value!r} together with its downstream tasks.",
            )
        found[stage] = ArtifactRef.model_validate(published)
    return found


def question(
    run: RunInfo, config: PipelineConfig, made: Mapping[Stage, ArtifactRef], pages: Mapping[Stage, str | None]
) -> tuple[str, str]:
    """Return subject and Markdown body: counts, cost, examples and the page of each stage that made data."""
    manifests = {stage: read_manifest(ref) for stage, ref in made.items()}
    told = ", ".join(words for manifest in manifests.values() if (words := made_rows(manifest.ledger)))
    parts = [
        f"Models of run {plain(run.name)} have made {told or 'data'}. Nothing of it is curated or trained on before "
        "you decide. Rules have dropped what is certainly useless; only a reader sees whether the rest is right. The "
        "texts are as the models wrote them, and may offend.",
        _rules(config),
    ]
    for stage, ref in made.items():
        drawn = draw_samples(ref, stage, number=config.review.num_samples)
        parts += _told(stage, ref, manifests[stage], drawn, page=pages.get(stage) or "")
    return f"{one_line(run.name)}: use {told or 'the data that its models made'}?", "\n\n".join(filter(None, parts))


def _rules(config: PipelineConfig) -> str:
    return (
        "- **Approve**: the run goes on, and the data is curated with the rest.\n"
        "- **Reject**: the run fails here, with your comment as the reason. What was made is kept.\n"
        f"- **No answer within {config.review.timeout_hours:g} hours** counts as a rejection."
    )


def _told(stage: Stage, ref: ArtifactRef, manifest: Manifest, drawn: Drawn, *, page: str) -> list[str]:
    where = link(f"The page of {stage.value}", page) if page else f"The page of {stage.value}"
    ends = "shows more of it, and what was dropped" + ("." if page else f": {code(f'{ref.uri}/{GRAPH[stage].page}')}.")
    return [
        f"## {stage.value.capitalize()}: {made_rows(manifest.ledger) or 'nothing counted'}",
        f"{where} {ends}",
        _counts(manifest),
        _costs(manifest),
        f"### {len(drawn.samples)} of {drawn.total} accepted examples",
        drawn.left_out,
        *(_example(number, sample.texts) for number, sample in enumerate(drawn.samples, start=1)),
    ]


def _counts(manifest: Manifest) -> str:
    rows = []
    for step in step_counts(manifest.ledger):
        lost = sorted(step.dropped.items(), key=lambda loss: -loss[1])
        reasons = ", ".join(f"{plain(reason.replace('_', ' '))} {count:,}" for reason, count in lost)
        rows.append([plain(step.name), f"{step.entered:,}", f"{step.kept:,}", reasons or "–"])
    return table(["step", "in", "kept", "dropped"], rows) if rows else ""


def _costs(manifest: Manifest) -> str:
    rows = [
        [
            plain(f"{one.does}: {one.model}" if one.model else one.does),
            f"{one.requests:,}",
            f"{one.prompt_tokens:,}",
            f"{one.answer_tokens:,}",
            "–" if one.cost is None else f"{one.cost:,.2f}",
        ]
        for one in spent(manifest.ledger)
    ]
    return table(["asked", "requests", "prompt tokens", "answer tokens", "cost"], rows) if rows else ""


def _example(number: int, texts: tuple[tuple[str, str], ...]) -> str:
    shown = [f"**{plain(name)}**\n\n{_text(text)}" for name, text in texts]
    return "\n\n".join([f"#### Example {number}", *shown])


def _text(text: str) -> str:
    more = len(text) - _LONGEST_TEXT
    return block(f"{text[:_LONGEST_TEXT]}\n… {more} more characters" if more > 0 else text or "(nothing)")


def rejected(record: ReviewRecord, config: PipelineConfig) -> MadeDataRejected:
    """The exception that ends the run, with who rejected the data and why."""
    if record.answer.verdict is Verdict.TIMED_OUT:
        hours = config.review.timeout_hours
        return MadeDataRejected(
            f"No person answered within {hours:g} hours whether to use the data that {_names(record)} made, which "
            "counts as a rejection. Nothing was curated or trained.",
            advice=f"Clear {REVIEW_TASK!r} to ask again, or trigger the run with a longer review.timeout_hours or "
            "without review_made_data: what was made is not made again.",
        )
    return MadeDataRejected(
        f"The data that {_names(record)} made was {one_line(record.summary())}. Nothing was curated or trained.",
        advice="Change what makes it (principles, sources, models, limits of acceptance) and trigger the run again, or "
        f"clear {REVIEW_TASK!r} to ask once more.",
    )


def _names(record: ReviewRecord) -> str:
    return " and ".join(record.artifacts)


def keep(store: "Store", run_id: str, record: ReviewRecord) -> None:
    """Write the record; one of an earlier question of the run is put aside, unless the same answer wrote it."""
    key, told = review_key(run_id), record.model_dump_json(indent=1).encode()
    try:
        before = store.read_bytes(key)
    except FileNotFoundError:
        before = told
    if before != told:
        number = 1
        while store.exists(aside := review_key(run_id, REVIEW_RECORD.replace(".", f"-{number}."))):
            number += 1
        store.write_bytes(aside, before)
    store.write_bytes(key, told)


def tell_mlflow(run: RunInfo, record: ReviewRecord) -> None:
    """Put the answer on the parent run and on the runs that made the data. Warns when MLflow is away."""
    from operators.mlflow import MlflowServer, MlflowUnavailableError
    from stages.config import mlflow_limits as limits
    from stages.config.mlflow import tracking_server

    if not (tracking_uri := tracking_server()):
        return
    told = limits.shortened(record.summary(), limits.TAG_VALUE)
    asked = (run.parent_run_id, *(ref.mlflow_run_id for ref in record.artifacts.values()))
    runs = [mlflow_run for mlflow_run in asked if mlflow_run]
    try:
        with MlflowServer(tracking_uri) as server:
            for mlflow_run in runs:
                server.set_tag(mlflow_run, f"athanor.{REVIEW_TASK}", told)
            for mlflow_run in runs:
                server.log_text(mlflow_run, f"review-{run.run_id}.json", record.model_dump_json(indent=1))
    except MlflowUnavailableError as error:
        logger.warning("MLflow does not have the answer of %s: %s", REVIEW_TASK, error)
