"""A result is reused only for what it was made from; no claimed fingerprint and no copied manifest is believed."""

import json
import shutil
import time
from pathlib import Path

import pytest

from operators.prepare import find_hit
from stages.artifacts import lease as lease_module
from stages.artifacts.addresses import open_store
from stages.artifacts.folder import FileStore
from stages.artifacts.lease import LeaseTimes
from stages.artifacts.manifests import (
    content_digest,
    fetch,
    find_intact,
    find_manifest,
    publish,
    read_file,
    read_manifest,
    upload_files,
)
from stages.artifacts.store import Store
from stages.config.errors import BadManifestError, Category, DamagedArtifactError, NewerManifestError
from stages.config.graph import GRAPH, Stage
from stages.config.recipes import tiny
from stages.config.request import ArtifactRef, StageRequest, StageResult
from stages.job.context import StageContext, StageOutcome
from stages.job.failures import describe_failure
from stages.job.runner import execute
from tests.damaged import NO_RECORD
from tests.pipeline_records import publish_artifact, request_for

HONEST, SWAPPED = "chosen=good rejected=bad", "chosen=bad rejected=good"


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATHANOR_SCRATCH", str(tmp_path / "scratch"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store((tmp_path / "store").as_uri())


def tokens(store: Store, folder: Path, text: str, salt: str = "") -> ArtifactRef:
    """`tokens` under the same fingerprint, whatever the text."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "pairs.txt").write_text(text)
    return publish_artifact(store, Stage.TOKENIZE, {}, folder, salt=salt)[0]


def request_of(store: Store, given: ArtifactRef) -> StageRequest:
    return request_for(Stage.SFT, store, {"tokens": given}, tiny().sft)


def train(store: Store, given: ArtifactRef) -> StageResult:
    """A stage whose model is a copy of what it was trained on."""

    def verb(context: StageContext) -> StageOutcome:
        text = (context.input_dir("tokens") / "pairs.txt").read_text()
        (context.output_dir / "model.safetensors").write_text(text)
        return StageOutcome()

    return execute(request_of(store, given), store, lambda stage: verb)


def model(store: Store, result: StageResult) -> str:
    key = result.artifact.uri.removeprefix(f"{store.root_uri}/")
    return store.read_bytes(f"{key}/model.safetensors").decode()


def test_a_copy_under_a_claimed_fingerprint_does_not_poison_the_honest_run(store: Store, tmp_path: Path) -> None:
    honest = tokens(store, tmp_path / "made", HONEST)
    elsewhere = open_store((tmp_path / "theirs").as_uri())
    evil = tokens(elsewhere, tmp_path / "made", SWAPPED)
    assert evil.fingerprint == honest.fingerprint
    poisoned = train(store, evil)
    result = train(store, honest)
    assert (result.hit, model(store, result)) == (False, HONEST)
    assert model(store, poisoned) == SWAPPED
    assert train(store, evil).artifact == poisoned.artifact, "what is from elsewhere is reused as well, by its content"
    assert train(store, evil).hit


def test_a_copy_below_another_folder_of_the_same_store_counts_by_content(store: Store, tmp_path: Path) -> None:
    honest = tokens(store, tmp_path / "made", HONEST)
    inside = open_store(f"{store.root_uri}/runs/mine")
    train(store, tokens(inside, tmp_path / "made", SWAPPED))
    assert not train(store, honest).hit


def test_an_input_that_was_built_again_with_other_bytes_is_trained_on_again_and_both_models_stay(
    store: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = tokens(store, tmp_path / "made", HONEST)
    first = train(store, before)
    store.delete(before.uri.removeprefix(f"{store.root_uri}/"))
    again = tokens(store, tmp_path / "made", "the same, rounded differently")
    assert again.fingerprint == before.fingerprint
    assert find_hit(store, request_of(store, again)) is None
    second = train(store, again)
    assert not second.hit
    assert "is no hit, it was made from something else (content of tokens: " in caplog.text
    assert model(store, first) == HONEST
    assert train(store, again).hit
    hit = find_hit(store, request_of(store, again))
    assert hit is not None
    assert hit.artifact.digest == second.artifact.digest
    assert train(store, before).artifact == first.artifact


def test_a_forged_second_artifact_is_named_and_no_hit(store: Store, tmp_path: Path) -> None:
    before = tokens(store, tmp_path / "made", HONEST)
    train(store, before)
    store.delete(before.uri.removeprefix(f"{store.root_uri}/"))
    again = tokens(store, tmp_path / "made", "again")
    second = train(store, again)
    key = f"{second.artifact.uri.removeprefix(store.root_uri + '/')}/manifest.json"
    manifest = json.loads(store.read_bytes(key))
    manifest["inputs"][0]["digest"] = "0" * 64
    store.write_bytes(key, json.dumps(manifest).encode())
    with pytest.raises(BadManifestError, match="other inputs than its fingerprint covers") as refused:
        train(store, again)
    assert describe_failure(refused.value, Stage.SFT).category == Category.DATA


class Counting(FileStore):
    """Refuses to be asked hundreds of times."""

    looks = 0

    def _path(self, key: str) -> Path:
        self.looks += 1
        assert self.looks < 2000, "asked again and again"
        return super()._path(key)


def test_a_manifest_that_names_another_artifact_deletes_nothing_but_what_lies_at_its_own_key(
    store: Store, tmp_path: Path
) -> None:
    given = tokens(store, tmp_path / "made", HONEST)
    result = train(store, given)
    mine = result.artifact.uri.removeprefix(f"{store.root_uri}/")
    other = tokens(store, tmp_path / "made", "of another run", salt="2")
    theirs = other.uri.removeprefix(f"{store.root_uri}/")
    damaged = json.loads(store.read_bytes(f"{theirs}/manifest.json"))
    damaged["files"][0]["size"] = 1  # so that the other artifact looks damaged
    store.write_bytes(f"{mine}/manifest.json", json.dumps(damaged).encode())
    counting = Counting(tmp_path / "store")
    rebuilt = train(counting, given)
    assert (rebuilt.hit, model(store, rebuilt)) == (False, HONEST)
    assert store.exists(f"{theirs}/pairs.txt")
    assert find_intact(store, "tokens", other.fingerprint) is not None


@pytest.mark.parametrize(
    "changes", [{"fingerprint": "a" * 64}, {"kind": "curated"}, {"stage": "sft"}, {"kind": "sft-model", "stage": "sft"}]
)
def test_key_kind_stage_and_fingerprint_of_a_manifest_agree(store: Store, tmp_path: Path, changes: dict) -> None:
    ref = tokens(store, tmp_path / "made", HONEST)
    key = f"{ref.uri.removeprefix(store.root_uri + '/')}/manifest.json"
    store.write_bytes(key, json.dumps({**json.loads(store.read_bytes(key)), **changes}).encode())
    with pytest.raises(BadManifestError, match="is not this artifact's manifest") as refused:
        find_manifest(store, "tokens", ref.fingerprint)
    assert refused.value.category is Category.DATA


@pytest.mark.parametrize("manifest", [*NO_RECORD, b'{"manifest_version": "x"}'])
def test_an_artifact_whose_manifest_is_garbage_is_built_again(store: Store, tmp_path: Path, manifest: bytes) -> None:
    given = tokens(store, tmp_path / "made", HONEST)
    first = train(store, given)
    store.write_bytes(f"{first.artifact.uri.removeprefix(store.root_uri + '/')}/manifest.json", manifest)
    again = train(store, given)
    assert (again.hit, again.artifact.digest) == (False, first.artifact.digest)


class TwoFaced(FileStore):
    """Says that there is a manifest, and cannot show it."""

    looks = 0

    def exists(self, key: str) -> bool:
        self.looks += 1
        if self.looks > 50:
            raise TimeoutError
        return key.endswith("manifest.json") or super().exists(key)


def test_a_store_that_says_two_things_is_asked_less_and_less_often(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = tokens(FileStore(tmp_path / "store"), tmp_path / "made", HONEST)
    pauses: list[float] = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    monkeypatch.setattr(lease_module, "LeaseTimes", lambda: LeaseTimes(poll_seconds=0.0))
    with pytest.raises(TimeoutError):
        train(TwoFaced(tmp_path / "store"), given)
    assert pauses[0] < 1
    assert pauses[-1] == 30.0


def test_a_metric_that_is_no_number_is_left_out_and_the_ledger_says_so(store: Store, tmp_path: Path) -> None:
    def verb(context: StageContext) -> StageOutcome:
        (context.output_dir / "model.safetensors").write_text("x")
        infinite, unknown = float("inf"), float("nan")
        metrics = {"eval/perplexity": infinite, "eval/loss": unknown, "train/loss": 1.0}
        return StageOutcome(metrics, {"steps": 3, "lengths": {"mean": unknown}})

    request = request_of(store, tokens(store, tmp_path / "made", HONEST))
    result = execute(request, store, lambda stage: verb)
    found = find_manifest(store, GRAPH[Stage.SFT].kind, result.artifact.fingerprint)
    assert found is not None
    assert result.metrics == found.metrics == {"train/loss": 1.0}
    assert found.ledger == {
        "steps": 3,
        "lengths": {"mean": None},
        "not_finite": {"eval/perplexity": "inf", "eval/loss": "nan", "lengths.mean": "nan"},
    }
    assert execute(request, store, lambda stage: verb).hit


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1e999", "null"])
def test_a_manifest_that_an_earlier_version_left_with_such_a_metric_is_read(
    store: Store, tmp_path: Path, value: str
) -> None:
    ref = tokens(store, tmp_path / "made", HONEST)
    key = f"{ref.uri.removeprefix(store.root_uri + '/')}/manifest.json"
    text = store.read_bytes(key).decode()
    assert '"metrics": {}' in text
    store.write_bytes(key, text.replace('"metrics": {}', f'"metrics": {{"a": {value}, "b": 2}}').encode())
    found = find_intact(store, "tokens", ref.fingerprint)
    assert found is not None
    assert found.metrics == {"b": 2.0}


def test_publishing_touches_nothing_outside_the_artifact(store: Store, tmp_path: Path) -> None:
    ref = tokens(store, tmp_path / "made", HONEST)
    before = set(store.list("artifacts"))
    files = upload_files(store, tmp_path / "made", kind="tokens", fingerprint="9" * 64)
    found = find_manifest(store, "tokens", ref.fingerprint)
    assert found is not None
    publish(store, found.model_copy(update={"fingerprint": "9" * 64, "digest": content_digest(files)}))
    assert {key.rsplit("/", 1)[0] for key in set(store.list("artifacts")) - before} == {f"artifacts/tokens/{'9' * 64}"}


def test_a_file_that_no_manifest_lists_is_not_read_with_the_others(
    store: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Whoever may write to the folder would otherwise add documents, or weights, that no digest covers."""
    ref = tokens(store, tmp_path / "made", HONEST)
    key = ref.uri.removeprefix(f"{store.root_uri}/")
    assert fetch(ref, tmp_path / "cache") == store.local_path(key)
    store.write_bytes(f"{key}/more.txt", b"theirs")
    (tmp_path / "store" / key / ".hidden.txt").write_text("theirs")
    for _ in range(2):
        found = fetch(ref, tmp_path / "cache")
        assert [path.name for path in found.rglob("*")] == ["pairs.txt"]
        assert (found / "pairs.txt").read_text() == HONEST
    assert "has files that its manifest does not list; they are not used: ['.hidden.txt', 'more.txt']" in caplog.text


def test_a_small_file_is_read_only_from_the_artifact_that_is_meant(store: Store, tmp_path: Path) -> None:
    """The report and the page for approval read numbers this way."""
    ref = tokens(store, tmp_path / "made", HONEST)
    key = ref.uri.removeprefix(f"{store.root_uri}/")
    assert read_file(ref, "pairs.txt").decode() == HONEST
    store.delete(key)
    tokens(store, tmp_path / "made", SWAPPED)
    for read in (lambda: read_manifest(ref), lambda: read_file(ref, "pairs.txt")):
        with pytest.raises(DamagedArtifactError, match="the run expects"):
            read()
    manifest = json.loads(store.read_bytes(f"{key}/manifest.json")) | {"digest": ref.digest}
    store.write_bytes(f"{key}/manifest.json", json.dumps(manifest).encode())
    with pytest.raises(BadManifestError, match="lists files of digest"):
        read_file(ref, "pairs.txt")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"manifest_version": 99}, "manifest_version: .*99 is newer than"),
        ({"cost": {"energy_joules": 7.0}}, "energy_joules"),
        ({"signature": "x"}, "signature"),
        ({"created_at": "in the year 12000", "signature": "x"}, "signature"),
    ],
)
def test_what_a_newer_version_published_is_neither_used_nor_removed(
    store: Store, tmp_path: Path, changes: dict, says: str
) -> None:
    given = tokens(store, tmp_path / "made", HONEST)
    first = train(store, given)
    key = first.artifact.uri.removeprefix(f"{store.root_uri}/")
    newer = json.loads(store.read_bytes(f"{key}/manifest.json")) | changes
    store.write_bytes(f"{key}/manifest.json", json.dumps(newer).encode())
    with pytest.raises(NewerManifestError, match=says) as refused:
        train(store, given)
    assert refused.value.category is Category.CONFIG
    assert "update Athanor" in refused.value.advice
    assert store.exists(f"{key}/model.safetensors")
