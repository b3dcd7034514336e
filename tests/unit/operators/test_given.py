"""Addresses of base models and earlier data become artifacts when the run starts; MLflow's part is a small server."""

import json
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from operators.given import given_artifacts, kept_apart_from_gold
from operators.people.collect import find_model
from operators.prepare import as_far_as_there_is_new_data, brings_nothing_new, build_request
from stages.artifacts.addresses import artifact_uri, open_store
from stages.artifacts.manifests import publish, read_manifest, utc_now
from stages.artifacts.store import Store
from stages.config.errors import ConfigError, StageError
from stages.config.graph import GRAPH, Stage, pipeline_stages
from stages.config.pipeline import BASE_MODEL, PREVIOUS
from stages.config.request import ArtifactRef, InputEntry, Manifest, RunInfo
from stages.config.resolve import resolve
from stages.lineage.graph import ancestors, started_from
from stages.lineage.tags import lineage_tags
from tests.answering import answering

RUN = RunInfo(run_id="r", name="n")


def put(
    store: Store, stage: Stage, name: str, settings: Mapping[str, Any] | None = None, /, **inputs: ArtifactRef
) -> ArtifactRef:
    """Publish a manifest of no files: lineage is all that counts here."""
    identity = (name.encode().hex() * 32)[:64]
    manifest = Manifest(
        kind=GRAPH[stage].kind,
        stage=stage,
        version=1,
        fingerprint=identity,
        digest=identity,
        files=(),
        inputs=tuple(
            InputEntry(role=role, kind=ref.kind, uri=ref.uri, fingerprint=ref.fingerprint, digest=ref.digest)
            for role, ref in inputs.items()
        ),
        config=dict(settings or {}),
        execution={},
        created_at=utc_now(),
    )
    publish(store, manifest)
    return manifest.ref(artifact_uri(store, manifest.kind, identity))


class House:
    """A store in which a run has left an aligned model, and the registry that calls it champion."""

    def __init__(self, root: Path) -> None:
        self.store = open_store(root.as_uri())
        self.registered_digest = ""
        self.curated = put(self.store, Stage.CURATE, "c")
        self.tokens = put(self.store, Stage.TOKENIZE, "t", curated=self.curated)
        self.base = put(self.store, Stage.PRETRAIN, "b", tokens=self.tokens)
        self.sft = put(self.store, Stage.SFT, "s", tokens=self.tokens, model=self.base)
        self.reward = put(self.store, Stage.REWARD, "r", tokens=self.tokens, model=self.sft)
        self.dpo = put(self.store, Stage.DPO, "d", tokens=self.tokens, model=self.sft)


@pytest.fixture
def house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[House]:
    house = House(tmp_path)

    class Registry(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            query = {key: values[0] for key, values in parse_qs(urlsplit(self.path).query).items()}
            known = {("n-aligned", "champion"): house.dpo.uri, ("stranger", "champion"): ""}
            uri = known.get((query["name"], query.get("alias") or query["version"]))
            tags = [{"key": "artifact.uri", "value": uri}] if uri else []
            tags += [{"key": "lineage.digest", "value": house.registered_digest}] if house.registered_digest else []
            answer = {"model_version": {"tags": tags}} if uri is not None else {"error_code": "RESOURCE_DOES_NOT_EXIST"}
            self.send_response(200 if uri is not None else 404)
            self.end_headers()
            self.wfile.write(json.dumps(answer).encode())

        def log_message(self, format: str, *args: object) -> None: ...

    with answering(Registry) as url:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", url)
        yield house


def test_a_champion_is_the_parent_of_what_is_pretrained_from_it(house: House):
    config = resolve({"recipe": "tiny", "base_model": "models:/n-aligned@champion", "continue_pretraining": True})
    config = config.with_given(given_artifacts(config))

    def request(stage: Stage, **upstream: ArtifactRef):
        done = {
            Stage.CURATE: house.curated,
            Stage.TOKENIZE: house.tokens,
            Stage.PRETRAIN: house.base,
            Stage.SFT: house.sft,
        }
        return build_request(stage, run=RUN, store=house.store, config=config, upstream=done)

    assert request(Stage.PRETRAIN).inputs == {BASE_MODEL: house.dpo, "tokens": house.tokens}
    assert request(Stage.TOKENIZE).inputs == {BASE_MODEL: house.dpo, "curated": house.curated}
    assert request(Stage.TOKENIZE).config["base_model"] == ""
    assert request(Stage.SFT).inputs == {"tokens": house.tokens, "model": house.base}
    assert not any(config.stage_sources(stage) for stage in config.selected - {Stage.CURATE})

    made = put(house.store, Stage.PRETRAIN, "n", **request(Stage.PRETRAIN).inputs)
    candidate = put(house.store, Stage.SFT, "m", tokens=house.tokens, model=made)
    aligned = put(house.store, Stage.DPO, "a", tokens=house.tokens, model=candidate)
    assert started_from(read_manifest(aligned)) == house.dpo.fingerprint
    assert started_from(read_manifest(house.dpo)) == ""
    manifest = Manifest.model_validate_json(
        house.store.read_bytes(f"artifacts/base-model/{made.fingerprint}/manifest.json")
    )
    assert lineage_tags(manifest, made.uri)["lineage.parent.base_model"] == house.dpo.fingerprint
    assert {house.dpo.fingerprint, house.curated.fingerprint} <= {node.id for node in ancestors([candidate.uri]).nodes}


def test_without_further_pretraining_the_base_model_takes_its_place(house: House):
    config = resolve({"recipe": "tiny", "base_model": house.sft.uri})
    config = config.with_given(given_artifacts(config))
    readers = {stage for stage in Stage if BASE_MODEL in config.stage_given(stage)}
    assert readers == {Stage.TOKENIZE, Stage.SFT, Stage.EVALUATE}


def test_a_folder_of_somebody_elses_stays_with_the_job(house: House):
    config = resolve({"recipe": "tiny", "base_model": "/models/llama", "continue_pretraining": True})
    config = config.with_given(given_artifacts(config))
    assert {stage for stage in Stage if "/models/llama" in [source.uri for source in config.stage_sources(stage)]} == {
        Stage.TOKENIZE,
        Stage.PRETRAIN,
    }
    assert config.tokenize.base_model == "/models/llama"


@pytest.mark.parametrize("of", ["models:/n-aligned@champion", "dpo", "tokens", "curated"])
def test_previous_data_is_what_the_lineage_of_a_model_leads_to(house: House, of: str):
    address = of if of.startswith("models:/") else getattr(house, of).uri
    config = resolve({"recipe": "tiny", "documents": ["/new"], "previous_data": address})
    assert given_artifacts(config)[PREVIOUS] == house.curated


def test_an_address_is_spelled_as_its_store_spells_it(house: House):
    sloppy = house.dpo.uri.replace("/artifacts/", "//artifacts/").replace("file:///", "file://localhost/") + "/"
    config = resolve({"recipe": "tiny", "base_model": sloppy})
    assert given_artifacts(config)[BASE_MODEL] == house.dpo


def test_data_that_was_replaced_since_is_not_the_data_that_a_model_was_made_from(house: House):
    key = f"{house.curated.uri.removeprefix(house.store.root_uri + '/')}/manifest.json"
    replaced = {**json.loads(house.store.read_bytes(key)), "digest": "e" * 64}
    house.store.write_bytes(key, json.dumps(replaced).encode())
    config = resolve({"recipe": "tiny", "documents": ["/new"], "previous_data": house.dpo.uri})
    with pytest.raises(ConfigError, match=r"is not what it was: .*/artifacts/curated/.* has content eeeeeeeeeeee"):
        given_artifacts(config)
    named = resolve({"recipe": "tiny", "documents": ["/new"], "previous_data": house.curated.uri})
    assert given_artifacts(named)[PREVIOUS].digest == "e" * 64


def test_a_registered_model_whose_weights_were_replaced_is_not_that_model_any_more(house: House):
    config = resolve({"recipe": "tiny", "base_model": "models:/n-aligned@champion"})
    house.registered_digest = house.dpo.digest
    assert given_artifacts(config)[BASE_MODEL] == house.dpo
    house.registered_digest = "e" * 64
    with pytest.raises(ConfigError, match="was registered with content eeeeeeeeeeee, and "):
        given_artifacts(config)


def test_an_input_that_a_manifest_only_claims_is_not_followed(house: House, tmp_path: Path):
    """Tokens in another folder that name the curated data of this store, with content that it never had."""
    elsewhere = open_store((tmp_path / "theirs").as_uri())
    forged = put(elsewhere, Stage.TOKENIZE, "x", curated=house.curated.model_copy(update={"digest": "e" * 64}))
    config = resolve({"recipe": "tiny", "documents": ["/new"], "previous_data": forged.uri})
    with pytest.raises(ConfigError, match="is not what it was"):
        given_artifacts(config)


@pytest.mark.parametrize(
    ("params", "says"),
    [
        ({"continue_pretraining": True}, "continue_pretraining=True needs base_model, which is empty"),
        ({"base_model": "models:/n-aligned@candidate"}, "base_model='models:/n-aligned@candidate' is not registered"),
        ({"base_model": "models:/stranger@champion"}, "has no tag artifact.uri"),
        ({"base_model": "models:/n-aligned"}, "names no version of a model"),
        (
            {"base_model": "REWARD"},
            "is of kind 'reward-model'; allowed: base-model, sft-model, ppo-model, dpo-model, given-model",
        ),
        ({"previous_data": "/data"}, "previous_data='/data' is not the address of an artifact"),
        ({"previous_data": "file:///nowhere/artifacts/curated/ab"}, "previous_data=.* there is no artifact at"),
    ],
)
def test_addresses_that_lead_nowhere_are_refused(house: House, params: dict[str, str], says: str):
    params = {key: house.reward.uri if value == "REWARD" else value for key, value in params.items()}
    with pytest.raises(ConfigError, match=says):
        given_artifacts(resolve({"recipe": "tiny", **params}))


def test_a_registry_that_is_away_is_no_wrong_input(house: House, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    with pytest.raises(StageError, match="could not be looked up") as failure:
        given_artifacts(resolve({"recipe": "tiny", "base_model": "models:/n-aligned@champion"}))
    assert failure.value.category == "infrastructure"


@pytest.mark.parametrize(
    ("new_bytes", "new_pairs", "base_model", "ends_without", "pretrains"),
    [
        (50_000, 0, True, set(), True),
        (50_000, 9, False, set(), True),
        (500, 9, True, {Stage.PRETRAIN}, False),
        (500, 9, False, set(pipeline_stages()) - {Stage.CURATE}, False),
        (500, 0, True, set(pipeline_stages()) - {Stage.CURATE}, False),
        (0, 0, False, set(pipeline_stages()) - {Stage.CURATE}, False),
    ],
)
def test_a_run_goes_as_far_as_there_is_new_data(
    house: House, new_bytes: int, new_pairs: int, base_model: bool, ends_without: set[Stage], pretrains: bool
):
    base = {"base_model": house.dpo.uri, "continue_pretraining": True} if base_model else {}
    config = resolve({"recipe": "tiny", "documents": ["/new"], "previous_data": house.dpo.uri, **base})
    metrics = {"curate/bytes_new": new_bytes, "curate/pairs_new": new_pairs}
    config = config.with_given(given_artifacts(config))
    left = as_far_as_there_is_new_data(config, metrics)
    assert brings_nothing_new(config, metrics) == (left.last_stage is Stage.CURATE)
    not_in_tiny = {Stage.CONVERT, Stage.GOLD, *(stage for stage, spec in GRAPH.items() if spec.asked_by)}
    assert set(pipeline_stages()) - left.selected - not_in_tiny == ends_without - not_in_tiny
    assert (Stage.PRETRAIN in left.selected) == pretrains
    if base_model and new_pairs and not pretrains:
        assert left.stage_given(Stage.SFT)[BASE_MODEL] == house.dpo


def test_raters_get_no_model_whose_weights_were_replaced(house: House):
    assert find_model("models:/n-aligned@champion")[0].uri == house.dpo.uri
    house.registered_digest = "0" * 64
    with pytest.raises(ConfigError, match="model='models:/n-aligned@champion' was registered with content 0000"):
        find_model("models:/n-aligned@champion")


def test_the_reward_model_is_no_gold_scorer_under_another_name(house: House):
    """Its registered name would lead to the same artifact; here another folder has the same content."""
    copy = put(house.store, Stage.GOLD, "r", tokens=house.tokens, model=house.sft)
    assert copy.uri != house.reward.uri
    assert copy.digest == house.reward.digest
    config = resolve({"recipe": "tiny", "reward_model": house.reward.uri, "gold_model": copy.uri})
    with pytest.raises(ConfigError, match="have the same content 727272727272, and a scorer that a model learnt from"):
        given_artifacts(config)


@pytest.mark.parametrize(
    ("learnt", "left"), [("second", "first"), ("first", "second"), ("both", "both")], ids=lambda half: half
)
def test_what_a_given_gold_scorer_judges_learns_from_the_other_half_of_the_pairs(
    house: House, learnt: str, left: str
) -> None:
    gold = put(house.store, Stage.GOLD, "g", {"half": learnt}, tokens=house.tokens, model=house.sft)

    def halves(**overrides: Any) -> tuple[str, str]:
        config = resolve({"recipe": "tiny", "alignment": "both", "gold_model": gold.uri, "overrides": overrides})
        config = kept_apart_from_gold(config.with_given(given_artifacts(config)), overrides)
        return config.reward.half.value, config.dpo.half.value

    assert halves() == (left, left)
    assert halves(**{"dpo.half": "both"}) == (left, "both")
    assert halves(dpo={"half": "both"}) == (left, "both")
