"""The artifact that an address names, with every byte checked against its manifest."""

import os
from dataclasses import dataclass
from pathlib import Path

from stages.artifacts.manifests import MANIFEST, fetch, read_manifest
from stages.config.errors import ConfigError
from stages.config.graph import kinds_of_start, spec_of_kind, trained_stages
from stages.config.places import GGUF
from stages.config.request import ArtifactRef, Manifest
from stages.lineage.tags import is_model

_ADVICE = (
    "Give models:/<name>@<alias> or models:/<name>/<version> of a registered model, or the address of its artifact: "
    "<store>/artifacts/<kind>/<fingerprint>, which MLflow shows as the tag artifact.uri and the task in Airflow as a "
    "button."
)


@dataclass(frozen=True)
class Found:
    """A model's artifact."""

    ref: ArtifactRef
    manifest: Manifest

    @property
    def scores(self) -> bool:
        """Whether it gives scores and no text."""
        spec = spec_of_kind(self.manifest.kind)
        return spec is not None and spec.scores

    @property
    def has_adapter(self) -> bool:
        return any(entry.path.startswith("adapter/") for entry in self.manifest.files)

    @property
    def size(self) -> int:
        return sum(entry.size for entry in self.manifest.files)

    def fetch(self, cache_dir: Path) -> Path:
        """A folder with its files, all of them verified; a copy in `cache_dir` unless the store is a folder."""
        return fetch(self.ref, cache_dir)


def find_model(address: str, *, also_given: bool = False) -> Found:
    """Look the address up; raises ConfigError that says what to give when it names no model of Athanor's.

    With `also_given`, models that a run was given as a GGUF file count too.
    """
    address = address.strip()
    digest = ""
    if address.startswith("models:"):
        from stages.tracking.client import registered_artifact  # mlflow takes seconds to import

        registered = registered_artifact(address)
        uri, digest = registered.uri, registered.digest
    else:
        uri = _artifact_uri(address)
    try:
        manifest = read_manifest(uri)
    except FileNotFoundError:
        raise ConfigError(
            f"there is no artifact at {uri!r}: its manifest is missing",
            advice="Was it removed by `make gc`, or does it lie in another store? " + _ADVICE,
        ) from None
    if digest and digest != manifest.digest:
        raise ConfigError(
            f"{address!r} was registered with content {digest[:12]}, and {uri} has {manifest.digest[:12]}",
            advice="The artifact was replaced or built again. Register it anew, or give its own address.",
        )
    if not is_model(manifest.kind) and not (also_given and manifest.kind in kinds_of_start()):
        kinds = ", ".join(spec.kind for spec in trained_stages())
        raise ConfigError(f"{uri} is of kind {manifest.kind!r}, which is no model; allowed: {kinds}", advice=_ADVICE)
    return Found(manifest.ref(uri), manifest)


def is_artifact_address(address: str) -> bool:
    """Whether an address can only be that of a registered model or an artifact, and of no model from elsewhere."""
    if address.lower().endswith(GGUF):
        return False
    if address.startswith(("models:", "s3://")):
        return True
    return "/artifacts/" in address and not _is_plain_folder(Path(os.path.expanduser(address)))


def _is_plain_folder(path: Path) -> bool:
    """Whether it is a folder that only happens to lie below one called `artifacts`; an artifact without its manifest
    was removed or is not complete, and is not read as a model from elsewhere."""
    if not path.is_dir() or (path / MANIFEST).is_file():
        return False
    return path.parent.parent.name != "artifacts" or spec_of_kind(path.parent.name) is None


def _artifact_uri(address: str) -> str:
    """The address in the form `<store>/artifacts/<kind>/<fingerprint>`; local folders become file://."""
    if not address.startswith(("file://", "s3://")):
        path = Path(os.path.expanduser(address)).absolute()
        if path.is_dir() and path.parent.parent.name == "artifacts":
            return path.as_uri()
        what = "a folder, but no artifact of Athanor's" if path.is_dir() else "no artifact of Athanor's"
        raise ConfigError(f"{address!r} is {what}", advice=_ADVICE)
    head, separator, tail = address.rstrip("/").rpartition("/artifacts/")
    if not head or not separator or tail.count("/") != 1:
        raise ConfigError(f"{address!r} is not the address of an artifact", advice=_ADVICE)
    return address.rstrip("/")
