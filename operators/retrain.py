"""Decides whether to retrain and on which data: compares the watched prefix with what the last retraining saw.

The watermark says that, and which preference data waits (`operators.pending`).
"""

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from operators.folders import RunOwner, find_folder, owners_of_before
from operators.given import find_version
from operators.mlflow import ModelVersion
from operators.pending import (
    Watermark,
    as_sentence,
    fault_in,
    put_aside,
    read_watermark,
    sort_out,
    write_watermark,
)
from operators.prepare import params_key
from operators.watcher import Listing, list_prefix
from stages.artifacts.addresses import open_default_store, run_key
from stages.artifacts.store import Store, read_json
from stages.config.errors import ConfigError, DataError
from stages.config.forms import RetrainParams
from stages.config.graph import pipeline_stages
from stages.config.nested import dotted_once
from stages.config.overrides import filled_by
from stages.config.pipeline import PipelineConfig
from stages.config.places import check_source
from stages.config.request import run_folder, safe_run_id, sha256_of
from stages.config.resolve import resolve

logger = logging.getLogger(__name__)

_PIPELINE = "llm_pipeline"
_LONGEST_RUN_ID = 240  # what the deployments let Airflow take


@dataclass(frozen=True)
class Skip:
    """No retraining, and why."""

    reason: str
    set_aside: dict[str, str] = field(default_factory=dict)
    """Preference data that has just been found unusable, and why."""


@dataclass(frozen=True)
class Go:
    """The conf to trigger the pipeline with, and the watermark once it has succeeded."""

    conf: dict[str, Any]
    watermark: Watermark
    reason: str
    set_aside: dict[str, str] = field(default_factory=dict)


def decide(params: RetrainParams, *, announced: Sequence[str] = ()) -> Skip | Go:
    """Decide by the state of store and registry alone; what triggered the run (cron, event, person) does not matter.

    `announced` are addresses of preference data from the asset's events. Raises ConfigError, and StageError when MLflow
    is unreachable.
    """
    store = open_default_store()
    prefix = params.documents or os.environ.get("ATHANOR_RETRAIN_WATCH", "")
    if not prefix:
        raise ConfigError(
            "documents is empty and ATHANOR_RETRAIN_WATCH is not set: there is nothing to retrain on",
            advice="Give documents as file:///folder or s3://bucket/prefix.",
        )
    check_source(prefix, field="documents")
    before = read_watermark(store, params.run_name)
    found = sort_out(
        before, announced=announced, given=params.preferences, take_back=params.take_back, forget=params.forget
    )
    if found.watermark != before:  # kept until a retraining succeeds, because an event comes only once
        write_watermark(store, params.run_name, found.watermark)
    address = f"models:/{params.run_name}-aligned@champion"
    champion = find_version(address)
    if champion is None:
        why = f"{address} does not exist: nothing to retrain. Run llm_pipeline until it promotes a model."
        return _skip(why, found.watermark, found.set_aside)
    listing = list_prefix(prefix)
    if not listing.num_objects:
        return _skip(f"{prefix} is empty.", found.watermark, found.set_aside)
    conf = _conf(params, champion, prefix, found.watermark.pending, store)
    refused = _refused(conf)
    after, set_aside = put_aside(found.watermark, refused), {**found.set_aside, **refused}
    if refused:
        write_watermark(store, params.run_name, after)
    fresh = after.pending
    if listing.digest == after.documents and not fresh and not params.force:
        why = f"Nothing new: {prefix} is as the last retraining saw it, and no preference data came."
        return _skip(why, after, set_aside)
    return Go(
        conf={**conf, "preferences": list(fresh)},
        watermark=Watermark(documents=listing.digest, preferences=(*after.preferences, *fresh)),
        reason=" ".join(filter(None, (_reason(prefix, listing, after, fresh), as_sentence(after.set_aside)))),
        set_aside=set_aside,
    )


def _skip(why: str, watermark: Watermark, set_aside: Mapping[str, str]) -> Skip:
    return Skip(" ".join(filter(None, (why, as_sentence(watermark.set_aside)))), dict(set_aside))


def _refused(conf: Mapping[str, Any]) -> dict[str, str]:
    """Return the preference data that `resolve` would refuse in the run; raises ConfigError when it is not the data."""
    try:
        resolve(conf)
    except ConfigError as error:
        resolve({**conf, "preferences": []})
        refused = {uri: reason for uri in conf["preferences"] if (reason := _refusal({**conf, "preferences": [uri]}))}
        if not refused:
            raise error from None
        return refused
    return {}


def _refusal(conf: Mapping[str, Any]) -> str:
    try:
        resolve(conf)
    except ConfigError as error:
        return error.message
    return ""


def _conf(
    params: RetrainParams, champion: ModelVersion, prefix: str, preferences: Sequence[str], store: Store
) -> dict[str, Any]:
    """The params of the champion's own run, with the champion as base model and previous data.

    The version is given instead of the alias, which may move before the pipeline starts. A champion whose run entered
    after pretraining is trained on in the same way: its run has no conversations to go on with after new text.
    """
    params_of = _params_of(champion, store)
    return {
        **params_of,
        "run_name": params.run_name,
        "base_model": champion.address,
        "continue_pretraining": not params_of.get("first_stage"),
        "previous_data": champion.address,
        "documents": [prefix],
        "instructions": [],
        "preferences": list(preferences),
        "override_gates": [],  # a person let the champion's run pass, not this one
        "override_reason": "",
        "overrides": {
            **_settings_of(params_of.get("overrides") or {}),
            "pretrain.max_epochs": params.max_epochs,
            **_by_path(params.overrides),
        },
    }


def _by_path(overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Overrides in one spelling, so that later ones replace earlier ones."""
    return {PipelineConfig.current_path(path): value for path, value in dotted_once(overrides, "overrides").items()}


def _settings_of(overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The overrides of the champion's run, without what earlier versions let them set: what Athanor fills, and what
    decides nothing any more."""
    found = _by_path(overrides)
    gone = {path: why for path in found if (why := PipelineConfig.instead_of(path))}
    for path, why in gone.items():
        logger.warning("The champion's run had %s=%r, which is no longer a setting. %s", path, found[path], why)
    if found.pop("gates.recompute", True) is not True:
        logger.warning(
            "The champion's run left out the jobs of its gates, for a reason of its own; this run starts them."
        )
    return {path: value for path, value in found.items() if path not in gone and not filled_by(path)}


def _params_of(champion: ModelVersion, store: Store) -> dict[str, Any]:
    dag_id = champion.tags.get("airflow.dag_id", _PIPELINE)
    run_id = champion.tags.get("airflow.run_id", "")
    key = params_key(run_folder(dag_id, run_id))
    before = safe_run_id(run_id)
    if before and not store.exists(key):
        # Whose a folder of before is, its requests say; they may be gone already.
        own = RunOwner(dag_id=dag_id, airflow_run_id=run_id)
        key = params_key(before) if all(owner == own for owner in owners_of_before(store, before)) else key
    try:
        params = read_json(store, key)
    except FileNotFoundError:
        raise ConfigError(
            f"{champion.address} was made by run {run_id!r}, which left no {key} in {store.root_uri}",
            advice="The champion must come from llm_pipeline with this store; run it once more with this version.",
        ) from None
    if not isinstance(params.get("overrides") or {}, dict):
        raise DataError(
            f"{store.root_uri}/{key} holds overrides that are no object; {champion.address} was made with it",
            advice="Restore it, or run llm_pipeline once more until it promotes a model.",
        )
    return params


def _reason(prefix: str, listing: Listing, before: Watermark, preferences: Sequence[str]) -> str:
    parts = []
    if listing.digest != before.documents:
        parts.append(f"{prefix} has changed ({listing.num_objects} objects, {listing.num_bytes} bytes)")
    if preferences:
        parts.append(f"new preference data: {', '.join(preferences)}")
    return "; ".join(parts) or "asked for by `force`"


def record(run_name: str, watermark: Mapping[str, Any]) -> None:
    """Record what a successful retraining has used. Data announced in the meantime stays pending."""
    store = open_default_store()
    done, now = Watermark.model_validate(watermark), read_watermark(store, run_name)
    pending = tuple(uri for uri in now.pending if uri not in done.preferences)
    update = {"pending": pending, "set_aside": now.set_aside}
    write_watermark(store, run_name, done.model_copy(update=update))


def set_aside_failed(decided: Mapping[str, Any] | None, airflow_run_id: str) -> dict[str, str]:
    """Set aside the preference data that a failed retraining blames; return it with the reason.

    Only a stage that failed with category `config` or `data` and names the source says that it is the source's fault.
    """
    if decided is None:
        return {}
    store, run_name = open_default_store(), decided["run_name"]
    folder, now = find_folder(store, _PIPELINE, pipeline_run_id(airflow_run_id)), read_watermark(store, run_name)
    used = set(Watermark.model_validate(decided["watermark"]).preferences) & set(now.pending)
    faults: dict[str, str] = {}
    for stage in pipeline_stages():
        key = run_key(folder, stage, "failure.json")
        if used and store.exists(key) and (blamed := fault_in(store.read_bytes(key), used)):
            faults[blamed[0]] = blamed[1]
    if faults:
        write_watermark(store, run_name, put_aside(now, faults))
        logger.warning("The run failed over its preference data. %s", as_sentence(faults))
    return faults


def pipeline_run_id(airflow_run_id: str) -> str:
    """Id of the pipeline run that a run of `retrain` triggers; a long one is cut, and stays one of its own."""
    whole = f"retrain__{airflow_run_id}"
    if len(whole) <= _LONGEST_RUN_ID:
        return whole
    return f"{whole[: _LONGEST_RUN_ID - 13]}-{sha256_of(whole.encode())[:12]}"


def tell(set_aside: Mapping[str, str], context: Any) -> None:
    """Log what has been set aside, and notify whoever is to know of runs that end."""
    from operators.notify import notify

    for uri, reason in set_aside.items():
        logger.warning("Set aside until a person looks at it: %s %s", uri, reason)
    if set_aside:
        notify("set_aside", context, sources=dict(set_aside))


def announced_data(events: Mapping[Any, Sequence[Any]], asset_name: str) -> list[str]:
    """Addresses in the extra of the asset's events that started this run; any user may write an event."""
    extras = [event.extra for asset, found in events.items() if asset.name == asset_name for event in found]
    found = [extra.get("uri") if isinstance(extra, Mapping) else None for extra in extras]
    addresses = [uri.strip() for uri in found if isinstance(uri, str) and uri.strip()]
    if len(addresses) < len(extras):
        logger.warning("%d of %d events of %s name no address.", len(extras) - len(addresses), len(extras), asset_name)
    return addresses
