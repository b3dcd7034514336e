"""Artifacts: identity by fingerprint, publication with the manifest last, and verified reading.

An artifact exists when its manifest exists. Everything that reads starts from the manifest, and a manifest is believed
only about the artifact at whose key it lies.
"""

import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from stages.artifacts.addresses import artifact_key, artifact_uri, split_artifact_uri
from stages.artifacts.store import Store, write_json
from stages.config.base import Config
from stages.config.errors import BadManifestError, DamagedArtifactError, NewerManifestError
from stages.config.graph import GRAPH, Stage
from stages.config.pipeline import stored_identity
from stages.config.records import first_error, without_non_finite
from stages.config.request import ArtifactRef, FileEntry, InputEntry, Manifest, digests_of

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
DOUBT = "doubt.json"
"""Left next to a manifest by a reader that found different content: the next check of the artifact hashes every file,
where it would otherwise compare sizes."""
SIGNATURES = "signatures"
"""Folder next to a manifest with the signatures over it, see `stages.lineage.signatures`; no part of the content."""
_SIGNATURE = re.compile(rf"{SIGNATURES}/[0-9a-f]{{64}}-[0-9a-f]{{64}}\.json")
_CHUNK = 1 << 20


def fingerprint(
    stage: Stage,
    config: Config,
    *,
    inputs: Mapping[str, ArtifactRef],
    store_uri: str,
    sources: Mapping[str, str] | None = None,
    with_content: bool = False,
) -> str:
    """Identity of what a stage will produce: sha256 over stage, version, config, inputs and outside data.

    Resources, storage location, log cadence and code version are absent by construction: they are in ExecutionConfig
    and RunInfo, which this function never sees. `store_uri` is the root of the store that will hold the result; see
    `input_identity`. `with_content` gives the second identity of a stage: `stages.artifacts.hits` says when it is used.
    """
    return _hashed(
        stage,
        version=GRAPH[stage].version,
        config=config.identity(),
        inputs={role: _identified(ref, store_uri, with_content) for role, ref in inputs.items()},
        sources=dict(sources or {}),
    )


def recorded_fingerprints(manifest: Manifest, store_uri: str) -> tuple[str, str]:
    """The two fingerprints that an artifact can have, by what its manifest says that it was made from.

    Only for stages of the pipeline: pairs from raters list an input more than their fingerprint covers.
    """
    config, _ = without_non_finite(stored_identity(manifest.stage, manifest.config))
    first, second = (
        _hashed(
            manifest.stage,
            version=manifest.version,
            config=config,
            inputs={entry.role: _identified(entry, store_uri, with_content) for entry in manifest.inputs},
            sources=digests_of(manifest.sources),
        )
        for with_content in (False, True)
    )
    return first, second


def _hashed(stage: Stage, **identity: Any) -> str:
    return hashlib.sha256(canonical_json({"stage": stage.value, **identity})).hexdigest()


def _identified(ref: ArtifactRef | InputEntry, store_uri: str, with_content: bool) -> str:
    return input_identity(ref, store_uri) + (f" content:{ref.digest}" if with_content else "")


def input_identity(ref: ArtifactRef | InputEntry, store_uri: str) -> str:
    """What stands for an input in the fingerprint of what is made from it.

    For an artifact at its own key of the result's own store, that is its fingerprint. Any other place can hold whatever
    its owner likes under a copied fingerprint, so from there only the content counts, whose digest is verified when it
    is read.
    """
    is_own = ref.uri.rstrip("/") == f"{store_uri}/{artifact_key(ref.kind, ref.fingerprint)}"
    return ref.fingerprint if is_own else f"content:{ref.digest}"


def canonical_json(value: Any) -> bytes:
    """The canonical form of a JSON value: sorted keys, no spaces, UTF-8."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def load_manifest(store: Store, key: str) -> Manifest:
    """Read the manifest of the artifact at `key`; FileNotFoundError when there is none, BadManifestError that names the
    first wrong field when it is not valid or not this artifact's."""
    return parse_manifest(store, key, store.read_bytes(f"{key}/{MANIFEST}"))


def parse_manifest(store: Store, key: str, data: bytes) -> Manifest:
    """The same for the bytes of a manifest that were read already."""
    try:
        manifest = Manifest.model_validate_json(data)
    except ValidationError as error:
        newer = first_error(error, among=_is_newer)
        raise (NewerManifestError if newer else BadManifestError)(
            f"{store.root_uri}/{key}/{MANIFEST} is not a valid manifest: {newer or first_error(error)}",
            advice="The artifact may be intact: update Athanor, Airflow's and Ray's images together."
            if newer
            else "Do not use this artifact unless you know who wrote it.",
        ) from None
    says = f"{artifact_key(manifest.kind, manifest.fingerprint)}, made by {manifest.stage.value}"
    if key != artifact_key(manifest.kind, manifest.fingerprint) or GRAPH[manifest.stage].kind != manifest.kind:
        raise BadManifestError(
            f"{store.root_uri}/{key}/{MANIFEST} is not this artifact's manifest: it describes {says}",
            advice="Something copied it there. Use the artifact at its own address.",
        )
    return manifest


def _is_newer(problem: Mapping[str, Any]) -> bool:
    """Whether a later release writes what is wrong: a version above ours, or a field that we do not know. A version
    that is no number is damage."""
    return problem["type"] == "extra_forbidden" or (problem["loc"], problem["type"]) == (
        ("manifest_version",),
        "value_error",
    )


def find_manifest(store: Store, kind: str, fingerprint: str) -> Manifest | None:
    """Return the manifest of a complete artifact, or None."""
    try:
        return load_manifest(store, artifact_key(kind, fingerprint))
    except FileNotFoundError:
        return None


def read_manifest(ref: ArtifactRef | str) -> Manifest:
    """Read the manifest behind a reference or an artifact URI; raises as `load_manifest` does, and
    DamagedArtifactError when the content is not the one that the reference names."""
    manifest = load_manifest(*split_artifact_uri(ref if isinstance(ref, str) else ref.uri))
    if isinstance(ref, ArtifactRef) and ref.digest != manifest.digest:
        raise _replaced(ref, manifest.digest)
    return manifest


def _replaced(ref: ArtifactRef, found: str) -> DamagedArtifactError:
    return DamagedArtifactError(
        f"{ref.uri} has content {found[:12]}, the run expects {ref.digest[:12]}",
        advice="Something replaced the artifact after it was built; clear the stage that produced it.",
    )


def _listed_in(manifest: Manifest, uri: str) -> tuple[FileEntry, ...]:
    """The files of a manifest, whose digest covers them."""
    if (listed := content_digest(manifest.files)) != manifest.digest:
        raise BadManifestError(
            f"{uri} lists files of digest {listed[:12]}, the run expects those of {manifest.digest[:12]}",
            advice="Something changed its manifest after it was built; clear the stage that produced it.",
        )
    return manifest.files


def hash_file(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def content_digest(files: tuple[FileEntry, ...]) -> str:
    """Hash over names and contents of the files, in name order."""
    entries = sorted((entry.path, entry.sha256) for entry in files)
    return hashlib.sha256(canonical_json(entries)).hexdigest()


def settings_digest(manifest: Manifest) -> str:
    """Hash over how an artifact was made, whatever it was made from: stage version and config."""
    config, _ = without_non_finite(stored_identity(manifest.stage, manifest.config))
    return hashlib.sha256(canonical_json({"version": manifest.version, "config": config})).hexdigest()


def read_file(ref: ArtifactRef | str, name: str) -> bytes:
    """Return one small file of an artifact, verified against the manifest; FileNotFoundError if it has no such file."""
    uri = ref if isinstance(ref, str) else ref.uri
    entry = next((entry for entry in _listed_in(read_manifest(ref), uri) if entry.path == name), None)
    if entry is None:
        raise FileNotFoundError(f"{uri} has no file {name!r}")
    store, key = split_artifact_uri(uri)
    data = store.read_bytes(f"{key}/{name}")
    if hashlib.sha256(data).hexdigest() != entry.sha256:
        raise _damaged(store, key, name)
    return data


def upload_files(store: Store, folder: Path, *, kind: str, fingerprint: str) -> tuple[FileEntry, ...]:
    """Copy every file below `folder` into the artifact; return their entries, and leave the manifest to the caller."""
    key = artifact_key(kind, fingerprint)
    paths = sorted(path for path in folder.rglob("*") if path.is_file())

    def upload(path: Path) -> FileEntry:
        name = path.relative_to(folder).as_posix()
        store.upload(path, f"{key}/{name}")
        return FileEntry(path=name, size=path.stat().st_size, sha256=hash_file(path))

    with ThreadPoolExecutor(max_workers=4) as pool:
        return tuple(pool.map(upload, paths))


def manifest_bytes(manifest: Manifest) -> bytes:
    """A manifest as `publish` writes it, which is what signatures cover."""
    return manifest.model_dump_json(indent=1).encode()


def publish(store: Store, manifest: Manifest) -> ArtifactRef:
    """Write the manifest; from here on the artifact exists. A concurrent identical build keeps the first manifest."""
    key = artifact_key(manifest.kind, manifest.fingerprint)
    store.put_if_absent(f"{key}/{MANIFEST}", manifest_bytes(manifest))
    return load_manifest(store, key).ref(artifact_uri(store, manifest.kind, manifest.fingerprint))


def verify(store: Store, manifest: Manifest, *, hashes: bool = False) -> None:
    """Compare stored files with their manifest: sizes always, contents when `hashes`.

    Raises DamagedArtifactError that names the object.
    """
    key = artifact_key(manifest.kind, manifest.fingerprint)
    for entry in manifest.files:
        size = store.size(f"{key}/{entry.path}")
        if size != entry.size:
            found = "is missing" if size is None else f"has {size} bytes"
            raise DamagedArtifactError(
                f"{store.root_uri}/{key}/{entry.path} {found}, its manifest says {entry.size} bytes",
                advice="Clear the stage that produced it; it will be built again.",
            )
        if hashes:
            with tempfile.TemporaryDirectory() as scratch:
                _verified_file(store, key, entry, Path(scratch))


def discard(store: Store, kind: str, fingerprint: str) -> None:
    """Remove a damaged artifact, manifest first, so that no reader finds it half deleted."""
    key = artifact_key(kind, fingerprint)
    store.delete(f"{key}/{MANIFEST}")
    store.delete(key)


def find_intact(store: Store, kind: str, fingerprint: str) -> Manifest | None:
    """Return the manifest of an artifact that exists and is whole; a damaged one is named and removed.

    What a newer version published is not damaged: NewerManifestError.
    """
    doubted = False
    try:
        manifest = find_manifest(store, kind, fingerprint)
        if manifest is None:
            return None
        doubted = is_doubted(store, kind, fingerprint)
        verify(store, manifest, hashes=doubted)
    except NewerManifestError:
        raise
    except DamagedArtifactError as error:
        logger.warning("Damaged artifact: %s. It is removed and built again.", error.message)
        discard(store, kind, fingerprint)
        return None
    if doubted:
        store.delete(f"{artifact_key(kind, fingerprint)}/{DOUBT}")
    return manifest


def is_doubted(store: Store, kind: str, fingerprint: str) -> bool:
    """Whether a reader found an artifact damaged, so that sizes alone do not show that it is whole."""
    return store.exists(f"{artifact_key(kind, fingerprint)}/{DOUBT}")


def fetch(ref: ArtifactRef, cache_dir: Path, *, wanted: Callable[[str], bool] = lambda path: True) -> Path:
    """Return a local folder with the artifact's files, contents verified against the manifest, and no others.

    A `file://` store is read in place, unless something else lies there too; an `s3://` store is copied once into
    `cache_dir`. Files that are not `wanted` are neither copied nor verified, and must not be read.
    """
    store, key = split_artifact_uri(ref.uri)
    manifest = read_manifest(ref)
    listed = _listed_in(manifest, ref.uri)
    files = tuple(entry for entry in listed if wanted(entry.path))
    target = cache_dir / manifest.kind / manifest.digest
    with ThreadPoolExecutor(max_workers=4) as pool:
        list(pool.map(lambda entry: _verified_file(store, key, entry, target), files))
    folder = store.local_path(key)
    if folder is None:
        return target
    if not (others := unlisted_files(folder, listed)):
        return folder
    logger.warning("%s has files that its manifest does not list; they are not used: %s", ref.uri, others[:5])
    for entry in files:
        _linked(folder / entry.path, target / entry.path, entry)
    return target


def unlisted_files(folder: Path, files: tuple[FileEntry, ...]) -> list[str]:
    """What else lies in an artifact's folder: left by an attempt that died, or put there to be read."""
    found = (path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    return unlisted((path.relative_to(folder).as_posix() for path in found), files)


def unlisted(names: Iterable[str], files: tuple[FileEntry, ...]) -> list[str]:
    """Those of the names, relative to an artifact, that are neither its files nor records about it."""
    known = {entry.path for entry in files} | {MANIFEST, DOUBT}
    return sorted(name for name in names if name not in known and not _SIGNATURE.fullmatch(name))


def _linked(path: Path, copy: Path, entry: FileEntry) -> None:
    """Put a file where the cache has it. The workers of one machine share the cache and may do so at once."""
    if _matches(copy, entry):
        return
    copy.parent.mkdir(parents=True, exist_ok=True)
    aside = copy.with_name(f".{uuid.uuid4().hex}")
    try:
        try:
            os.link(path, aside)
        except OSError:  # another disk
            shutil.copyfile(path, aside)
        os.replace(aside, copy)
    finally:
        aside.unlink(missing_ok=True)  # it stays when both are links to one file


def _verified_file(store: Store, key: str, entry: FileEntry, target: Path) -> None:
    path = store.local_path(f"{key}/{entry.path}")
    if path is None:
        path = target / entry.path
        if _matches(path, entry):
            return
        store.download(f"{key}/{entry.path}", path)
    if not _matches(path, entry):
        raise _damaged(store, key, entry.path)


def _damaged(store: Store, key: str, name: str) -> DamagedArtifactError:
    """Return the error for a damaged file, and leave a mark by which the next run of its stage finds the damage."""
    try:
        write_json(store, f"{key}/{DOUBT}", {"damaged": name, "found_at": utc_now()})
    except Exception as problem:  # noqa: BLE001 - such as a read-only store; the damage is the error to report
        logger.warning("%s/%s/%s was not written: %s", store.root_uri, key, DOUBT, problem)
    return DamagedArtifactError(
        f"{store.root_uri}/{key}/{name} does not have the content that its manifest records",
        advice="Clear the stage that produced it; it will be built again.",
    )


def _matches(path: Path, entry: FileEntry) -> bool:
    return path.is_file() and path.stat().st_size == entry.size and hash_file(path) == entry.sha256


def utc_now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
