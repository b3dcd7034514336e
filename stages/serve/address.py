"""Which models are asked for: addresses as people type them, each with the name that clients use."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from stages.config.errors import ConfigError
from stages.config.text import CONTROLS

_NAMED = re.compile(r"(?P<name>[A-Za-z0-9][\w.@:-]*)=(?P<uri>.+)", re.ASCII)


@dataclass(frozen=True)
class Address:
    """Where a model lies, and what it is called here."""

    name: str
    uri: str


def parse_addresses(given: Sequence[str]) -> list[Address]:
    """Read `[name=]address` each; raises ConfigError for a name that stands for two."""
    addresses = [_parsed(text.strip()) for text in given]
    names = [address.name for address in addresses]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(
            f"two models would be called {twice[0]!r}",
            advice=f"Give each a name of its own: first={addresses[names.index(twice[0])].uri}",
        )
    return addresses


def _parsed(text: str) -> Address:
    if not text or re.search(f"[{CONTROLS}]", text):
        raise ConfigError(
            f"model={text!r} is empty or has control characters",
            advice="Give models:/<name>@<alias>, the address of an artifact, a folder, or a hub id.",
        )
    named = _NAMED.fullmatch(text)
    if named and not Path(text).exists():
        return Address(named["name"], named["uri"])
    return Address(short_name(text), text)


def short_name(uri: str) -> str:
    """What a model of this address is called when nobody gave it a name: never a path of this machine."""
    if uri.startswith("models:/"):
        return uri.removeprefix("models:/")
    parts = [part for part in re.split(r"[/\\]", uri) if part]
    if len(parts) > 2 and parts[-3] == "artifacts":
        return f"{parts[-2]}-{parts[-1][:12]}"
    is_hub_id = len(parts) == 2 and "://" not in uri and not uri.startswith((".", "/", "~")) and not Path(uri).exists()
    return uri if is_hub_id else (parts[-1] if parts else uri)
