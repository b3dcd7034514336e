"""The base model that a run is given: an artifact of ours, `models:/name@alias` in MLflow, a Hugging Face folder or hub
id."""

import re
from pathlib import Path

from stages.artifacts.manifests import canonical_json, fetch, hash_file, read_manifest
from stages.config.errors import ConfigError
from stages.config.places import check_source, local_path
from stages.models.foreign_code import brings_code, code_files, may_run_code
from stages.tracking.client import artifact_uri_of_model

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_WEIGHTS = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt")


def snapshot_base_model(uri: str) -> str:
    """Return the digest of the model's content without loading it; raises ConfigError when it is not there."""
    uri = _resolved(uri)
    if _is_artifact(uri):
        return _manifest_of(uri).digest
    folder = local_path(uri, field="base_model")
    if folder.is_dir():
        import hashlib

        files = [(path.name, hash_file(path)) for path in _model_files(folder)]
        if brings_code(folder):
            files += [(path.relative_to(folder).as_posix(), hash_file(path)) for path in code_files(folder)]
        return hashlib.sha256(canonical_json(files)).hexdigest()
    if _HUB_ID.fullmatch(uri):
        from huggingface_hub import HfApi

        return str(HfApi().model_info(uri).sha)
    raise _not_there(uri)


def base_model_dir(uri: str, cache_dir: Path) -> Path:
    """Return a local folder with the model's files; weights are safetensors. Pickles are refused, and so is code that
    the deployment does not allow."""
    uri = _resolved(uri)
    if _is_artifact(uri):
        return fetch(_manifest_of(uri).ref(uri), cache_dir)
    folder = local_path(uri, field="base_model")
    if not folder.is_dir():
        if not _HUB_ID.fullmatch(uri):
            raise _not_there(uri)
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(uri, allow_patterns=[*_WEIGHTS, "*.py"]))
    _model_files(folder)
    may_run_code(folder)
    return folder


def _is_artifact(uri: str) -> bool:
    return "/artifacts/" in uri and uri.startswith(("file://", "s3://"))


def _manifest_of(uri: str):
    try:
        return read_manifest(uri)
    except FileNotFoundError:
        raise _not_there(uri) from None


def _resolved(uri: str) -> str:
    """Follow `models:/name@alias` or `models:/name/version` to the artifact that the version was registered from;
    ConfigError for a place that is closed to sources."""
    found = artifact_uri_of_model(uri) if uri.startswith("models:/") else uri
    check_source(found, field="base_model")
    return found


def _model_files(folder: Path) -> list[Path]:
    if not (folder / "config.json").is_file():
        raise ConfigError(
            f"base_model={str(folder)!r} has no config.json, so it is not a Hugging Face model",
            advice="Give the folder that save_pretrained wrote.",
        )
    if not list(folder.glob("*.safetensors")):
        raise ConfigError(
            f"base_model={str(folder)!r} has no *.safetensors; other weight formats may run code and are refused",
            advice="Save it again with save_pretrained.",
        )
    return sorted({path for pattern in _WEIGHTS for path in folder.glob(pattern)})


def _not_there(uri: str) -> ConfigError:
    return ConfigError(
        f"base_model={uri!r} does not exist",
        advice="Give an artifact URI, models:/name@alias, a Hugging Face folder or hub id; empty = pretrain.",
    )
