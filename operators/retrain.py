"""Decides whether to retrain and on which data: compares the watched prefix with what the last retraining saw.

The watermark is `retrain/<run name>.json` in the artifact store: the digest of the listing and the preference data of
the last successful retraining, and preference data that has been announced since.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from operators.given import find_version
from operators.mlflow import ModelVersion
from operators.prepare import params_key
from operators.watcher import Listing, list_prefix
from stages.artifacts.addresses import open_default_store
from stages.artifacts.store import Store, read_json, write_json
from stages.config.base import Config
from stages.config.errors import ConfigError
from stages.config.forms import RetrainParams
from stages.config.request import safe_run_id


class Watermark(Config):
    """What retraining has seen."""

    documents: str = ""
    """Digest of the listing."""
    preferences: tuple[str, ...] = ()
    """Preference data that a retraining has used."""
    pending: tuple[str, ...] = ()
    """Announced preference data that no retraining has used yet."""


@dataclass(frozen=True)
class Skip:
    """No retraining, and why."""

    reason: str


@dataclass(frozen=True)
class Go:
    """The conf to trigger the pipeline with, and the watermark once it has succeeded."""

    conf: dict[str, Any]
    watermark: Watermark
    reason: str


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
    before = read_watermark(store, params.run_name)
    fresh = [uri for uri in dict.fromkeys((*before.pending, *announced, *params.preferences))]
    fresh = [uri for uri in fresh if uri not in before.preferences]
    if tuple(fresh) != before.pending:  # kept until a retraining succeeds, because an event comes only once
        before = before.model_copy(update={"pending": tuple(fresh)})
        _write_watermark(store, params.run_name, before)
    address = f"models:/{params.run_name}-aligned@champion"
    champion = find_version(address)
    if champion is None:
        return Skip(f"{address} does not exist: nothing to retrain. Run llm_pipeline until it promotes a model.")
    listing = list_prefix(prefix)
    if not listing.num_objects:
        return Skip(f"{prefix} is empty.")
    if listing.digest == before.documents and not fresh and not params.force:
        return Skip(f"Nothing new: {prefix} is as the last retraining saw it, and no preference data came.")
    return Go(
        conf=_conf(params, champion, prefix, fresh, store),
        watermark=Watermark(documents=listing.digest, preferences=(*before.preferences, *fresh)),
        reason=_reason(prefix, listing, before, fresh),
    )


def _conf(
    params: RetrainParams, champion: ModelVersion, prefix: str, preferences: Sequence[str], store: Store
) -> dict[str, Any]:
    """The params of the champion's own run, with the champion as base model and previous data.

    The version is given instead of the alias, which may move before the pipeline starts.
    """
    return {
        **_params_of(champion, store),
        "run_name": params.run_name,
        "base_model": champion.address,
        "continue_pretraining": True,
        "previous_data": champion.address,
        "documents": [prefix],
        "instructions": [],
        "preferences": list(preferences),
        "overrides": {
            **_params_of(champion, store).get("overrides", {}),
            "pretrain.max_epochs": params.max_epochs,
            **params.overrides,
        },
    }


def _params_of(champion: ModelVersion, store: Store) -> dict[str, Any]:
    run_id = safe_run_id(champion.tags.get("airflow.run_id", ""))
    try:
        return read_json(store, params_key(run_id))
    except FileNotFoundError:
        raise ConfigError(
            f"{champion.address} was made by run {run_id!r}, which left no {params_key(run_id)} in {store.root_uri}",
            advice="The champion must come from llm_pipeline with this store; run it once more with this version.",
        ) from None


def _reason(prefix: str, listing: Listing, before: Watermark, preferences: Sequence[str]) -> str:
    parts = []
    if listing.digest != before.documents:
        parts.append(f"{prefix} has changed ({listing.num_objects} objects, {listing.num_bytes} bytes)")
    if preferences:
        parts.append(f"new preference data: {', '.join(preferences)}")
    return "; ".join(parts) or "asked for by `force`"


def read_watermark(store: Store, run_name: str) -> Watermark:
    key = _watermark_key(run_name)
    return Watermark.model_validate(read_json(store, key)) if store.exists(key) else Watermark()


def record(run_name: str, watermark: Mapping[str, Any]) -> None:
    """Record what a successful retraining has used. Data announced in the meantime stays pending."""
    store = open_default_store()
    done = Watermark.model_validate(watermark)
    pending = tuple(uri for uri in read_watermark(store, run_name).pending if uri not in done.preferences)
    _write_watermark(store, run_name, done.model_copy(update={"pending": pending}))


def _write_watermark(store: Store, run_name: str, watermark: Watermark) -> None:
    write_json(store, _watermark_key(run_name), watermark.model_dump(mode="json"))


def _watermark_key(run_name: str) -> str:
    return f"retrain/{run_name}.json"


def announced_data(events: Mapping[Any, Sequence[Any]], asset_name: str) -> list[str]:
    """Addresses in the extra of the asset's events that started this run."""
    return [
        event.extra["uri"]
        for asset, found in events.items()
        if asset.name == asset_name
        for event in found
        if (event.extra or {}).get("uri")
    ]
