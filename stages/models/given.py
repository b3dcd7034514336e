"""The base model that a run is given: an artifact of ours, `models:/name@alias` in MLflow, a Hugging Face folder or hub
id."""

import re
from pathlib import Path

from stages.artifacts.manifests import canonical_json, fetch, hash_file, read_manifest
from stages.config.errors import ConfigError
from stages.config.places import check_source, local_path
from stages.models.folder import COVERED, check_folder, read_settings
from stages.models.foreign_code import brings_code, code_files, may_run_code
from stages.tracking.client import artifact_uri_of_model

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def snapshot_base_model(uri: str) -> str:
    """Return the digest of the model's content without loading it; raises ConfigError when it is not there."""
    uri = _resolved(uri)
    if _is_artifact(uri):
        return _manifest_of(uri).digest
    folder = local_path(uri, field="base_model")
    if folder.is_dir():
        import hashlib

        files = [(path.name, hash_file(path)) for path in check_folder(folder)]
        if brings_code(folder):
            files += [(path.relative_to(folder).as_posix(), hash_file(path)) for path in code_files(folder)]
        if _was_read_wrongly(folder / "tokenizer.json"):
            files.append(("tokenizer.json without limits, all ids whole", ""))
        return hashlib.sha256(canonical_json(files)).hexdigest()
    if _HUB_ID.fullmatch(uri):
        from huggingface_hub import HfApi
        from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

        try:
            return str(HfApi().model_info(uri).sha)
        except GatedRepoError as error:  # also a RepositoryNotFoundError
            raise ConfigError(
                f"base_model={uri!r} is given only to accounts that accept its terms",
                advice="Accept them on its page, and set HF_TOKEN to that account's token where Ray's processes run.",
            ) from error
        except (HFValidationError, RepositoryNotFoundError) as error:
            raise _not_there(uri) from error
    raise _not_there(uri)


def _was_read_wrongly(path: Path) -> bool:
    """Whether earlier versions cut texts by limits in this tokenizer.json, or stored its ids in too few bits.

    The digest of such a folder is another one than theirs, so that what they made of it is no hit.
    """
    if not path.is_file():
        return False
    settings = read_settings(path)
    model = settings.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    ids = list(vocabulary.values()) if isinstance(vocabulary, dict) else []
    was_narrow = len(ids) <= 1 << 16 and any(isinstance(number, int) and number >= 1 << 16 for number in ids)
    return bool(settings.get("truncation") or settings.get("padding")) or was_narrow


def base_model_dir(uri: str, cache_dir: Path, *, revision: str | None = None) -> Path:
    """Return a local folder with the model's files; weights are safetensors. Pickles are refused, and so is code that
    the deployment does not allow. `revision` is what the digest of a hub id stands for."""
    uri = _resolved(uri)
    if _is_artifact(uri):
        return fetch(_manifest_of(uri).ref(uri), cache_dir)
    folder = local_path(uri, field="base_model")
    if not folder.is_dir():
        if not _HUB_ID.fullmatch(uri):
            raise _not_there(uri)
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(uri, revision=revision, allow_patterns=[*COVERED, "*.py"]))
    check_folder(folder)
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


def _not_there(uri: str) -> ConfigError:
    return ConfigError(
        f"base_model={uri!r} does not exist",
        advice="Give an artifact URI, models:/name@alias, a Hugging Face folder or hub id; empty = pretrain.",
    )
