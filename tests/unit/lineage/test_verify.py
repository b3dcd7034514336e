"""`verify` over the store of a real run (0.1.0): what it finds, what only a signature tells, what it says."""

import base64
import json
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from stages.artifacts.addresses import open_store, split_artifact_uri
from stages.artifacts.folder import FileStore
from stages.artifacts.manifests import content_digest, fetch, hash_file, read_manifest
from stages.artifacts.store import Store
from stages.config.closing import ReportConfig
from stages.config.errors import ConfigError, StageError
from stages.config.graph import Stage
from stages.config.request import FileEntry
from stages.job.context import StageContext, StageOutcome
from stages.job.runner import execute
from stages.lineage.__main__ import main
from stages.lineage.signatures import (
    SIGNING_KEY,
    VERIFY_KEY,
    Signed,
    Signer,
    Verifier,
    pre_authentication_encoding,
)
from stages.lineage.verification import Report, verify_all
from tests.contracts.test_older_stores import unpacked
from tests.pipeline_records import request_for

pytestmark = pytest.mark.usefixtures("no_keys")


@dataclass(frozen=True)
class Keys:
    private: Path
    public: Path

    @property
    def verifier(self) -> Verifier:
        return Verifier.from_file(str(self.public))


def write_keys(folder: Path, key: Any) -> Keys:
    folder.mkdir(parents=True, exist_ok=True)
    keys = Keys(folder / "signing.pem", folder / "signing.pub.pem")
    keys.private.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    keys.public.write_bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    return keys


@pytest.fixture
def no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(SIGNING_KEY, raising=False)
    monkeypatch.delenv(VERIFY_KEY, raising=False)


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    return write_keys(tmp_path / "keys", ed25519.Ed25519PrivateKey.generate())


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return unpacked(tmp_path / "store")


@pytest.fixture
def store(root: Path) -> Store:
    return open_store(root.as_uri())


def uri_of(store: Store, kind: str) -> str:
    key = next(key for key in store.list(f"artifacts/{kind}") if key.endswith("/manifest.json"))
    return f"{store.root_uri}/{key.removesuffix('/manifest.json')}"


def folder_of(root: Path, kind: str) -> Path:
    return next((root / "artifacts" / kind).iterdir())


def signed(store: Store, keys: Keys, kind: str = "ppo-model") -> str:
    uri = uri_of(store, kind)
    assert main(["sign", uri, "--key", str(keys.private)]) == 0
    return uri


def rewrite(folder: Path, change: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Change a manifest as someone who may write to the bucket does."""
    path = folder / "manifest.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data, indent=1))
    return data


def forge_weights(folder: Path) -> dict[str, Any]:
    """Other weights, and a manifest that says so: its digest agrees with its files."""
    weights = folder / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)

    def change(manifest: dict[str, Any]) -> None:
        entry = next(entry for entry in manifest["files"] if entry["path"] == "model.safetensors")
        entry["sha256"] = hash_file(weights)
        manifest["digest"] = content_digest(tuple(FileEntry(**one) for one in manifest["files"]))

    return rewrite(folder, change)


def problems(report: Report) -> str:
    return "\n".join(f"{uri}: {problem}" for uri, problem in report.problems)


def test_a_run_of_an_older_release_is_as_it_was_published_down_to_its_raw_data(store: Store) -> None:
    report = verify_all(uri_of(store, "ppo-model"))
    assert report.is_intact, problems(report)
    assert sorted(one.kind for one in report.checked) == [
        "base-model",
        "curated",
        "ppo-model",
        "reward-model",
        "sft-model",
        "tokens",
    ]
    assert report.checked[0].kind == "ppo-model"
    assert all(one.signature.signed is Signed.UNSIGNED for one in report.checked)
    assert report.outside
    assert {one.found for one in report.outside} == {"not looked at"}
    assert sum(one.num_files for one in report.checked) > 10


@pytest.mark.parametrize("kind", ["ppo-model", "sft-model", "reward-model", "base-model", "tokens", "curated"])
def test_one_flipped_byte_in_any_ancestor_is_found_and_named(store: Store, root: Path, kind: str) -> None:
    uri = uri_of(store, "ppo-model")
    manifest = read_manifest(uri_of(store, kind))
    entry = max(manifest.files, key=lambda entry: entry.size)
    path = folder_of(root, kind) / entry.path
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x01
    path.write_bytes(data)
    report = verify_all(uri)
    assert [(uri_of(store, kind), True)] == [(found, entry.path in problem) for found, problem in report.problems]
    assert "other content" in problems(report)


def test_missing_and_additional_files_are_found(store: Store, root: Path) -> None:
    base, tokens = folder_of(root, "base-model"), folder_of(root, "tokens")
    (base / "config.json").unlink()
    (tokens / ".hidden").write_text("x")
    (tokens / "signatures").mkdir()
    (tokens / "signatures" / "model.safetensors").write_text("x")  # no signature has such a name
    found = problems(verify_all(uri_of(store, "dpo-model")))
    assert "config.json is missing" in found
    assert ".hidden is not in the manifest" in found
    assert "signatures/model.safetensors is not in the manifest" in found


def test_an_ancestor_that_was_removed_is_named_and_the_others_are_still_checked(store: Store, root: Path) -> None:
    (folder_of(root, "sft-model") / "manifest.json").unlink()
    report = verify_all(uri_of(store, "dpo-model"))
    assert "sft-model" in problems(report)
    assert "manifest.json is missing" in problems(report)
    assert {one.kind for one in report.checked} >= {"dpo-model", "sft-model", "tokens"}


def test_changed_settings_no_longer_give_the_fingerprint(store: Store, root: Path) -> None:
    rewrite(folder_of(root, "sft-model"), lambda manifest: manifest["config"].update(seed=12345))
    assert "do not give its fingerprint" in problems(verify_all(uri_of(store, "dpo-model")))


def test_an_input_that_was_exchanged_in_a_manifest_no_longer_gives_the_fingerprint(store: Store, root: Path) -> None:
    base = read_manifest(uri_of(store, "base-model"))

    def change(manifest: dict[str, Any]) -> None:
        entry = next(entry for entry in manifest["inputs"] if entry["role"] == "model")
        entry |= {"uri": uri_of(store, "base-model"), "kind": base.kind}
        entry |= {"fingerprint": base.fingerprint, "digest": base.digest}

    rewrite(folder_of(root, "ppo-model"), change)
    assert "do not give its fingerprint" in problems(verify_all(uri_of(store, "ppo-model")))


def test_an_ancestor_that_was_replaced_whole_disagrees_with_what_was_made_from_it(store: Store, root: Path) -> None:
    forged = forge_weights(folder_of(root, "base-model"))
    found = problems(verify_all(uri_of(store, "ppo-model")))
    assert f"here is {forged['digest'][:12]}" in found
    assert uri_of(store, "sft-model") in found  # who says otherwise


def test_a_model_that_was_replaced_whole_disagrees_with_its_registration(store: Store, root: Path) -> None:
    uri, before = uri_of(store, "ppo-model"), read_manifest(uri_of(store, "ppo-model")).digest
    forge_weights(folder_of(root, "ppo-model"))
    assert verify_all(uri).is_intact  # all that the store says agrees
    found = problems(verify_all(uri, digest=before, registered_as="models:/demo-aligned@champion"))
    assert f"models:/demo-aligned@champion names the content {before[:12]}" in found


def forge_the_whole_line(root: Path) -> None:
    """Other weights of the base model, and every manifest that names them rewritten: nothing contradicts anything."""
    forged = forge_weights(folder_of(root, "base-model"))

    def change(manifest: dict[str, Any]) -> None:
        for entry in manifest["inputs"]:
            if entry["fingerprint"] == forged["fingerprint"]:
                entry["digest"] = forged["digest"]

    for kind in ("sft-model", "reward-model", "ppo-model"):
        rewrite(folder_of(root, kind), change)


def test_only_a_signature_tells_a_line_that_was_forged_as_a_whole(store: Store, root: Path, keys: Keys) -> None:
    uri = signed(store, keys)
    forge_the_whole_line(root)
    assert verify_all(uri).is_intact
    report = verify_all(uri, trusted=[keys.verifier])
    assert not report.is_intact
    assert {one.kind: one.signature.signed for one in report.checked}["base-model"] is Signed.OTHER_MANIFEST
    assert "the manifest was changed" in problems(report)


def test_only_a_signature_tells_a_number_that_was_improved(store: Store, root: Path, keys: Keys) -> None:
    uri = signed(store, keys)
    rewrite(folder_of(root, "ppo-model"), lambda manifest: manifest["metrics"].update({"ppo/score": 99.0}))
    assert verify_all(uri).is_intact
    assert "its signature" in problems(verify_all(uri, trusted=[keys.verifier]))


def test_what_is_signed_and_unchanged_is_intact_and_is_not_signed_twice(
    store: Store, keys: Keys, capsys: pytest.CaptureFixture[str]
) -> None:
    uri = signed(store, keys)
    assert "6 of 6 artifacts signed" in capsys.readouterr().out
    report = verify_all(uri, trusted=[keys.verifier])
    assert report.is_intact, problems(report)
    assert {one.signature.keys for one in report.checked} == {(keys.verifier.key_id,)}
    signed(store, keys)
    assert "0 of 6 artifacts signed" in capsys.readouterr().out


def test_signatures_are_no_part_of_the_content(store: Store, root: Path, keys: Keys, tmp_path: Path) -> None:
    uri = uri_of(store, "base-model")
    before = read_manifest(uri)
    signed(store, keys)
    assert read_manifest(uri) == before
    assert fetch(before.ref(uri), tmp_path / "cache") == folder_of(root, "base-model")  # still read in place


def test_a_wrong_key_is_told_from_no_signature(store: Store, keys: Keys, tmp_path: Path) -> None:
    uri = signed(store, keys, "sft-model")
    other = write_keys(tmp_path / "other", ed25519.Ed25519PrivateKey.generate())
    found = problems(verify_all(uri, trusted=[other.verifier]))
    assert f"signed by another key ({keys.verifier.key_id[:12]})" in found
    assert "it is not signed" not in found
    assert verify_all(uri, trusted=[other.verifier, keys.verifier]).is_intact  # any of the trusted keys will do
    assert "it is not signed" in problems(verify_all(uri_of(store, "dpo-model"), trusted=[keys.verifier]))


def test_a_signature_cannot_be_moved_to_another_artifact_or_manifest(store: Store, root: Path, keys: Keys) -> None:
    uri = signed(store, keys, "sft-model")
    folder = folder_of(root, "sft-model")
    envelope = next((folder / "signatures").iterdir())
    content = envelope.read_bytes()
    rewrite(folder, lambda manifest: manifest["metrics"].update(cheated=1.0))
    moved = folder / "signatures" / f"{hash_file(folder / 'manifest.json')}-{keys.verifier.key_id}.json"
    moved.write_bytes(content)
    report = verify_all(uri, trusted=[keys.verifier])
    assert report.checked[0].signature.signed is Signed.WRONG


@pytest.mark.parametrize(
    "damage",
    [
        b"not json",
        b"{}",
        b'{"payload": 3, "signatures": [], "payloadType": "x"}',
        b'{"payload": "", "signatures": "", "payloadType": "application/vnd.in-toto+json"}',
    ],
)
def test_a_damaged_signature_is_a_finding_and_no_traceback(store: Store, root: Path, keys: Keys, damage: bytes) -> None:
    uri = signed(store, keys, "base-model")
    next((folder_of(root, "base-model") / "signatures").iterdir()).write_bytes(damage)
    assert verify_all(uri, trusted=[keys.verifier]).checked[0].signature.signed is Signed.WRONG


def test_a_link_in_place_of_a_signature_or_a_file_is_a_finding(store: Store, root: Path, keys: Keys, tmp_path) -> None:
    uri = signed(store, keys, "base-model")
    folder = folder_of(root, "base-model")
    for path in (next((folder / "signatures").iterdir()), folder / "config.json"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
        path.unlink()
        path.symlink_to(tmp_path / path.name)
    report = verify_all(uri, trusted=[keys.verifier])
    assert "config.json cannot be read" in problems(report)
    assert report.checked[0].signature.signed is not Signed.VALID


def test_an_outage_of_the_store_says_nothing_about_the_artifact(
    store: Store, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(self: FileStore, key: str) -> bytes:
        raise StageError("the store does not answer", advice="Try again.")

    uri = uri_of(store, "sft-model")
    monkeypatch.setattr(FileStore, "read_bytes", away)
    assert main(["verify", uri]) == 2
    assert "the store does not answer" in capsys.readouterr().err


def test_damaged_artifacts_are_not_signed(
    store: Store, root: Path, keys: Keys, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder_of(root, "tokens") / "evil.json").write_text("{}")
    assert main(["sign", uri_of(store, "base-model"), "--key", str(keys.private)]) == 1
    assert "nothing was signed" in capsys.readouterr().err
    assert not list(root.rglob("signatures"))


def test_signing_again_mends_what_only_has_the_name_of_a_signature(
    store: Store, root: Path, keys: Keys, capsys: pytest.CaptureFixture[str]
) -> None:
    uri = signed(store, keys)
    next((folder_of(root, "base-model") / "signatures").iterdir()).write_bytes(b"{}")
    assert not verify_all(uri, trusted=[keys.verifier]).is_intact
    capsys.readouterr()
    signed(store, keys)
    assert "1 of 6 artifacts signed" in capsys.readouterr().out
    report = verify_all(uri, trusted=[keys.verifier])
    assert report.is_intact, problems(report)


def test_a_manifest_that_changes_after_it_was_verified_is_not_signed(
    store: Store, root: Path, keys: Keys, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even where its digest, which covers the files alone, stays the same."""
    from stages.lineage import __main__ as command

    def verified_and_then_improved(*args: Any, **options: Any) -> Report:
        report = verify_all(*args, **options)
        rewrite(folder_of(root, "base-model"), lambda manifest: manifest["metrics"].update(cheated=1.0))
        return report

    monkeypatch.setattr(command, "verify_all", verified_and_then_improved)
    assert main(["sign", uri_of(store, "base-model"), "--key", str(keys.private)]) == 2
    assert "was replaced while it was read" in capsys.readouterr().err
    assert not list((folder_of(root, "base-model")).rglob("signatures/*"))


def test_a_signature_in_a_folder_of_its_own_is_none(store: Store, root: Path, keys: Keys) -> None:
    uri = signed(store, keys, "base-model")
    envelope = next((folder_of(root, "base-model") / "signatures").iterdir())
    elsewhere = envelope.parent / "old"
    elsewhere.mkdir()
    envelope.rename(elsewhere / envelope.name)
    report = verify_all(uri, trusted=[keys.verifier])
    assert report.checked[0].signature.signed is Signed.UNSIGNED
    assert f"signatures/old/{envelope.name} is not in the manifest" in problems(report)


@pytest.mark.parametrize(
    "target",
    [
        "/tmp",
        "ppo-model",
        "models:ppo",
        "s3://bucket/model",
        "file:///store/artifacts/ppo-model",
        "file:///store/artifacts/ppo-model/abc/model.safetensors",
        "/store/artifacts/ppo-model/abc",
        "https://host/artifacts/ppo-model/abc",
    ],
)
@pytest.mark.parametrize("command", ["verify", "ancestors"])
def test_what_can_name_no_artifact_is_a_mistake_and_no_finding(
    command: str, target: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, target]) == 2
    shown = capsys.readouterr()
    assert f"error: target={target!r} is no address of an artifact" in shown.err
    assert "<store>/artifacts/<kind>/<fingerprint>" in shown.err
    assert "ARTIFACT_STORE" not in shown.err
    assert shown.out == ""


def test_a_manifest_that_may_not_be_read_says_nothing_about_the_artifact(
    store: Store, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(self: FileStore, key: str) -> bytes:
        raise PermissionError(13, "Permission denied", key)

    uri = uri_of(store, "sft-model")
    monkeypatch.setattr(FileStore, "read_bytes", forbidden)
    assert main(["verify", uri]) == 2
    assert "Permission denied" in capsys.readouterr().err


def test_a_registered_model_is_verified_down_to_its_raw_data_and_against_its_registration(
    store: Store, root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from stages.tracking.client import RegisteredArtifact

    uri = uri_of(store, "ppo-model")
    before = read_manifest(uri).digest
    monkeypatch.setattr("stages.tracking.client.registered_artifact", lambda _: RegisteredArtifact(uri, before))
    assert main(["verify", "models:/demo-aligned@champion"]) == 0
    assert capsys.readouterr().out.count("| intact |") == 6
    forge_weights(folder_of(root, "ppo-model"))
    assert main(["verify", "models:/demo-aligned@champion"]) == 1
    told = capsys.readouterr().out.replace("\\", "")  # Markdown's escapes
    assert f"models:/demo-aligned@champion names the content {before[:12]}" in told


@pytest.mark.parametrize("key", [ed25519.Ed25519PrivateKey.generate(), ec.generate_private_key(ec.SECP256R1())])
def test_openssl_accepts_the_signature_without_any_code_of_ours(
    store: Store, root: Path, tmp_path: Path, key: Any
) -> None:
    """The envelope is DSSE: openssl, given its encoding of the payload, says the same."""
    keys = write_keys(tmp_path / "keys", key)
    signed(store, keys, "curated")
    envelope = json.loads(next((folder_of(root, "curated") / "signatures").iterdir()).read_text())
    payload = base64.b64decode(envelope["payload"])
    (tmp_path / "signed").write_bytes(b"DSSEv1 28 application/vnd.in-toto+json %d %b" % (len(payload), payload))
    (tmp_path / "sig").write_bytes(base64.b64decode(envelope["signatures"][0]["sig"]))
    command = ["openssl", "pkeyutl", "-verify", "-pubin", "-inkey", str(keys.public), "-rawin", "-in", "signed"]
    if isinstance(key, ec.EllipticCurvePrivateKey):
        command += ["-digest", "sha256"]
    command += ["-sigfile", "sig"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=60)
    assert "Signature Verified Successfully" in done.stdout, done.stderr
    subjects = {one["name"]: one["digest"]["sha256"] for one in json.loads(payload)["subject"]}
    assert subjects["manifest.json"] == hash_file(folder_of(root, "curated") / "manifest.json")
    assert len(subjects) == len(read_manifest(uri_of(store, "curated")).files) + 1


def test_the_encoding_that_is_signed_is_that_of_the_dsse_specification() -> None:
    expected = b"DSSEv1 29 http://example.com/HelloWorld 11 hello world"
    assert pre_authentication_encoding("http://example.com/HelloWorld", b"hello world") == expected


def test_the_command_line_tells_by_exit_code_table_and_json(
    store: Store, root: Path, keys: Keys, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = signed(store, keys)
    capsys.readouterr()
    assert main(["verify", uri]) == 0
    assert "signatures were not checked: give the public key with --key" in capsys.readouterr().out
    monkeypatch.setenv(VERIFY_KEY, str(keys.public))
    assert main(["verify", uri]) == 0
    shown = capsys.readouterr().out
    assert f"every manifest is signed by {keys.verifier.key_id[:12]}" in shown
    assert shown.count("| intact |") == 6
    weights = folder_of(root, "base-model") / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x07")
    assert main(["verify", uri, "--format", "json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["intact"] is False
    assert [one["kind"] for one in found["checked"] if one["problems"]] == ["base-model"]
    assert found["keys"] == [keys.verifier.key_id]


def test_sources_are_looked_at_again_when_asked(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    """The old run's documents were a folder that is gone: that is said, and is no fault of the artifact."""
    assert main(["verify", uri_of(store, "tokens"), "--sources", "--format", "json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["outside"]
    assert all(one["found"].startswith(("not reachable: ", "changed since")) for one in found["outside"])
    assert "not looked at or not reachable" in found["summary"] or "changed since then" in found["summary"]


def refused(path: Path, *, private: bool) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        Signer.from_file(str(path)) if private else Verifier.from_file(str(path))
    return caught.value


def test_a_file_that_is_no_key_is_refused_with_what_to_do(tmp_path: Path, keys: Keys) -> None:
    (tmp_path / "text").write_text("hello")
    rsa_keys = write_keys(tmp_path / "rsa", rsa.generate_private_key(public_exponent=65537, key_size=2048))
    missing = refused(tmp_path / "missing", private=True)
    assert "No such file" in missing.message
    assert "openssl genpkey" in missing.advice
    assert "is not an Ed25519 key" in refused(tmp_path / "text", private=True).message
    assert "of another kind" in refused(rsa_keys.private, private=True).message
    assert "holds a private key" in refused(keys.private, private=False).message


class _FullStore(FileStore):
    """A disk that is full when the manifest is written."""

    def put_if_absent(self, key: str, data: bytes) -> bool:
        if key.endswith("/manifest.json"):
            raise OSError(28, "No space left on device")
        return super().put_if_absent(key, data)


def _writes_a_page(context: StageContext) -> StageOutcome:
    (context.output_dir / "report.html").write_text("<p>hello")
    return StageOutcome()


def test_a_stage_signs_what_it_publishes_and_the_manifest_stays_last(tmp_path: Path, keys: Keys, monkeypatch) -> None:
    monkeypatch.setenv(SIGNING_KEY, str(keys.private))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    root = tmp_path / "built"
    root.mkdir()
    store = open_store(root.as_uri())
    request = request_for(Stage.REPORT, store, {}, ReportConfig())
    with pytest.raises(OSError, match="No space"):
        execute(request, _FullStore(root), lambda _: _writes_a_page)
    assert len(list(root.rglob("signatures/*.json"))) == 1  # of the attempt that died; it hinders nobody
    assert not list(root.rglob("manifest.json"))
    result = execute(request, store, lambda _: _writes_a_page)
    report = verify_all(result.artifact.uri, trusted=[keys.verifier])
    assert report.is_intact, problems(report)
    assert read_manifest(result.artifact).execution["run_id"] == request.run.run_id


def test_a_signing_key_that_cannot_be_read_ends_the_stage_before_its_work(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv(SIGNING_KEY, str(tmp_path / "missing.pem"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    store = open_store((tmp_path / "built").as_uri())
    with pytest.raises(ConfigError, match=SIGNING_KEY):
        execute(request_for(Stage.REPORT, store, {}, ReportConfig()), store, lambda _: _writes_a_page)
    assert not list((tmp_path / "built").rglob("*.html"))


@pytest.mark.integration
def test_a_bucket_is_verified_in_the_same_way(s3_store: str, store: Store, root: Path, keys: Keys) -> None:
    bucket = open_store(s3_store)
    for path in sorted((root / "artifacts").rglob("*")):
        if path.is_file():
            data = path.read_bytes()
            if path.name == "manifest.json":
                data = data.replace(store.root_uri.encode(), s3_store.encode())
            bucket.write_bytes(path.relative_to(root).as_posix(), data)
    uri = signed(bucket, keys)
    assert verify_all(uri, trusted=[keys.verifier]).is_intact
    key = split_artifact_uri(uri_of(bucket, "sft-model"))[1]
    weights = bytearray(bucket.read_bytes(f"{key}/model.safetensors"))
    weights[-1] ^= 1
    bucket.write_bytes(f"{key}/model.safetensors", bytes(weights))
    bucket.write_bytes(f"{key}/extra.json", b"{}")
    found = problems(verify_all(uri, trusted=[keys.verifier]))
    assert "model.safetensors has other content" in found
    assert "extra.json is not in the manifest" in found
