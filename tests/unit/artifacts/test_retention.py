"""What nothing needs goes; what is registered, young, held, made by people or an ancestor of such stays."""

import os
import time
from pathlib import Path

import pytest

from infra.garbage import collect
from stages.artifacts.addresses import open_store, run_key
from stages.artifacts.deletion import delete
from stages.artifacts.lease import LeaseLostError, LeaseTimes, acquire
from stages.artifacts.manifests import find_manifest
from stages.artifacts.retention import Policy, find
from stages.artifacts.store import Store, write_json
from stages.config.errors import DataError, StageError
from stages.config.graph import Stage
from stages.config.request import ArtifactRef
from tests.pipeline_records import fingerprint_of, publish_artifact, publish_run
from tests.unit.artifacts.test_lease import owner

POLICY = Policy(keep_days=30, unfinished_hours=24, nothing_registered=True)
DAY = 86_400


def aged(root: Path, days: float = 100) -> None:
    """All that lies there was written long ago."""
    then = time.time() - days * DAY
    for path in root.rglob("*"):
        if path.is_file():
            os.utime(path, (then, then))


def nobody() -> set[str]:
    return set()


@pytest.fixture
def two_runs(tmp_path: Path) -> tuple[Store, dict[Stage, ArtifactRef], dict[Stage, ArtifactRef]]:
    """Two runs on the same tokens, both a hundred days old."""
    store, first = publish_run(tmp_path)
    _, second = publish_run(tmp_path, salt="b")
    aged(tmp_path / "store")
    return store, first, second


def keys(store: Store, registered: set[str] | None = None) -> set[str]:
    return {entry.key for entry in find(store, lambda: registered or set(), POLICY)}


def key_of(ref: ArtifactRef) -> str:
    return f"artifacts/{ref.kind}/{ref.fingerprint}"


def test_when_nothing_is_registered_all_that_is_old_goes_and_the_store_is_empty(two_runs) -> None:
    store, first, second = two_runs
    waste = find(store, nobody, POLICY)
    assert {entry.key for entry in waste} == {key_of(ref) for ref in (*first.values(), *second.values())}
    assert delete(store, waste, nobody, POLICY) == waste
    assert list(store.list("artifacts")) == []


def test_a_registered_model_keeps_its_ancestors_and_the_records_that_tell_of_it(two_runs) -> None:
    store, first, second = two_runs
    kept = {Stage.CURATE, Stage.TOKENIZE, Stage.PRETRAIN, Stage.SFT, Stage.DPO, Stage.EVALUATE, Stage.PROMOTE}
    lost = {key_of(ref) for stage, ref in first.items() if stage not in kept}
    lost |= {key_of(ref) for stage, ref in second.items() if stage not in (Stage.CURATE, Stage.TOKENIZE)}
    assert keys(store, {first[Stage.DPO].fingerprint}) == lost


def test_a_young_run_keeps_what_its_records_name_and_that_is_made_from(two_runs) -> None:
    store, first, _ = two_runs
    reward = first[Stage.REWARD]
    write_json(store, run_key("fresh", Stage.PPO, "config.json"), {"inputs": {"reward": reward.model_dump()}})
    waste = keys(store)
    for stage in (Stage.REWARD, Stage.SFT, Stage.PRETRAIN, Stage.TOKENIZE, Stage.CURATE):
        assert key_of(first[stage]) not in waste
    assert key_of(first[Stage.PPO]) in waste


def test_a_young_artifact_stays_with_its_ancestors(two_runs, tmp_path: Path) -> None:
    store, first, _ = two_runs
    publish_artifact(store, Stage.DPO, {"model": first[Stage.SFT]}, tmp_path / "content-dpo", salt="new")
    assert not {key_of(first[Stage.SFT]), f"artifacts/dpo-model/{fingerprint_of(Stage.DPO, 'new')}"} & keys(store)
    assert key_of(first[Stage.DPO]) in keys(store)


def test_findings_of_a_gate_stay_as_long_as_their_artifact(two_runs, tmp_path: Path) -> None:
    store, first, _ = two_runs
    kept, gone = f"gates/{first[Stage.SFT].fingerprint}", f"gates/{'0' * 64}"
    for key in (kept, gone):
        store.write_bytes(f"{key}/a.json", b"{}")
    aged(tmp_path / "store")
    found = keys(store, {first[Stage.SFT].fingerprint})
    assert gone in found
    assert kept not in found


def test_measurements_go_when_none_of_their_model_was_kept_for_a_long_time(two_runs, tmp_path: Path) -> None:
    store, _, _ = two_runs
    for key in ("measurements/old/a.parquet", "measurements/used/a.parquet"):
        store.write_bytes(key, b"scores")
    aged(tmp_path / "store")
    store.write_bytes("measurements/used/b.parquet", b"scores")
    found = {entry.key: entry.what for entry in find(store, nobody, POLICY)}
    assert found["measurements/old"] == "cache"
    assert "measurements/used" not in found


def test_what_people_said_is_never_waste(two_runs, tmp_path: Path) -> None:
    store, first, _ = two_runs
    (tmp_path / "said").mkdir()
    ref, _ = publish_artifact(store, Stage.RATE, {"responses": first[Stage.SFT]}, tmp_path / "said")
    aged(tmp_path / "store")
    assert not {key_of(ref), key_of(first[Stage.SFT])} & keys(store)


def test_a_run_that_comes_to_need_an_artifact_meanwhile_gets_it_back_whole(two_runs) -> None:
    store, first, _ = two_runs
    waste = find(store, nobody, POLICY)
    looks: list[int] = []

    def promoted_meanwhile() -> set[str]:
        looks.append(1)
        assert find_manifest(store, "sft-model", first[Stage.SFT].fingerprint) is None  # the manifests are gone
        return {first[Stage.SFT].fingerprint}

    gone = delete(store, waste, promoted_meanwhile, POLICY)
    assert looks == [1]
    assert key_of(first[Stage.SFT]) not in {entry.key for entry in gone}
    assert find_manifest(store, "sft-model", first[Stage.SFT].fingerprint) is not None
    assert keys(store, {first[Stage.SFT].fingerprint}) == set()  # with the ancestors, without all else


def test_when_mlflow_does_not_answer_nothing_is_deleted(
    two_runs, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    store, _, _ = two_runs
    before = sorted(store.list("artifacts"))
    waste = find(store, nobody, POLICY)

    def away() -> set[str]:
        raise StageError("MLflow does not answer")

    with pytest.raises(StageError, match="does not answer"):
        delete(store, waste, away, POLICY)
    assert sorted(store.list("artifacts")) == before
    monkeypatch.setenv("ARTIFACT_STORE", store.root_uri)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    said: list[str] = []
    assert collect(POLICY, remove=True, say=said.append) == 1
    assert said == []
    assert "registered models could not be listed" in capsys.readouterr().err
    assert sorted(store.list("artifacts")) == before


def test_an_mlflow_that_knows_nothing_of_this_store_is_not_believed(two_runs) -> None:
    store, first, _ = two_runs
    before = sorted(store.list("artifacts"))
    assert find(store, lambda: {first[Stage.DPO].fingerprint}, Policy()) != []
    waste = find(store, nobody, POLICY)
    with pytest.raises(DataError, match="though 2 promotions are in it"):
        find(store, lambda: {"e" * 64}, Policy())
    with pytest.raises(DataError, match="though 2 promotions are in it"):
        delete(store, waste, nobody, Policy())
    assert sorted(store.list("artifacts")) == before


def test_a_manifest_that_cannot_be_read_stops_everything(two_runs) -> None:
    store, first, _ = two_runs
    store.write_bytes(f"{key_of(first[Stage.SFT])}/manifest.json", b"{}")
    with pytest.raises(DataError, match=f"{first[Stage.SFT].fingerprint}/manifest.json is not a valid manifest"):
        find(store, nobody, POLICY)


# --------------------------------------------------- what is not finished


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store((tmp_path / "store").as_uri())


IDENTITY = "ab" * 32
QUICK = LeaseTimes(beat_seconds=0.05, stale_seconds=60)


def begun(store: Store, tmp_path: Path) -> set[str]:
    """A build that got half way: files, a checkpoint, a file half written; all old."""
    store.write_bytes(f"artifacts/tokens/{IDENTITY}/a.bin", b"half")
    store.write_bytes(f"checkpoints/{IDENTITY}/step-1/checkpoint.json", b"{}")
    half = tmp_path / "store" / f"artifacts/tokens/{IDENTITY}" / f".b.bin.{'0' * 32}"
    half.write_bytes(b"ha")
    aged(tmp_path / "store")
    return {f"artifacts/tokens/{IDENTITY}", f"checkpoints/{IDENTITY}", f"artifacts/tokens/{IDENTITY}/b.bin"}


def test_a_build_whose_holder_was_killed_goes_at_once_and_the_next_builder_need_not_wait(
    store: Store, tmp_path: Path
) -> None:
    acquire(store, kind="tokens", fingerprint=IDENTITY, owner=owner("dead"), times=QUICK)  # never beats, never releases
    expected = begun(store, tmp_path)
    waste = find(store, nobody, POLICY)
    assert {entry.key for entry in waste} == expected
    started = time.monotonic()
    assert delete(store, waste, nobody, POLICY) == waste
    again = acquire(store, kind="tokens", fingerprint=IDENTITY, owner=owner("next"), times=QUICK)
    assert again is not None
    assert time.monotonic() - started < 5
    assert [entry.key for entry in store.listing() if not entry.key.startswith("leases/")] == []
    assert list(store.unfinished()) == []


def test_what_a_live_lease_holds_is_no_waste_and_survives_a_plan_made_before(store: Store, tmp_path: Path) -> None:
    begun(store, tmp_path)
    waste = find(store, nobody, POLICY)
    lease = acquire(store, kind="tokens", fingerprint=IDENTITY, owner=owner("builder"), times=QUICK)
    assert lease is not None
    with lease:
        assert find(store, nobody, POLICY) == []
        assert delete(store, waste, nobody, POLICY) == []
        lease.check()
    assert len(list(store.unfinished())) == 1
    assert store.exists(f"artifacts/tokens/{IDENTITY}/a.bin")


def test_a_builder_that_slept_for_days_is_fenced_by_the_collection(store: Store, tmp_path: Path) -> None:
    sleeper = acquire(store, kind="tokens", fingerprint=IDENTITY, owner=owner("sleeper"), times=QUICK)
    assert sleeper is not None
    begun(store, tmp_path)
    delete(store, find(store, nobody, POLICY), nobody, POLICY)
    with pytest.raises(LeaseLostError, match="garbage-collection"):
        sleeper.check()


def test_checkpoints_of_training_that_may_resume_stay_and_leftovers_of_published_models_go(
    two_runs, tmp_path: Path
) -> None:
    store, first, _ = two_runs
    model = first[Stage.SFT].fingerprint
    for fingerprint in (IDENTITY, model):
        store.write_bytes(f"checkpoints/{fingerprint}/step-1/checkpoint.json", b"{}")
    for path in (tmp_path / "store" / "checkpoints").rglob("*.json"):
        os.utime(path, (time.time() - 3 * DAY, time.time() - 3 * DAY))
    found = {entry.key for entry in find(store, lambda: {model}, POLICY) if entry.what == "checkpoints"}
    assert found == {f"checkpoints/{model}"}


@pytest.mark.integration
def test_half_written_uploads_on_a_server_are_found_and_taken_back(every_server, monkeypatch) -> None:
    from stages.artifacts.s3_client import s3_client
    from tests.conftest import enter

    uri = f"{enter(every_server, monkeypatch)}/prefix"
    store = open_store(uri)
    bucket = uri.split("/")[2]
    key = f"prefix/artifacts/tokens/{IDENTITY}/big.bin"
    begun = s3_client().create_multipart_upload(Bucket=bucket, Key=key)
    s3_client().upload_part(Bucket=bucket, Key=key, UploadId=begun["UploadId"], PartNumber=1, Body=b"x" * 100)
    assert find(store, nobody, POLICY) == []
    time.sleep(2.5)  # servers note whole seconds, Swift the next one
    waste = find(store, nobody, Policy(unfinished_hours=0))
    assert [(entry.what, entry.key) for entry in waste] == [("upload", f"artifacts/tokens/{IDENTITY}/big.bin")]
    assert delete(store, waste, nobody, Policy(unfinished_hours=0)) == waste
    assert list(store.unfinished()) == []
