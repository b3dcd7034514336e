"""Is a model what its makers published, and everything that it was made from? Every file of every ancestor is hashed.

`python -m stages.lineage verify models:/name@alias`. Files are compared with their manifest; manifests with their
place, their fingerprint, what their descendants say of them and, given a public key, their signatures. A finding does
not end the walk, so that one look tells all.
"""

import hashlib
import logging
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from stages.artifacts.addresses import split_artifact_uri
from stages.artifacts.manifests import (
    MANIFEST,
    content_digest,
    hash_file,
    parse_manifest,
    recorded_fingerprints,
    unlisted,
    unlisted_files,
)
from stages.artifacts.store import Store
from stages.config.errors import ConfigError, DamagedArtifactError, DataError, StageError
from stages.config.graph import GRAPH
from stages.config.request import FileEntry, InputEntry, Manifest, SourceEntry
from stages.lineage.signatures import SignatureFinding, Signed, Verifier, check_signature

logger = logging.getLogger(__name__)

_READERS = 4
_FINDINGS = (DamagedArtifactError, ConfigError, DataError)
"""Errors that tell of the artifact. Others, such as an outage of the store, end the look: they say nothing of it."""
Again = Callable[[SourceEntry, Manifest], str]
"""Returns the digest that a source outside has today; raises StageError when it cannot be reached."""


@dataclass(frozen=True)
class Checked:
    """One artifact and what is wrong with it."""

    uri: str
    kind: str
    fingerprint: str
    digest: str
    num_files: int
    num_bytes: int
    signature: SignatureFinding
    problems: tuple[str, ...] = ()
    manifest_sha256: str = ""
    """Of the manifest's bytes, of which the digest covers the files alone."""


@dataclass(frozen=True)
class Outside:
    """Something that was made elsewhere: no manifest, no signature, only the digest that was recorded."""

    uri: str
    role: str
    kind: str
    digest: str
    found: str
    """`unchanged`, `changed`, or why it could not be looked at."""


@dataclass
class Report:
    """What a walk found, the target first."""

    target: str
    keys: tuple[str, ...] = ()
    """Ids of the public keys that signatures were checked against."""
    checked: list[Checked] = field(default_factory=list)
    outside: list[Outside] = field(default_factory=list)

    @property
    def problems(self) -> list[tuple[str, str]]:
        """(uri, what is wrong)."""
        return [(one.uri, problem) for one in self.checked for problem in one.problems]

    @property
    def is_intact(self) -> bool:
        return not self.problems


@dataclass(frozen=True)
class _Expected:
    """What somebody else says about an artifact."""

    uri: str
    digest: str = ""
    by: str = ""


@dataclass(frozen=True)
class _Read:
    """A manifest, and the bytes that it was read from: all that is said of it is of the same bytes."""

    store: Store
    key: str
    manifest: Manifest
    data: bytes


def verify_all(
    uri: str,
    *,
    trusted: Iterable[Verifier] = (),
    digest: str = "",
    registered_as: str = "",
    again: Again | None = None,
    progress: Callable[[str], None] = logger.info,
) -> Report:
    """Check an artifact and all its ancestors.

    `digest` is what `registered_as` names, such as a version in MLflow. `again` reads outside sources once more;
    without it they are only listed. All that is found is in the report, a missing target included; raises StageError
    when the store does not answer.
    """
    trusted = tuple(trusted)
    report = Report(uri, tuple(verifier.key_id for verifier in trusted))
    waiting = [_Expected(uri.rstrip("/"), digest, registered_as)]
    expectations: dict[str, list[_Expected]] = {}
    manifests: dict[str, _Read | Checked] = {}
    while waiting:  # first all manifests: one artifact may be an ancestor on several ways, with what each says of it
        expected = waiting.pop(0)
        expectations.setdefault(expected.uri, []).append(expected)
        if expected.uri in manifests:
            continue
        found = _manifest_at(expected.uri)
        manifests[expected.uri] = found
        if not isinstance(found, Checked):
            waiting += [_expected(entry, expected.uri) for entry in found.manifest.inputs]
    sources: dict[SourceEntry, Manifest] = {}
    for place, found in manifests.items():
        if isinstance(found, Checked):
            report.checked.append(found)
            continue
        manifest = found.manifest
        progress(f"{manifest.kind} {manifest.fingerprint[:12]}: {len(manifest.files)} files")
        report.checked.append(_checked(found, place, expectations[place], trusted))
        sources |= {source: manifest for source in manifest.sources if source not in sources}
    report.outside += [_outside(source, manifest, again) for source, manifest in sources.items()]
    return report


def _expected(entry: InputEntry, child: str) -> _Expected:
    return _Expected(entry.uri.rstrip("/"), entry.digest, child)


def _manifest_at(uri: str) -> _Read | Checked:
    try:
        store, key = split_artifact_uri(uri)
        data = store.read_bytes(f"{key}/{MANIFEST}")
        return _Read(store, key, parse_manifest(store, key, data), data)
    except FileNotFoundError:
        problem = f"{MANIFEST} is missing: the artifact was removed, or was never complete"
    except _FINDINGS as error:
        problem = error.message
    _, _, tail = uri.rpartition("/artifacts/")
    kind, _, fingerprint = tail.partition("/")
    return Checked(uri, kind, fingerprint, "", 0, 0, SignatureFinding(Signed.UNSIGNED), (problem,))


def _checked(read: _Read, uri: str, expectations: Iterable[_Expected], trusted: tuple[Verifier, ...]) -> Checked:
    store, key, manifest = read.store, read.key, read.manifest
    signature = signature_of(store, key, manifest, read.data, trusted=trusted)
    problems = [
        *_problems_of_record(store, manifest),
        *_disagreements(manifest, expectations),
        *_problems_of_signature(signature, bool(trusted)),
        *_problems_of_files(store, key, manifest),
    ]
    return Checked(
        uri=uri,
        kind=manifest.kind,
        fingerprint=manifest.fingerprint,
        digest=manifest.digest,
        num_files=len(manifest.files),
        num_bytes=sum(entry.size for entry in manifest.files),
        signature=signature,
        problems=tuple(problems),
        manifest_sha256=hashlib.sha256(read.data).hexdigest(),
    )


def signature_of(
    store: Store, key: str, manifest: Manifest, data: bytes, *, trusted: Iterable[Verifier]
) -> SignatureFinding:
    """What the signatures next to a manifest say; one that cannot be read is a wrong one."""
    try:
        return check_signature(store, key, manifest, data, trusted=trusted)
    except (*_FINDINGS, FileNotFoundError) as error:  # such as a link or a folder in place of a signature
        logger.warning("a signature cannot be read: %s", error)
        return SignatureFinding(Signed.WRONG)


def _problems_of_record(store: Store, manifest: Manifest) -> list[str]:
    """What a manifest contradicts in itself: whoever changes one part of it must change all others."""
    problems = []
    if (listed := content_digest(manifest.files)) != manifest.digest:
        problems.append(f"its files together have the digest {listed[:12]}, the manifest says {manifest.digest[:12]}")
    if GRAPH[manifest.stage].in_pipeline and manifest.fingerprint not in recorded_fingerprints(
        manifest, store.root_uri
    ):
        problems.append("its settings, inputs and sources do not give its fingerprint: one of them was changed")
    return problems


def _disagreements(manifest: Manifest, expectations: Iterable[_Expected]) -> list[str]:
    return [
        f"{one.by} names the content {one.digest[:12]}, here is {manifest.digest[:12]}"
        for one in expectations
        if one.digest and one.digest != manifest.digest
    ]


def _problems_of_signature(found: SignatureFinding, asked: bool) -> list[str]:
    if not asked or found.signed is Signed.VALID:
        return []
    named = f" ({', '.join(key[:12] for key in found.keys)})" if found.keys else ""
    match found.signed:
        case Signed.UNSIGNED:
            return ["it is not signed"]
        case Signed.OTHER_KEY:
            return [f"it is signed by another key{named}, by none of those given"]
        case Signed.OTHER_MANIFEST:
            return [f"its signature{named} is over another manifest: the manifest was changed, or built again unsigned"]
        case _:
            return [f"its signature{named} is not over this manifest and these files"]


def _problems_of_files(store: Store, key: str, manifest: Manifest) -> list[str]:
    with ThreadPoolExecutor(max_workers=_READERS) as pool:
        problems = [found for found in pool.map(lambda entry: _problem_of(store, key, entry), manifest.files) if found]
    return problems + [f"{name} is not in the manifest: somebody put it there" for name in _extra(store, key, manifest)]


def _problem_of(store: Store, key: str, entry: FileEntry) -> str:
    """What is wrong with a file. It is read in pieces, from a bucket by way of the disk; weights need no memory."""
    try:
        size = store.size(f"{key}/{entry.path}")
        if size is None:
            return f"{entry.path} is missing"
        if size != entry.size:
            return f"{entry.path} has {size} bytes, the manifest says {entry.size}"
        found = _sha256(store, f"{key}/{entry.path}")
    except FileNotFoundError:
        return f"{entry.path} is missing"
    except (*_FINDINGS, OSError) as error:
        return f"{entry.path} cannot be read: {error}"
    return "" if found == entry.sha256 else f"{entry.path} has other content than the manifest says ({found[:12]})"


def _sha256(store: Store, key: str) -> str:
    if (path := store.local_path(key)) is not None:
        return hash_file(path)
    with tempfile.TemporaryDirectory(prefix="athanor-verify-") as scratch:
        store.download(key, Path(scratch) / "file")
        return hash_file(Path(scratch) / "file")


def _extra(store: Store, key: str, manifest: Manifest) -> list[str]:
    if (folder := store.local_path(key)) is not None:  # hidden files and links, too, which are no objects
        return unlisted_files(folder, manifest.files)
    return unlisted((name.removeprefix(f"{key}/") for name in store.list(key)), manifest.files)


def _outside(source: SourceEntry, manifest: Manifest, again: Again | None) -> Outside:
    if again is None:
        found = "not looked at"
    else:
        try:
            found = "unchanged" if again(source, manifest) == source.digest else "changed since"
        except (StageError, OSError) as error:
            found = f"not reachable: {error}"
    return Outside(source.uri, source.role, source.kind.value, source.digest, found)
