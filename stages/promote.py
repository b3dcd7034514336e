"""`promote`: register the run's models in MLflow by role and decide whether the aligned model becomes champion.

The rules are in `stages.config.decision`, what MLflow is told in `stages.tracking.registry`. A rejected model is
registered like every other, with the decision and its numbers in its tags.

Unlike the other stages this one cannot do its work without MLflow: an outage is a failure, and Airflow retries.
"""

import json
import logging
from dataclasses import asdict
from pathlib import Path

from stages.artifacts.addresses import artifact_uri
from stages.artifacts.manifests import read_manifest, settings_digest
from stages.config.closing import PREFERENCE_ACCURACY, SCORE, WIN_RATE, PromoteConfig
from stages.config.decision import CANDIDATE, CHAMPION, PREVIOUS, Candidate, Champion, Decision, decide
from stages.config.evaluation import Evaluation
from stages.config.graph import GRAPH, Stage, aligned_models, trained_stages
from stages.config.mlflow_limits import VERSION_DESCRIPTION
from stages.config.records import parse_object
from stages.config.request import Manifest
from stages.job.context import StageContext, StageOutcome
from stages.reporting.evidence import evidence_of
from stages.reporting.model_card import CardFacts, card_summary, model_card
from stages.reporting.shapes import Promoted
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
        evaluation = read_evaluation(context.input_dir("evaluation"), read_manifest(measured), uri=measured.uri)
    # Waiting for this stage's own run also waits until what earlier stages could not deliver to MLflow is there.
    run_id = context.tracker.wait_run_id(_ATTACH_SECONDS)
    with outage_is_infrastructure():
        registry = Registry(config.run_name, context.run.experiment, config.approval)
        registered = []
        for done, (role, ref) in enumerate(models.items(), start=1):
            registered.append(registry.register(role, ref, evaluation))
            context.progress(done, len(models), unit="model")
        champion, decision = _decide(registry, registered, evaluation, config)
        _move_aliases(registry, registered, champion, decision)
        if measured is not None and run_id is not None:
            registry.log_evaluation(registered, evaluation, measured=measured, run_id=run_id)
    record = {
        **decision.record(),
        "previous_champion": asdict(champion) if champion else None,
        "approval": config.approval.model_dump(mode="json") if config.approval else None,
        "evaluation": asdict(evaluation),
        "models": [asdict(model) for model in registered],
    }
    text = json.dumps(record, indent=1, ensure_ascii=False)
    (context.output_dir / "promotion.json").write_text(text, encoding="utf-8")
    with outage_is_infrastructure():
        _attach_cards(context, registry, registered, Promoted.model_validate_json(text))
    logger.info("promotion: %s", decision.reason)
    return StageOutcome(metrics=_outcome_metrics(decision, registered, evaluation.of(decision.chosen or "")))


def _attach_cards(context: StageContext, registry: Registry, registered: list[Registered], promotion: Promoted) -> None:
    """Write a card for each version: into this artifact, into the pipeline run, and in short as its description."""
    folder = context.output_dir / "cards"
    folder.mkdir()
    uri = artifact_uri(context.store, GRAPH[Stage.PROMOTE].kind, context.fingerprint)
    measured, run_id = context.inputs.get("evaluation"), context.run.run_id
    for model in registered:
        evidence = evidence_of(context.inputs[model.role], evaluation=measured, promotion=promotion, run_id=run_id)
        facts = CardFacts(f"{model.name} version {model.version}", evidence, is_public=False)
        path = folder / f"{model.role}.md"
        path.write_text(model_card(facts), encoding="utf-8")
        name = f"model-cards/{model.name}-{model.version}.md"
        context.tracker.log_artifact(path, name, parent=True)
        whole = f"{name} of the pipeline run, and {uri}/cards/{path.name}"
        registry.describe(model, card_summary(facts, whole=whole, at_most=VERSION_DESCRIPTION))


def read_evaluation(folder: Path, manifest: Manifest, *, uri: str = "") -> Evaluation:
    """Read metrics.json of the evaluation artifact at `uri`."""
    report = parse_object((folder / "metrics.json").read_bytes(), "metrics.json of the evaluation")
    return Evaluation.from_report(report, settings_digest=settings_digest(manifest), uri=uri)


def _decide(
    registry: Registry, registered: list[Registered], evaluation: Evaluation, config: PromoteConfig
) -> tuple[Champion | None, Decision]:
    """Return the champion of before and what was decided about the aligned models; they compete for one name."""
    models = {model.role: model for model in registered}
    aligned = [models[spec.role] for spec in aligned_models() if spec.role in models]
    candidates = [Candidate(model.role, model.fingerprint, model.rolled_back) for model in aligned]
    champion = registry.champion(aligned[0].name) if aligned else None
    return champion, decide(candidates, champion, evaluation, config)


def _move_aliases(
    registry: Registry, registered: list[Registered], champion: Champion | None, decision: Decision
) -> None:
    """PPO and DPO share a registered model, so only the chosen one of them is its candidate, and may be champion."""
    competing = {spec.role for spec in aligned_models()}
    for model in registered:
        if model.role not in competing:
            registry.set_alias(model.name, CANDIDATE, model.version)
        elif model.role == decision.chosen:
            registry.set_alias(model.name, CANDIDATE, model.version)
            if champion and champion.fingerprint == model.fingerprint:
                continue  # what made it champion stays on record, whatever this run or a person says about it now
            registry.record_decision(model, decision)
            if decision.promoted:
                # `previous` first: a crash in between leaves a champion, and the repeated run completes the move.
                if champion:
                    registry.set_alias(model.name, PREVIOUS, champion.version)
                registry.set_alias(model.name, CHAMPION, model.version)


def _outcome_metrics(decision: Decision, registered: list[Registered], chosen: dict[str, float]) -> dict[str, float]:
    metrics = {
        "promotion/promoted": float(decision.promoted),
        "promotion/registered": float(len(registered)),
        "promotion/new_versions": float(sum(model.is_new for model in registered)),
    }
    ruling = decision.ruling
    if ruling and ruling.primary and (found := ruling.primary.compared):
        metrics |= {
            "promotion/difference": found.difference,
            "promotion/difference_low": found.low,
            "promotion/difference_high": found.high,
            "promotion/p": found.p,
            "promotion/items": float(found.items),
        }
    return metrics | {key: chosen[key] for key in (WIN_RATE, SCORE, PREFERENCE_ACCURACY) if key in chosen}
