"""Which licence a source states: in its folder's README or LICENSE, in its card on the hub, in the head of a GGUF file;
of the documentation of installed packages, in their metadata.

Only what lies here already is read, so a card costs no network; what states nothing is unknown, and the card says so.
"""

import importlib.metadata
import logging
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from stages.config.curate import INSTALLED_DOCS
from stages.config.errors import StageError
from stages.config.places import PACKAGE, check_source, hub_name, is_gguf, local_path, package_file
from stages.config.request import SourceEntry, SourceKind
from stages.config.text import one_line

logger = logging.getLogger(__name__)

_CARD, _FILES = "README.md", ("LICENSE*", "LICENCE*", "COPYING*", "license*", "licence*")
_KEY = "general.license"
_LONGEST, _MOST_READ = 80, 1 << 16


def licences_of(sources: Iterable[SourceEntry], *, packages: Iterable[str] = ()) -> dict[str, str]:
    """The licences by URI of the source, without those that are not known; `packages` are those whose documentation was
    read."""
    found = {source.uri: _licence(source) for source in dict.fromkeys(sources)}
    if INSTALLED_DOCS in found:
        found[INSTALLED_DOCS] = _of_packages(packages)
    return {uri: licence for uri, licence in found.items() if licence}


def _of_packages(names: Iterable[str]) -> str:
    """`BSD-3-Clause (click, jinja2), MIT (rich)`, of the packages that are installed here."""
    holders: dict[str, list[str]] = {}
    for name in sorted(names):
        try:
            facts = importlib.metadata.metadata(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        trove = [line.rpartition(" :: ")[2] for line in facts.get_all("Classifier") or () if line.startswith("License")]
        named = [facts[key] for key in ("License-Expression", "License") if key in facts]
        stated = named[0] if "License-Expression" in facts else [*trove, *named, ""][0]
        if stated:
            holders.setdefault(_short(stated), []).append(name)
    return ", ".join(f"{licence} ({', '.join(found)})" for licence, found in sorted(holders.items()))


def _licence(source: SourceEntry) -> str:
    try:
        if source.uri == INSTALLED_DOCS:
            return ""
        if source.uri.startswith("hf://") or _is_on_hub(source):
            return _on_hub(source)
        if source.uri.startswith(("s3://", "models:/")) or "/artifacts/" in source.uri:
            return ""
        if source.uri.startswith(PACKAGE):
            return _of_place(package_file(source.uri))
        check_source(source.uri)  # as strictly as when it was read
        return _of_place(local_path(source.uri))
    except (StageError, OSError, ValueError) as error:
        logger.info("no licence of %s is known: %s", source.role, error)
        return ""


def _is_on_hub(source: SourceEntry) -> bool:
    return source.kind is SourceKind.MODEL and bool(re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", source.uri))


def _on_hub(source: SourceEntry) -> str:
    """From the card that lies in the hub's cache."""
    from huggingface_hub import try_to_load_from_cache

    kind = "model" if source.kind is SourceKind.MODEL else "dataset"
    parts = hub_name(source.uri).split("/")
    card = try_to_load_from_cache("/".join(parts[:2]), _CARD, repo_type=kind)
    return _of_card(Path(card)) if isinstance(card, str) else ""


def _of_place(path: Path) -> str:
    if path.is_file() and is_gguf(path.name) and (stated := _of_gguf(path)):
        return stated
    if not path.exists():  # a name such as `installed-docs`; its folder would be the one we run in
        return ""
    folder = path if path.is_dir() else path.parent
    if (folder / _CARD).is_file() and (stated := _of_card(folder / _CARD)):
        return stated
    for pattern in _FILES:
        for file in sorted(folder.glob(pattern)):
            if file.is_file():
                lines = file.open("rb").read(_MOST_READ).decode(errors="replace").splitlines()
                return _short(next((line for line in lines if line.strip()), ""))
    return ""


def _of_card(path: Path) -> str:
    from huggingface_hub import metadata_load

    try:
        stated = (metadata_load(path) or {}).get("license")
    except Exception as error:  # noqa: BLE001 - YAML's errors are of many kinds, and the text is not ours
        logger.info("the header of %s cannot be read: %s", path.name, one_line(str(error), at_most=200))
        return ""
    return _short(", ".join(map(str, stated)) if isinstance(stated, list) else str(stated or ""))


def _of_gguf(path: Path) -> str:
    from gguf import GGUFReader

    field: Any = GGUFReader(path).fields.get(_KEY)
    return _short(str(field.contents())) if field is not None else ""


def _short(text: str) -> str:
    return one_line(text.strip(), at_most=_LONGEST)
