"""`promote`: register the run's models in MLflow by role and decide whether the aligned model becomes champion.

The current champion and the new model are comparable when their versions carry the same `evaluation.data_digest`,
`evaluation.reward_fingerprint` and `evaluation.settings_digest`: then both were scored by the same judge on the same
prompts in the same way, and the higher `eval/score_mean` wins. Otherwise scores mean nothing to each other; the
decision falls back to the win rate of the new model against its own SFT model and says so in its reason.

With `promotion=approval` a person has decided before this stage starts, and that decision stands, whatever the numbers
say; what they say is told beside it. A rejected model is registered like every other, with the decision in its tags.

Unlike the other stages this one cannot do its work without MLflow: an outage is a failure, and Airflow retries.
"""

import json
import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.artifacts.manifests import read_manifest, settings_digest
from stages.config.closing import SCORE, WIN_RATE, Approval, PromoteConfig, Verdict, strongest
from stages.config.errors import ConfigError, DataError, StageError
from stages.config.params import Promotion
from stages.config.request import ArtifactRef, Manifest
from stages.job.context import StageContext, StageOutcome
from stages.lineage.graph import started_from
from stages.lineage.tags import lineage_tags

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

CANDIDATE, CHAMPION, PREVIOUS = "candidate", "champion", "previous"
_REGISTERED_ROLE = {"base": "base", "sft": "sft", "reward": "reward", "ppo": "aligned", "dpo": "aligned"}
_ALIGNED = ("ppo", "dpo")

_ATTACH_SECONDS = 20.0

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Conditions:
    """Under which a score was measured; only scores of equal, fully known conditions compare."""

    data_digest: str = ""
    reward_fingerprint: str = ""
    settings_digest: str = ""

    def tags(self) -> dict[str, str]:
        return {f"evaluation.{name}": value for name, value in asdict(self).items() if value}

    @staticmethod
    def from_tags(tags: Mapping[str, str]) -> "Conditions":
        return Conditions(**{field.name: tags.get(f"evaluation.{field.name}", "") for field in fields(Conditions)})

    def allow_comparison(self, other: "Conditions") -> bool:
        return all(asdict(self).values()) and self == other


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` measured: metrics by model, and under which conditions."""

    metrics: dict[str, dict[str, float]]
    conditions: Conditions = Conditions()

    def of(self, role: str) -> dict[str, float]:
        return self.metrics.get(role, {})


@dataclass(frozen=True)
class Registered:
    """One model of the run in the registry."""

    role: str
    name: str
    version: str
    model_id: str
    fingerprint: str
    is_new: bool


@dataclass(frozen=True)
class Champion:
    """The champion before this run, with the evaluation that its version's tags record."""

    version: str
    fingerprint: str
    metrics: dict[str, float]
    conditions: Conditions


@dataclass(frozen=True)
class Decision:
    """Whether the chosen aligned model becomes champion, and why in words for people."""

    promoted: bool
    reason: str
    comparison: str
    """`score`, `win_rate`, `same_model`, `person` or `none`: what decided."""


def run(context: StageContext) -> StageOutcome:
    """Register, choose, decide, move aliases; writes promotion.json."""
    config = context.config
    if not isinstance(config, PromoteConfig):
        raise AssertionError(f"promote got a {type(config).__name__}")
    models = {role: context.inputs[role] for role in _REGISTERED_ROLE if role in context.inputs}
    evaluation = Evaluation({})
    if "evaluation" in context.inputs:
        evaluation = read_evaluation(context.input_dir("evaluation"), read_manifest(context.inputs["evaluation"]))
    chosen = choose_aligned([role for role in _ALIGNED if role in models], evaluation)
    run_id = context.tracker.wait_run_id(_ATTACH_SECONDS)  # by then what earlier stages could not deliver has been
    with _outage_is_infrastructure():
        registry = Registry(config.run_name, context.run.experiment, config.approval)
        registered = []
        for done, (role, ref) in enumerate(models.items(), start=1):
            registered.append(registry.register(role, ref, evaluation))
            context.progress(done, len(models), unit="model")
        champion, decision = _decide_and_move_aliases(registry, registered, chosen, evaluation, config)
        registry.log_evaluation(registered, evaluation, run_id=run_id, context=context)
    record = {
        "promoted": decision.promoted,
        "reason": decision.reason,
        "comparison": decision.comparison,
        "chosen": chosen,
        "previous_champion": asdict(champion) if champion else None,
        "approval": config.approval.model_dump(mode="json") if config.approval else None,
        "evaluation": asdict(evaluation),
        "models": [asdict(model) for model in registered],
    }
    text = json.dumps(record, indent=1, ensure_ascii=False)
    (context.output_dir / "promotion.json").write_text(text, encoding="utf-8")
    logger.info("promotion: %s", decision.reason)
    return StageOutcome(metrics=_outcome_metrics(decision, registered, evaluation.of(chosen or "")))


def read_evaluation(folder: Path, manifest: Manifest) -> Evaluation:
    """Read metrics.json of an evaluation artifact; what is not a finite number ranks nothing and is left out."""
    data = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    if not isinstance(data.get("models"), dict):
        raise DataError(
            "metrics.json of the evaluation has no object `models`",
            advice="Clear the evaluate task, so that it is made again.",
        )
    return Evaluation(
        metrics={
            role: _finite(values) for role, values in {**data["models"], "reward": data.get("reward") or {}}.items()
        },
        conditions=Conditions(
            data_digest=str((data.get("data") or {}).get("digest") or ""),
            reward_fingerprint=str(data.get("reward_fingerprint") or ""),
            settings_digest=settings_digest(manifest),
        ),
    )


def choose_aligned(roles: list[str], evaluation: Evaluation) -> str | None:
    """Return the aligned model with the higher win rate against SFT; ties go by score, then by order."""
    return strongest(roles, evaluation.metrics)


def decide(
    metrics: dict[str, float],
    fingerprint: str,
    evaluation: Evaluation,
    champion: Champion | None,
    config: PromoteConfig,
) -> Decision:
    """Decide on the chosen aligned model; pure, so that every reason can be tested."""
    if config.promotion is Promotion.NEVER:
        return Decision(False, "promotion=never: the models are registered as candidates only", "none")
    by_numbers = _decide_by_numbers(metrics, fingerprint, evaluation, champion, config)
    if config.promotion is not Promotion.APPROVAL:
        return by_numbers
    if config.approval is None:
        raise ConfigError(
            "promotion=approval, and nobody has been asked: promote.approval is empty",
            advice="Clear the task `approve` together with its downstream tasks.",
        )
    return _decide_by_person(config.approval, by_numbers)


def _decide_by_person(approval: Approval, by_numbers: Decision) -> Decision:
    """The person's word stands; the champion of before stays champion, also when it is the model that was rejected."""
    promoted = approval.verdict is Verdict.APPROVED
    if approval.verdict is Verdict.TIMED_OUT:
        said = f"nobody decided until {approval.at}, which counts as a rejection"
    else:
        said = f"{approval.verdict.value} by {approval.by or 'somebody without a name'} at {approval.at}"
    reason = f"{said}: {approval.comment}" if approval.comment else said
    if by_numbers.comparison == "same_model":
        return Decision(promoted, f"{reason}; {by_numbers.reason}", "same_model" if promoted else "person")
    agree = "agree" if by_numbers.promoted == promoted else "said otherwise"
    return Decision(promoted, f"{reason}; the numbers {agree}: {by_numbers.reason}", "person")


def _decide_by_numbers(
    metrics: dict[str, float],
    fingerprint: str,
    evaluation: Evaluation,
    champion: Champion | None,
    config: PromoteConfig,
) -> Decision:
    if champion and champion.fingerprint == fingerprint:
        return Decision(True, f"the model is champion already (version {champion.version})", "same_model")
    if (
        champion
        and evaluation.conditions.allow_comparison(champion.conditions)
        and SCORE in metrics
        and SCORE in champion.metrics
    ):
        new, old = metrics[SCORE], champion.metrics[SCORE]
        verb = "beats" if new > old else "does not beat"
        reason = (
            f"mean reward score {new:.4f} {verb} {old:.4f} of the champion (version {champion.version}) "
            "on the same prompts with the same reward model"
        )
        return Decision(new > old, reason, "score")
    if champion is None:
        why = "there is no champion yet"
    else:
        why = (
            f"the champion (version {champion.version}) was evaluated on other data, by another reward model or in "
            "another way, so its scores do not compare"
        )
    win_rate = metrics.get(WIN_RATE)
    if win_rate is None:
        return Decision(False, f"{why}, and the evaluation has no win rate against SFT for the aligned model", "none")
    wins = win_rate >= config.min_win_rate
    relation = "reaches" if wins else "is below"
    reason = f"{why}; win rate {win_rate:.3f} against its own SFT model {relation} min_win_rate={config.min_win_rate:g}"
    return Decision(wins, reason, "win_rate")


def _decide_and_move_aliases(
    registry: "Registry",
    registered: list[Registered],
    chosen: str | None,
    evaluation: Evaluation,
    config: PromoteConfig,
) -> tuple[Champion | None, Decision]:
    aligned = next((model for model in registered if model.role == chosen), None)
    for model in registered:
        if model.role not in _ALIGNED or model is aligned:
            registry.set_alias(model.name, CANDIDATE, model.version)
    if aligned is None:
        return None, Decision(False, "the run has no aligned model", "none")
    champion = registry.champion(aligned.name)
    decision = decide(evaluation.of(aligned.role), aligned.fingerprint, evaluation, champion, config)
    if decision.promoted and decision.comparison != "same_model":
        # `previous` first: a crash between the two calls leaves a champion, and the repeated run completes the move.
        if champion:
            registry.set_alias(aligned.name, PREVIOUS, champion.version)
        registry.set_alias(aligned.name, CHAMPION, aligned.version)
    return champion, decision


class Registry:
    """The registered models `<run name>-base, -sft, -reward, -aligned`; every step looks before it makes."""

    def __init__(self, run_name: str, experiment: str, approval: Approval | None = None) -> None:
        from stages.tracking.client import connect, find_or_create_experiment

        self._run_name = run_name
        self._approval = approval
        self._client: MlflowClient = connect()
        self._experiment_id = find_or_create_experiment(self._client, experiment)

    def register(self, role: str, ref: ArtifactRef, evaluation: Evaluation) -> Registered:
        """Return the version of this artifact, made now unless it exists; evaluation tags become the latest."""
        from stages.tracking.client import clean_tags, find_or_create_model

        name = f"{self._run_name}-{_REGISTERED_ROLE[role]}"
        manifest = read_manifest(ref)
        model = find_or_create_model(self._client, self._experiment_id, manifest, ref.uri, self._run_name)
        tags = clean_tags(self._version_tags(role, manifest, ref, evaluation))
        version = self._find_version(name, manifest.fingerprint)
        is_new = version is None
        if version is None:
            self._ensure_registered_model(name)
            version = self._client.create_model_version(
                name,
                source=f"models:/{model.model_id}",
                run_id=model.source_run_id,
                tags=tags,
                model_id=model.model_id,
                await_creation_for=0,
            )
        else:
            # A new decision replaces the old one whole: an answer without a comment does not keep the comment before.
            for key in version.tags.keys() - tags.keys():
                if self._approval and key.startswith("approval."):
                    self._client.delete_model_version_tag(name, version.version, key)
            for key, value in tags.items():
                if version.tags.get(key) != value:
                    self._client.set_model_version_tag(name, version.version, key, value)
        return Registered(role, name, str(version.version), model.model_id, manifest.fingerprint, is_new)

    def _version_tags(self, role: str, manifest: Manifest, ref: ArtifactRef, evaluation: Evaluation) -> dict[str, str]:
        tags = {**lineage_tags(manifest, ref.uri), **self._airflow_tags(manifest), **evaluation.conditions.tags()}
        tags |= {key: repr(value) for key, value in evaluation.of(role).items()}
        if role in _ALIGNED:
            tags["alignment"] = role
        if self._approval:
            tags |= {f"approval.{name}": value for name, value in self._approval.model_dump(mode="json").items()}
        if ancestor := started_from(manifest):
            tags["lineage.started_from"] = ancestor
        return tags

    def _airflow_tags(self, manifest: Manifest) -> dict[str, str]:
        """Who built the artifact is on the run that built it; a hit is promoted by another run."""
        from mlflow.exceptions import MlflowException

        if manifest.mlflow_run_id is None:
            return {}
        try:
            tags = self._client.get_run(manifest.mlflow_run_id).data.tags
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return {}  # this MLflow is younger than the artifact
        return {key: value for key, value in tags.items() if key.startswith("airflow.")}

    def _find_version(self, name: str, fingerprint: str) -> "ModelVersion | None":
        from stages.tracking.client import tag_filter

        query = f"name = '{name}' and {tag_filter({'lineage.fingerprint': fingerprint})}"
        found = self._client.search_model_versions(query)
        return min(found, key=lambda version: int(version.version), default=None)

    def _ensure_registered_model(self, name: str) -> None:
        from mlflow.exceptions import MlflowException

        try:
            self._client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise

    def champion(self, name: str) -> Champion | None:
        """Return the current champion, None when no version has the alias."""
        version = self._client.get_registered_model(name).aliases.get(CHAMPION)
        if version is None:
            return None
        tags = self._client.get_model_version(name, version).tags
        return Champion(
            version=str(version),
            fingerprint=tags.get("lineage.fingerprint", ""),
            metrics=_finite({key: value for key, value in tags.items() if key.startswith("eval/")}),
            conditions=Conditions.from_tags(tags),
        )

    def set_alias(self, name: str, alias: str, version: str) -> None:
        self._client.set_registered_model_alias(name, alias, version)

    def log_evaluation(
        self, models: list[Registered], evaluation: Evaluation, *, run_id: str | None, context: StageContext
    ) -> None:
        """Show the evaluation on each LoggedModel, by dataset; without a run of its own there is nowhere to log it."""
        from mlflow.entities import Metric

        from stages.tracking.client import dataset_input, short_digest

        if run_id is None or "evaluation" not in context.inputs:
            return
        ref = context.inputs["evaluation"]
        made = int(
            datetime.fromisoformat(read_manifest(ref).created_at).timestamp() * 1000
        )  # the same time on every repetition: MLflow keeps one point
        digest = evaluation.conditions.data_digest or ref.digest
        data = dataset_input("held-out", ref.uri, digest, context="evaluation")
        self._client.log_inputs(run_id, datasets=[data])
        for model in models:
            metrics = [
                Metric(
                    key,
                    value,
                    made,
                    0,
                    model_id=model.model_id,
                    dataset_name="held-out",
                    dataset_digest=short_digest(digest),
                    run_id=run_id,
                )
                for key, value in evaluation.of(model.role).items()
            ]
            if metrics:
                self._client.log_batch(run_id, metrics=metrics)


def _outcome_metrics(decision: Decision, registered: list[Registered], chosen: dict[str, float]) -> dict[str, float]:
    metrics = {
        "promotion/promoted": float(decision.promoted),
        "promotion/registered": float(len(registered)),
        "promotion/new_versions": float(sum(model.is_new for model in registered)),
    }
    return metrics | {key: chosen[key] for key in (WIN_RATE, SCORE) if key in chosen}


def _finite(values: Mapping[str, Any]) -> dict[str, float]:
    numbers = {}
    for key, value in values.items():
        try:
            number = float(value)
        except (TypeError, ValueError):
            continue  # a nested table or a text of the evaluation is not a metric
        if math.isfinite(number):
            numbers[key] = number
    return numbers


@contextmanager
def _outage_is_infrastructure() -> Iterator[None]:
    """Give MLflow's errors the category that Airflow retries."""
    from mlflow.exceptions import MlflowException

    from stages.tracking.client import explain

    try:
        yield
    except MlflowException as error:
        raise StageError(
            f"models were not registered in MLflow: {explain(error)}",
            advice="Check that the MLflow server runs and is reachable from the Ray cluster; the task is retried.",
        ) from error
