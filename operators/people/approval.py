"""The task between `evaluate` and `promote` where a person decides whether the aligned model becomes champion.

It asks on Airflow's page of required actions and occupies neither worker nor trigger while it waits. Unlike Airflow's
own ApprovalOperator, a rejection skips nothing: `promote` registers the rejected models as candidates, with the
decision in their tags, and the report is made. No answer in time is a rejection that says so.
"""

from collections.abc import Mapping
from datetime import timedelta
from typing import Any

from airflow.providers.standard.operators.hitl import ApprovalOperator, HITLOperator
from airflow.sdk import Param
from airflow.sdk.exceptions import AirflowSkipException

from operators.failures import StageConfigFailed, as_stage_failures
from operators.links import mlflow_run_page
from operators.people.asking import ask_once, comment_of, name_of, with_usable_fields
from stages.artifacts.manifests import read_file, read_manifest, settings_digest
from stages.config.closing import PREFERENCE_ACCURACY, SCORE, WIN_RATE, Approval, Sample, Verdict, read_samples
from stages.config.decision import CHAMPION, Candidate, Champion, decide_by_numbers
from stages.config.decision_table import HEAD, decision_rows, label_of, suite_rows
from stages.config.evaluation import CHAMPION_ROLE, Evaluation
from stages.config.graph import Stage, aligned_models, registered_name, trained_stages
from stages.config.markdown import block, code, link, plain, table
from stages.config.metrics import EVALUATION_METRICS
from stages.config.mlflow import tracking_server
from stages.config.pipeline import PipelineConfig
from stages.config.records import parse_object
from stages.config.request import ArtifactRef, RunInfo
from stages.config.servers import is_web_address
from stages.config.text import one_line

_NUM_SAMPLES = 4
_SCORES = "Scores come from this run's reward model: they say how well a model pleases it, not how good it is."
_LONGEST_PROMPT, _LONGEST_ANSWER = 2_000, 4_000
_BETTER = {metric.key: metric.arrow for metric in EVALUATION_METRICS}
"""Which way is better; distances and lengths are neither."""


class PromotionApproval(ApprovalOperator):
    """Ask a person; return the Approval as JSON. Skips itself unless the run has `promotion=approval`."""

    ui_color = "#f7ead7"

    def __init__(self, *, resolve_task_id: str = "resolve", store_uri: str = "", **kwargs: Any) -> None:
        kwargs.setdefault("subject", "Promote the aligned model to champion?")
        kwargs["params"] = {"comment": comment_field()}  # in place of the DAG's, which Airflow passes here
        kwargs.setdefault("response_timeout", timedelta(days=7))  # until the run's configuration is read
        super().__init__(defaults=self.REJECT, **kwargs)
        self.resolve_task_id = resolve_task_id
        self.store_uri = store_uri

    def execute(self, context: Any) -> Any:
        from operators.prepare import asks_for_approval, load_config
        from stages.artifacts.addresses import open_default_store

        ti = context["ti"]
        with as_stage_failures():
            run = RunInfo.model_validate(ti.xcom_pull(task_ids=self.resolve_task_id))
            config = load_config(open_default_store(self.store_uri), run)
            if not asks_for_approval(config):
                raise AirflowSkipException(
                    f"this run asks no person (promotion={config.promote.promotion}, "
                    f"alignment={config.alignment}, last_stage={config.last_stage})"
                )
            evaluated = ti.xcom_pull(task_ids=Stage.EVALUATE.value)
            if evaluated is None:
                raise StageConfigFailed(
                    "There is nothing to decide on: task 'evaluate' left no artifact.",
                    advice="Clear 'evaluate' together with its downstream tasks.",
                )
            self.subject, self.body = question(run, config, ArtifactRef.model_validate(evaluated))
        self.response_timeout = timedelta(hours=config.promote.approval_timeout_hours)
        return ask_once(self, context, super().execute)

    def execute_complete(self, context: Any, event: dict[str, Any]) -> dict[str, Any]:
        """Turn the answer into an Approval; past ApprovalOperator, which would skip `promote` after a rejection."""
        timed_out = bool(event.get("timedout"))
        answer = HITLOperator.execute_complete(self, context, with_usable_fields(self, event))
        approval = read_answer(answer, timed_out=timed_out)
        self.log.info("%s by %s. %s", approval.verdict, approval.by or "no user", one_line(approval.comment))
        return approval.model_dump(mode="json")


def comment_field() -> Param:
    """Why a person decides so, next to the choice."""
    text = "Why; it is kept with the decision."
    return Param("", source="task", type=["string", "null"], title="Comment", description=text)


def read_answer(answer: Mapping[str, Any], *, timed_out: bool) -> Approval:
    """Turn what Airflow returns into the record of who decided what."""
    approved = answer["chosen_options"] == [ApprovalOperator.APPROVE]
    return Approval(
        verdict=Verdict.TIMED_OUT if timed_out else Verdict.APPROVED if approved else Verdict.REJECTED,
        by="" if timed_out else name_of(answer),
        at=answer["responded_at"].isoformat(timespec="seconds"),
        comment=comment_of(answer),
    )


def question(run: RunInfo, config: PipelineConfig, evaluated: ArtifactRef) -> tuple[str, str]:
    """Return subject and Markdown body: the numbers of every model, some answers side by side, and where to look."""
    report = parse_object(read_file(evaluated, "metrics.json"), f"{evaluated.uri}/metrics.json")
    samples = read_samples(read_file(evaluated, "samples.json"), evaluated.uri)
    manifest = read_manifest(evaluated)
    evaluation = Evaluation.from_report(report, settings_digest=settings_digest(manifest), uri=evaluated.uri)
    known = [spec.role for spec in trained_stages() if not spec.scores] + [CHAMPION_ROLE]
    models: dict[str, Mapping[str, Any]] = {role: report["models"][role] for role in known if role in report["models"]}
    made = {entry.role: entry.fingerprint for entry in manifest.inputs}
    aligned = [spec.role for spec in aligned_models() if spec.role in models]
    candidates = [Candidate(role, made.get(role, "")) for role in aligned]
    champion, note = _champion(config.promote.run_name, evaluation)
    numbers = decide_by_numbers(candidates, champion, evaluation, config.promote)
    proposed = label_of(numbers.chosen) if numbers.chosen else ""
    parts = [
        f"Run {plain(run.name)}, proposed: **{proposed or 'none'}**, "
        + ("the best of its aligned models." if len(aligned) > 1 else "its aligned model."),
        f"By the numbers it would {'' if numbers.promoted else '**not** '}become champion: {plain(numbers.reason)}. "
        f"{note}",
        _rules(config),
        "### What decides",
        table(HEAD, [[plain(cell) for cell in row] for row in decision_rows(numbers)]),
        "Differences are the model minus what it is compared with, item by item. Needed: so many items would show the "
        f"difference with power {config.promote.power:g}.",
        *_suites(evaluation, list(models)),
        "### Measured on held-out data",
        _metrics_table(models),
        "↑ higher is better, ↓ lower is better.",
        _SCORES if any(WIN_RATE in metrics for metrics in models.values()) else "",
        f"### Answers side by side ({min(_NUM_SAMPLES, len(samples))} of {len(samples)} kept)",
        *(_sample(sample, list(models)) for sample in samples[:_NUM_SAMPLES]),
        "### Evidence",
        _links(run, evaluated),
    ]
    subject = f"{one_line(run.name)}: promote the {proposed or 'aligned'} model to champion?"
    return subject, "\n\n".join(part for part in parts if part)


def _suites(evaluation: Evaluation, roles: list[str]) -> list[str]:
    """Every suite with what each model got; nothing for evaluations without."""
    if not evaluation.suites:
        return []
    shown = [role for role in roles if any(role in suite.roles for suite in evaluation.suites.values())]
    rows = [[plain(cell) for cell in row] for row in suite_rows(evaluation.suites, shown)]
    return ["### Suites, with 95 % intervals", table(["", *map(label_of, shown)], rows)]


def _rules(config: PipelineConfig) -> str:
    hours = config.promote.approval_timeout_hours
    return (
        "- **Approve**: the model becomes `champion`, the present champion `previous`. Your decision overrides the "
        "numbers.\n"
        "- **Reject**: the models are registered as `candidate`, never `champion`; all evidence is kept.\n"
        f"- **No answer within {hours:g} hours** counts as a rejection and is recorded as timed out.\n\n"
        "Who decided, when, and the comment stay with the models in MLflow and in the manifest of `promote`."
    )


def _champion(run_name: str, evaluation: Evaluation) -> tuple[Champion | None, str]:
    """Return the present champion, and a sentence about it; where it is not known, the one that was measured."""
    from operators.mlflow import MlflowServer, MlflowUnavailableError

    seen = evaluation.champion
    measured = Champion(seen.version, seen.fingerprint, seen.digest) if seen and not seen.missing else None
    tracking_uri = tracking_server()
    if not tracking_uri:
        return measured, "Who is champion now is not known here: no MLflow server is configured."
    name = registered_name(run_name, aligned_models()[0])
    try:
        with MlflowServer(tracking_uri) as server:
            found = server.model_version(name, alias=CHAMPION)
    except MlflowUnavailableError as error:
        return measured, f"Who is champion now is not known: {plain(str(error), at_most=300)}"
    if found is None:
        return None, f"{plain(name)} has no champion yet."
    champion = Champion.from_tags(found.version, found.tags)
    return champion, f"The champion is version {plain(found.version)} of {plain(name)}."


def _metrics_table(models: Mapping[str, Mapping[str, Any]]) -> str:
    names = sorted({name for metrics in models.values() for name in metrics}, key=_importance)
    head = ["", *map(label_of, models)]
    rows = [
        [
            f"{plain(name)} {_BETTER.get(name, '')}".rstrip(),
            *(_number(metrics.get(name)) for metrics in models.values()),
        ]
        for name in names
    ]
    return table(head, rows)


def _importance(name: str) -> tuple[int, str]:
    first = (WIN_RATE, SCORE, PREFERENCE_ACCURACY, "eval/kl", "eval/perplexity")
    return (first.index(name) if name in first else len(first), name)


def _number(value: Any) -> str:
    try:
        return f"{float(value):.4g}"
    except (TypeError, ValueError, OverflowError):
        return "–"


def _sample(sample: Sample, roles: list[str]) -> str:
    answers, scores = [role for role in roles if role in sample.responses], sample.scores
    labels = {role: label_of(role) for role in answers}
    head = [f"{label} ({_number(scores[role])})" if role in scores else label for role, label in labels.items()]
    texts = [plain(sample.responses[role], at_most=_LONGEST_ANSWER) or "*(empty)*" for role in answers]
    prompt = sample.prompt
    if len(prompt) > _LONGEST_PROMPT:
        prompt = f"{prompt[:_LONGEST_PROMPT]}\n… {len(prompt) - _LONGEST_PROMPT} more characters"
    return f"{block(prompt)}\n\n{table(head, [texts])}"


def _links(run: RunInfo, evaluation: ArtifactRef) -> str:
    lines = [f"- evaluation artifact: {code(evaluation.uri)}"]
    if tracking_uri := tracking_server():
        if run.parent_run_id:
            page = mlflow_run_page(tracking_uri, run.parent_run_id)
            lines.append(f"- {link('this run in MLflow', page)}, every stage below it")
        if evaluation.mlflow_run_id:
            page = mlflow_run_page(tracking_uri, evaluation.mlflow_run_id)
            lines.append(f"- {link('the evaluation in MLflow', page)}")
    if is_web_address(run.airflow_url):
        lines.append(f"- {link('this run in Airflow', run.airflow_url)}")
    return "\n".join([*lines, "- the report follows your decision, whichever it is"])
