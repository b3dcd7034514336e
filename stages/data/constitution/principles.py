"""Read the principles from their YAML file: the one that comes with Athanor, or one that a person wrote.

YAML says some things twice without a complaint. Here a key that stands twice in a mapping, and an alias, are errors.
"""

import hashlib
from importlib.resources import files
from typing import Any

import yaml
from pydantic import ValidationError

from stages.config.errors import ConfigError, DataError
from stages.config.principles import PRINCIPLES, SHIPPED, Constitution
from stages.data.sources.storage import list_objects
from stages.data.sources.streams import Damaged, read_whole

_MOST_BYTES = 1 << 20
_ADVICE = "Correct the file; docs/CONSTITUTION.md shows one with all its fields."
_SHOWN = 80


def read_constitution(address: str) -> Constitution:
    """Return the principles at an address; raises DataError that names the field of the file."""
    return parse_constitution(_content(address), address)


def snapshot_principles(address: str) -> str:
    """The identity of a file of principles, as a hex digest of its content."""
    return hashlib.sha256(_content(address)).hexdigest()


def parse_constitution(data: bytes, address: str) -> Constitution:
    """Return the principles that a file states; raises DataError for one that states none."""
    try:
        found = yaml.load(data.decode("utf-8-sig"), _Strict)  # noqa: S506 - derived from SafeLoader
    except (yaml.YAMLError, UnicodeDecodeError, ValueError, RecursionError) as error:
        what = " ".join(str(error).split())
        raise DataError(f"{PRINCIPLES}={address!r} is no YAML: {what[:500]}", advice=_ADVICE) from None
    if not isinstance(found, dict):
        raise DataError(
            f"{PRINCIPLES}={address!r} holds {type(found).__name__} and no mapping with name, version and principles",
            advice=_ADVICE,
        )
    try:
        return Constitution.model_validate(found)
    except ValidationError as error:
        raise DataError(f"{PRINCIPLES}={address!r}: {_told(error, found)}", advice=_ADVICE) from None


def _content(address: str) -> bytes:
    if address == SHIPPED:
        return files("stages.data.constitution").joinpath("default.yaml").read_bytes()
    found = list_objects(address, field=PRINCIPLES).files
    if len(found) != 1:
        raise ConfigError(
            f"{PRINCIPLES}={address!r} is not one file, it holds {len(found)}",
            advice=f"Give the YAML file itself, or {SHIPPED!r} for the principles that come with Athanor.",
        )
    try:
        return read_whole(found[0], _MOST_BYTES)
    except Damaged as error:
        raise DataError(
            f"{PRINCIPLES}={address!r} cannot be read ({error.reason}): {error}", advice="Give a YAML file of text."
        ) from None


def _told(error: ValidationError, found: Any) -> str:
    """Every problem with its place, a principle by its id where it has one."""
    sentences = []
    for problem in error.errors():
        place = ".".join(_named(part, problem["loc"], found) for part in problem["loc"])
        what = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "extra_forbidden":
            what = "unknown field"
        elif problem["type"] not in ("missing", "value_error"):
            what += f", got {str(problem['input'])[:_SHOWN]!r}"
        sentences.append(f"{place}: {what}")
    return "; ".join(sentences)


def _named(part: int | str, path: tuple[int | str, ...], found: Any) -> str:
    if not isinstance(part, int) or path[0] != "principles":
        return str(part)
    entry = found["principles"][part]
    name = entry.get("id") if isinstance(entry, dict) else None
    return f"{part + 1} ({name})" if isinstance(name, str) and name else str(part + 1)


class _Strict(yaml.SafeLoader):
    """Safe, without aliases, and without keys that stand twice."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.events.AliasEvent):
            raise yaml.YAMLError(f"an alias (*) in line {self.peek_event().start_mark.line + 1}; write the text out")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen: set[Any] = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.YAMLError(f"{key.value!r} stands twice, again in line {key.start_mark.line + 1}")
            seen.add(key.value)
        return super().construct_mapping(node, deep=deep)
