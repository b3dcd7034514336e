"""`promote`: register the run's models in MLflow by role and decide whether the aligned model becomes champion.

The rules are in `stages.config.decision`, what MLflow is told in `stages.tracking.registry`. A rejected model is
registered like every other, with the decision in its tags.

Unlike the other stages this one cannot do its work without MLflow: an outage is a failure, and Airflow retries.
"""

import json
import logging
from dataclasses import asdict
from pathlib import Path

from stages.artifacts.manifests import read_manifest, settings_digest
from stages.config.closing import PREFERENCE_ACCURACY, SCORE, WIN_RATE, PromoteConfig
from stages.config.decision import (
    CANDIDATE,
    CHAMPION,
    PREVIOUS,
    Candidate,
    Champion,
    Decision,
    Evaluation,
    choose_aligned,
    decide,
)
from stages.config.graph import aligned_models, trained_stages
from stages.config.records import parse_object
from stages.config.request import Manifest
from stages.job.context import StageContext, StageOutcome
from stages.tracking.registry import Registered, Registry, outage_is_infrastructure

_ATTACH_SECONDS = 20.0

logger = logging.getLogger(__name__)


def run(context: StageContext) -> StageOutcome:
    """Register, choose, decide, move aliases; writes promotion.json."""
    config = context.config
    if not isinstance(config, PromoteConfig):
        raise AssertionError(f"promote got a {type(config).__name__}")
    models = {spec.role: context.inputs[spec.role] for spec in trained_stages() if spec.role in context.inputs}
    measured = context.inputs.get("evaluation")
    evaluation = Evaluation({})
    if measured is not None:
        evaluation = read_evaluation(context.input_dir("evaluation"), read_manifest(measured))
    chosen = choose_aligned([spec.role for spec in aligned_models() if spec.role in models], evaluation)
    # Waiting for this stage's own run also waits until what earlier stages could not deliver to MLflow is there.
    run_id = context.tracker.wait_run_id(_ATTACH_SECONDS)
    with outage_is_infrastructure():
        registry = Registry(config.run_name, context.run.experiment, config.approval)
        registered = []
        for done, (role, ref) in enumerate(models.items(), start=1):
            registered.append(registry.register(role, ref, evaluation))
            context.progress(done, len(models), unit="model")
        aligned = next((model for model in registered if model.role == chosen), None)
        _mark_candidates(registry, registered, aligned)
        champion, decision = _decide(registry, aligned, evaluation, config)
        if measured is not None and run_id is not None:
            registry.log_evaluation(registered, evaluation, measured=measured, run_id=run_id)
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
    """Read metrics.json of an evaluation artifact."""
    report = parse_object((folder / "metrics.json").read_bytes(), "metrics.json of the evaluation")
    return Evaluation.from_report(report, settings_digest=settings_digest(manifest))


def _mark_candidates(registry: Registry, registered: list[Registered], aligned: Registered | None) -> None:
    """PPO and DPO share a registered model, so only the chosen one of them gets its alias."""
    competing = {spec.role for spec in aligned_models()}
    for model in registered:
        if model is aligned or model.role not in competing:
            registry.set_alias(model.name, CANDIDATE, model.version)


def _decide(
    registry: Registry, aligned: Registered | None, evaluation: Evaluation, config: PromoteConfig
) -> tuple[Champion | None, Decision]:
    """Decide on the chosen aligned model and move the aliases; returns the previous champion as well."""
    if aligned is None:
        return None, Decision(False, "the run has no aligned model", "none")
    champion = registry.champion(aligned.name)
    candidate = Candidate(aligned.fingerprint, evaluation.of(aligned.role), evaluation.conditions)
    decision = decide(candidate, champion, config)
    if decision.promoted and decision.comparison != "same_model":
        # `previous` first: a crash between the two calls leaves a champion, and the repeated run completes the move.
        if champion:
            registry.set_alias(aligned.name, PREVIOUS, champion.version)
        registry.set_alias(aligned.name, CHAMPION, aligned.version)
    return champion, decision


def _outcome_metrics(decision: Decision, registered: list[Registered], chosen: dict[str, float]) -> dict[str, float]:
    metrics = {
        "promotion/promoted": float(decision.promoted),
        "promotion/registered": float(len(registered)),
        "promotion/new_versions": float(sum(model.is_new for model in registered)),
    }
    return metrics | {key: chosen[key] for key in (WIN_RATE, SCORE, PREFERENCE_ACCURACY) if key in chosen}
