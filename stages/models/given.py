"""The base model that a run is given: an artifact of ours, `models:/name@alias` in MLflow, a Hugging Face folder or hub
id, or a GGUF file: a path, `s3://bucket/key.gguf`, `hf://org/repo/file.gguf` or `package://module/file.gguf`."""

import hashlib
import re
from pathlib import Path

from stages.artifacts.manifests import canonical_json, fetch, hash_file, read_manifest
from stages.config.errors import ConfigError
from stages.config.places import GGUF, PACKAGE, check_source, is_gguf, local_path, package_file
from stages.models.folder import COVERED, check_folder, read_settings
from stages.models.foreign_code import brings_code, code_files, may_run_code
from stages.models.gguf_header import read_header
from stages.tracking.client import artifact_uri_of_model

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_HUB_FILE = re.compile(rf"(?:hf://)?({_HUB_ID.pattern})/((?:[^/]+/)*[^/]+{re.escape(GGUF)})", re.IGNORECASE)


def snapshot_base_model(uri: str) -> str:
    """Return the digest of the model's content without loading it; raises ConfigError when it is not there."""
    uri = _resolved(uri)
    if is_gguf(uri):
        return _digest_of_file(uri)
    if _is_artifact(uri):
        return _manifest_of(uri).digest
    folder = local_path(uri, field="base_model")
    if folder.is_dir():
        files = [(path.name, hash_file(path)) for path in check_folder(folder)]
        if brings_code(folder):
            files += [(path.relative_to(folder).as_posix(), hash_file(path)) for path in code_files(folder)]
        if _was_read_wrongly(folder / "tokenizer.json"):
            files.append(("tokenizer.json without limits, all ids whole", ""))
        return hashlib.sha256(canonical_json(files)).hexdigest()
    if _HUB_ID.fullmatch(uri):
        return _hub_revision(uri, uri)
    raise _not_there(uri)


def _hub_revision(repository: str, uri: str, *, file: str = "") -> str:
    """The commit that a hub repository is at; raises ConfigError when it, or a file of it, is not there."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

    try:
        found = HfApi().model_info(repository)
    except GatedRepoError as error:  # also a RepositoryNotFoundError
        raise ConfigError(
            f"base_model={uri!r} is given only to accounts that accept its terms",
            advice="Accept them on its page, and set HF_TOKEN to that account's token where Ray's processes run.",
        ) from error
    except (HFValidationError, RepositoryNotFoundError) as error:
        raise _not_there(uri) from error
    files = sorted(entry.rfilename for entry in found.siblings or () if is_gguf(entry.rfilename))
    if file and file not in files:
        raise ConfigError(
            f"base_model={uri!r}: there is no such file on the hub; GGUF files there: {', '.join(files) or 'none'}",
            advice=f"Write hf://{repository}/<one of them>." if files else "Give another repository.",
        )
    return str(found.sha)


def gguf_file(uri: str, cache_dir: Path, *, revision: str | None = None) -> Path:
    """Return a local copy of a GGUF file; raises ConfigError when there is none. `revision` is what the digest of a
    file on the hub stands for."""
    uri = _resolved(uri)
    if uri.startswith("s3://"):
        return _downloaded(uri, cache_dir)
    if (file := local_gguf(uri)) is not None:
        return file
    repository, name = _on_hub(uri)
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(repository, name, revision=revision))


def _digest_of_file(uri: str) -> str:
    if uri.startswith("s3://"):
        return hashlib.sha256(f"{uri.rpartition('/')[2]} {_etag(uri)}".encode()).hexdigest()
    if (file := local_gguf(uri)) is not None:
        read_header(file)  # a file that is damaged is refused before anything is made for it
        return hash_file(file)
    repository, name = _on_hub(uri)
    return _hub_revision(repository, uri, file=name)


def local_gguf(uri: str) -> Path | None:
    """The file of an installed package, or of this machine; None when the address can only be one of the hub."""
    if uri.startswith(PACKAGE):
        return package_file(uri, field="base_model")
    if uri.startswith("hf://"):
        return None
    file = local_path(uri, field="base_model")
    if file.is_file():
        return file
    if file.is_absolute() or not _HUB_FILE.fullmatch(uri):
        raise _not_there(uri)
    return None


def _on_hub(uri: str) -> tuple[str, str]:
    found = _HUB_FILE.fullmatch(uri)
    if not found:
        raise ConfigError(
            f"base_model={uri!r} names no GGUF file of a hub repository",
            advice=f"Write hf://org/repository/file{GGUF}.",
        )
    return found[1], found[2]


def _etag(uri: str) -> str:
    """S3's etag and the size stand for the content, as for data."""
    from stages.data.sources.storage import list_objects

    found = list_objects(uri, field="base_model").files
    if len(found) != 1 or found[0].uri != uri:
        raise _not_there(uri)
    return f"{found[0].size} {found[0].etag}"


def _downloaded(uri: str, cache_dir: Path) -> Path:
    folder, _, name = uri.rpartition("/")
    file = cache_dir / "gguf-files" / hashlib.sha256(f"{uri} {_etag(uri)}".encode()).hexdigest() / name
    if not file.is_file():
        from stages.artifacts.addresses import open_store

        open_store(folder).download(name, file)  # complete or absent
    return file


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
        advice="Give an artifact URI, models:/name@alias, a Hugging Face folder or hub id, or a GGUF file; "
        "empty = pretrain.",
    )
