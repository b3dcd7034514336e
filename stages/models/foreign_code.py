"""Python that comes with a model: refused, unless whoever runs the workers has allowed exactly this code.

ATHANOR_ALLOW_REMOTE_CODE in the environment of Ray's processes holds SHA-256 digests, each over all Python files of a
model's folder. A digest pins as much as a repository's revision does, and it holds wherever the files lie: on the hub,
in a folder, in an artifact made from that model. Who triggers a run cannot set it.
"""

import hashlib
import logging
import os
import re
import shutil
from pathlib import Path

from stages.artifacts.manifests import canonical_json, hash_file
from stages.config.errors import ConfigError
from stages.models.folder import read_settings

logger = logging.getLogger(__name__)

ALLOWED = "ATHANOR_ALLOW_REMOTE_CODE"
_DIGEST = re.compile(r"[0-9a-f]{64}")


def brings_code(folder: Path) -> bool:
    """Whether the model's architecture is one that transformers itself does not know, and comes as Python files."""
    # Unlike CONFIG_MAPPING it has the library's own alone, whatever code has registered in this process.
    from transformers.models.auto.configuration_auto import (
        CONFIG_MAPPING_NAMES,  # pyright: ignore[reportPrivateImportUsage]
    )

    config = read_settings(folder / "config.json")
    return bool(config.get("auto_map")) and str(config.get("model_type")) not in CONFIG_MAPPING_NAMES


def may_run_code(folder: Path) -> bool:
    """Whether the folder's code is to run: not when nothing needs it; ConfigError when it is not allowed."""
    if not brings_code(folder):
        return False
    allowed, digest = _allowed(), code_digest(folder)
    config = read_settings(folder / "config.json")
    if not isinstance(config["auto_map"], dict):
        raise ConfigError(
            f"{folder / 'config.json'}: auto_map={config['auto_map']!r} is no object of classes and their code",
            advice="Write it as save_pretrained does: the name of an Auto class, and `file.Class`.",
        )
    elsewhere = sorted(name for name in config["auto_map"].values() if "--" in str(name))
    if elsewhere:
        raise ConfigError(
            f"model {str(folder)!r} wants code of another repository (auto_map in config.json: {elsewhere}), which is "
            "not pinned by anything and never runs",
            advice="Copy that code into the model's own folder, and name it in auto_map without the repository.",
        )
    if digest not in allowed:
        raise ConfigError(
            f"model {str(folder)!r} brings code of its own for model_type={config.get('model_type')!r} (auto_map in "
            f"config.json), which does not run: {ALLOWED} does not hold its digest {digest}",
            advice="Use a model whose architecture transformers itself knows. Or read all its *.py files, and let "
            f"whoever runs Ray set {ALLOWED}={digest} there: this code will run with the workers' credentials.",
        )
    logger.warning("Running the code that %s brings, digest %s, as %s allows.", folder, digest, ALLOWED)
    return True


def code_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*.py") if path.is_file())


def code_digest(folder: Path) -> str:
    """SHA-256 over names and contents of all Python files of the folder."""
    files = [(path.relative_to(folder).as_posix(), hash_file(path)) for path in code_files(folder)]
    return hashlib.sha256(canonical_json(files)).hexdigest()


def is_allowed(digest: str) -> bool:
    """Whether the administrators of the workers allow exactly this code."""
    return digest in _allowed()


def copy_code(source: Path, target: Path) -> None:
    """Let a model that was made from one with code have exactly that code, and so the same digest."""
    for path in code_files(target):
        path.unlink()
    for path in code_files(source):
        (copy := target / path.relative_to(source)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)


def _allowed() -> set[str]:
    entries = set(os.environ.get(ALLOWED, "").replace(",", " ").split())
    if wrong := sorted(entry for entry in entries if not _DIGEST.fullmatch(entry)):
        raise ConfigError(
            f"{ALLOWED} holds {wrong}; allowed are SHA-256 digests of code, 64 hexadecimal digits each, with commas or "
            "spaces between",
            advice="A repository's name or a branch pins no code. The error of a refused model says its digest.",
        )
    return entries
