"""Garbage collection, first half: find what is no longer needed. `stages.artifacts.deletion` removes it.

An artifact is needed when it is a registered model version, a run younger than `keep_days` names it, it is that young
itself, people made it, or something needed was made from it. MLflow says what is registered; without an answer nothing
is deleted. Nothing that a live lease holds is deleted either.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from stages.artifacts.lease import Owner, read_generation
from stages.artifacts.manifests import MANIFEST, load_manifest
from stages.artifacts.store import Listed, Store, Unfinished
from stages.config.errors import DamagedArtifactError, DataError
from stages.config.graph import GRAPH, Stage, spec_of_kind
from stages.config.request import Manifest

LIVE_SECONDS = 900
"""A lease that changed this recently is live; a holder beats every 10 s, but an outage of the store may last."""
MADE_BY_PEOPLE = frozenset({GRAPH[Stage.RATE].kind})
_KEPT_WHILE_USED = ("checkpoints", "reference-logprobs", "measurements", "answers", "gates")
_FINGERPRINT = re.compile(r"(?<![0-9a-f])[0-9a-f]{64}(?![0-9a-f])")


@dataclass(frozen=True)
class Policy:
    """What counts as young."""

    keep_days: float = 30.0
    """Runs, artifacts, checkpoints of unfinished training and caches."""
    unfinished_hours: float = 24.0
    """Uploads and publications that were begun and never finished."""
    nothing_registered: bool = False
    """The operator states that no model of this store is registered."""


@dataclass(frozen=True)
class Waste:
    """One thing that is no longer needed."""

    what: str
    key: str
    size: int
    why: str
    upload: Unfinished | None = None


@dataclass
class _Folder:
    """The objects below one prefix."""

    size: int = 0
    newest: datetime | None = None
    entries: list[Listed] = field(default_factory=list)

    def add(self, entry: Listed) -> None:
        self.size += entry.size
        self.newest = max(self.newest or entry.modified, entry.modified)
        self.entries.append(entry)


Registered = Callable[[], set[str]]
"""Fingerprints of all registered model versions, asked anew at each call."""


class Picture:
    """The store as one listing showed it."""

    def __init__(self, store: Store, policy: Policy) -> None:
        self.store, self.now = store, store.clock()
        self.old = self.now - timedelta(days=policy.keep_days)
        self.forgotten = self.now - timedelta(hours=policy.unfinished_hours)
        self.artifacts: dict[str, _Folder] = {}
        self.rest: dict[str, dict[str, _Folder]] = {}
        for entry in store.listing():
            parts = entry.key.split("/")
            if parts[0] == "artifacts" and len(parts) > 3:
                self.artifacts.setdefault("/".join(parts[:3]), _Folder()).add(entry)
            elif len(parts) > 1:
                self.rest.setdefault(parts[0], {}).setdefault("/".join(parts[:2]), _Folder()).add(entry)
        self.generations: dict[str, int] = {}
        self.live = {
            key.split("/")[1]: holder
            for key in self.rest.get("leases", {})
            if (holder := self._holder(key)) is not None
        }

    def _holder(self, key: str) -> Owner | None:
        """The holder of this lease if it shows signs of life."""
        folder = self.rest["leases"][key]
        numbers = [int(found[1]) for entry in folder.entries if (found := re.search(r"/(\d+)\.json$", entry.key))]
        self.generations[key.split("/")[1]] = max(numbers, default=0)
        if not numbers or folder.newest is None or (self.now - folder.newest).total_seconds() > LIVE_SECONDS:
            return None
        newest = read_generation(self.store, key.split("/")[1], max(numbers))
        # None: the build ended after the listing
        return None if newest is None or newest.released else newest.owner

    def manifests(self) -> dict[str, Manifest]:
        """By key of the artifact; DataError for one that cannot be read, since what it needs is then unknown."""
        found = {}
        for key, folder in self.artifacts.items():
            if any(entry.key == f"{key}/{MANIFEST}" for entry in folder.entries):
                try:
                    found[key] = load_manifest(self.store, key)
                except FileNotFoundError:
                    continue
                except DamagedArtifactError as error:
                    raise DataError(
                        error.message,
                        advice=f"Nothing was deleted. {error.advice} A damaged object can be restored from a backup.",
                    ) from None
        return found

    def named_by_runs(self) -> set[str]:
        """Fingerprints in the records of young runs, of runs that build now, and of retraining on a schedule."""
        building = {holder.run_id for holder in self.live.values()}
        named: set[str] = set()
        for room in ("runs", "retrain"):
            for key, folder in self.rest.get(room, {}).items():
                young = folder.newest is not None and folder.newest >= self.old
                if room == "runs" and not young and key.split("/")[1] not in building:
                    continue
                for entry in folder.entries:
                    if entry.key.endswith(".json"):
                        named.update(_FINGERPRINT.findall(_text(self.store, entry.key)))
        return named


def _text(store: Store, key: str) -> str:
    try:
        return store.read_bytes(key).decode(errors="replace")
    except FileNotFoundError:
        return ""


def find(store: Store, registered: Registered, policy: Policy) -> list[Waste]:
    """Return everything that is no longer needed, artifacts first."""
    picture = Picture(store, policy)
    manifests = picture.manifests()
    needed = needed_keys(picture, manifests, ask_registry(registered, manifests, policy))
    return [
        *(
            Waste("artifact", key, picture.artifacts[key].size, f"nothing needs it; made {manifest.created_at[:10]}")
            for key, manifest in sorted(manifests.items())
            if key not in needed
        ),
        *_unpublished(picture, manifests),
        *_beside_artifacts(picture, manifests),
        *_uploads(picture),
    ]


def is_record(kind: str) -> bool:
    """Whether artifacts of this kind tell of models: they stay while one of those models is registered."""
    spec = spec_of_kind(kind)
    return spec is not None and spec.closing


def ask_registry(registered: Registered, manifests: Mapping[str, Manifest], policy: Policy) -> set[str]:
    """Ask what is registered; DataError when the answer seems to come from the MLflow of another store."""
    found = registered()
    promotions = [key for key, manifest in manifests.items() if manifest.stage is Stage.PROMOTE]
    if promotions and not policy.nothing_registered and not found & {m.fingerprint for m in manifests.values()}:
        raise DataError(
            f"MLflow knows no model of this store as registered, though {len(promotions)} promotions are in it",
            advice="Set MLFLOW_TRACKING_URI to the server that this store belongs to. If no model is registered any "
            "more, say --nothing-registered.",
        )
    return found


def needed_keys(picture: Picture, manifests: Mapping[str, Manifest], registered: set[str]) -> set[str]:
    """Keys of the artifacts that must stay."""
    by_fingerprint = {manifest.fingerprint: key for key, manifest in manifests.items()}
    named = picture.named_by_runs() | registered | set(picture.live)
    waiting = [
        key
        for key, manifest in manifests.items()
        if manifest.fingerprint in named
        or manifest.kind in MADE_BY_PEOPLE
        or any(entry.modified >= picture.old for entry in picture.artifacts.get(key, _Folder()).entries)
    ]
    needed: set[str] = set()
    while waiting:
        if (key := waiting.pop()) not in needed:
            needed.add(key)
            manifest = manifests[key]
            from_outside = [name for source in manifest.sources for name in _FINGERPRINT.findall(source.uri)]
            sources = [*(entry.fingerprint for entry in manifest.inputs), *from_outside]
            waiting += [by_fingerprint[source] for source in sources if source in by_fingerprint]
    records = {
        key
        for key, manifest in manifests.items()
        if is_record(manifest.kind) and any(entry.fingerprint in registered for entry in manifest.inputs)
    }
    return needed | records


def _unpublished(picture: Picture, manifests: Mapping[str, Manifest]) -> Iterator[Waste]:
    for key, folder in sorted(picture.artifacts.items()):
        fingerprint = key.rsplit("/", 1)[1]
        if key in manifests or fingerprint in picture.live or _after(folder, picture.forgotten):
            continue
        yield Waste("unfinished publication", key, folder.size, "it has no manifest, and no process builds it")


def _beside_artifacts(picture: Picture, manifests: Mapping[str, Manifest]) -> Iterator[Waste]:
    published = {manifest.fingerprint for manifest in manifests.values()}
    for room, what in (
        ("checkpoints", "checkpoints"),
        ("leases", "lease"),
        ("reference-logprobs", "cache"),
        ("gates", "findings of a gate"),
        ("measurements", "cache"),
        ("answers", "cache"),
        ("probe", "probe"),
    ):
        for key, folder in sorted(picture.rest.get(room, {}).items()):
            fingerprint = key.split("/")[1]
            if fingerprint in picture.live:
                continue
            if room in ("checkpoints", "leases") and fingerprint in published:
                if not _after(folder, picture.forgotten):
                    yield Waste(what, key, folder.size, "its artifact is published")
            elif room == "probe" and not _after(folder, picture.forgotten):
                yield Waste(what, key, folder.size, "left by a probe that was killed")
            elif room == "gates" and fingerprint in published:
                continue  # they are about an artifact that is there
            elif room in _KEPT_WHILE_USED and not _after(folder, picture.old):
                yield Waste(what, key, folder.size, "not touched for a long time; it can be computed again")


def _after(folder: _Folder, moment: datetime) -> bool:
    return folder.newest is not None and folder.newest >= moment


def _uploads(picture: Picture) -> Iterator[Waste]:
    for upload in sorted(picture.store.unfinished(), key=lambda upload: upload.key):
        if upload.started < picture.forgotten and not picture.live.keys() & set(upload.key.split("/")):
            yield Waste("upload", upload.key, 0, f"begun {upload.started:%Y-%m-%d} and not finished", upload)
