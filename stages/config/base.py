"""The frozen pydantic base of everything that crosses a process; the string under a field is its only documentation.

A stage's config is also the identity of what the stage makes: `identity()` enters the fingerprint, by which artifacts
are found again. Two declarations let the fields of a class change while earlier artifacts stay valid:

- a new field is marked `AddedLater(value)`: the value that describes how everything before it was made;
- a field that moves is listed in `moved`, old name to new path. The old name is still read, in stored requests and in
  overrides, and the identity still spells it.

A field that goes without a successor is listed in `retired`: stored settings that name it are still read, and a person
who sets it is told what to use instead.

Any other change to the fields of a stage's config invalidates the stage's earlier artifacts: they are built again.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import UnionType
from typing import Any, ClassVar, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, model_validator
from pydantic.fields import FieldInfo


@dataclass(frozen=True)
class AddedLater:
    """Marks a field that came after artifacts existed: while it holds this value, the identity leaves it out.

    `clip: Annotated[float, AddedLater(0.0)] = 0.0`. The value is stated apart from the default, because it never
    changes: a default that changes must give new fingerprints.
    """

    value: Any


class Config(BaseModel):
    """Immutable, strict about unknown fields, without NaN and infinities, which JSON does not have.

    Derive a changed copy with `model_copy(update=...)`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False)

    moved: ClassVar[Mapping[str, str]] = {}
    """Earlier names of fields of this class, each with the current path `group.field`."""
    retired: ClassVar[Mapping[str, str]] = {}
    """Earlier fields of this class that decide nothing any more, each with what to use instead."""

    @model_validator(mode="before")
    @classmethod
    def _read_earlier_names(cls, data: Any) -> Any:
        """What was written with earlier names, by another version or by hand, keeps its meaning."""
        if not isinstance(data, Mapping) or not (cls.moved.keys() | cls.retired.keys()) & data.keys():
            return data
        tree = {name: value for name, value in data.items() if name not in cls.retired}
        for old, new in cls.moved.items():
            if old in tree:
                cls._put(tree, new, tree.pop(old), old=old)
        return tree

    @classmethod
    def _put(cls, tree: dict[str, Any], path: str, value: Any, *, old: str) -> None:
        """Set a field at its current path, in a copy of its group, because the original belongs to the caller."""
        group, leaf = path.split(".")
        below = tree.get(group, {})
        if not isinstance(below, Mapping) or leaf in below:
            raise ValueError(
                f"{old}={value!r} is the earlier name of {path}, and {group} is given too; give one of them"
            )
        # What was written before there were kinds names none, and pydantic reads no member of a union without.
        kind = getattr(cls.model_fields[group].default, "kind", None)
        tree[group] = ({"kind": kind} if kind else {}) | {**below, leaf: value}

    def identity(self, *, only_given: bool = False) -> dict[str, Any]:
        """Return the JSON that stands for these settings in a fingerprint.

        With `only_given`, defaults that were filled in are left out: that is what a stored config stood for when it was
        written, whatever fields have been added since.
        """
        found = self.model_dump(mode="json", exclude_unset=only_given)
        for name, field in type(self).model_fields.items():
            if name not in found:
                continue
            value = getattr(self, name)
            if any(isinstance(mark, AddedLater) and mark.value == value for mark in field.metadata):
                del found[name]
            else:
                found[name] = _identity(value, found[name], only_given=only_given)
        for old, new in self.moved.items():
            _take(found, new, into=old)
        return found

    @classmethod
    def current_path(cls, path: str) -> str:
        """Return the current path of a field that may be given by an earlier name."""
        if path in cls.moved:
            return cls.moved[path]
        head, _, rest = path.partition(".")
        below = _classes(cls.model_fields.get(head)) if rest else []
        return f"{head}.{below[0].current_path(rest)}" if len(below) == 1 else path

    @classmethod
    def instead_of(cls, path: str) -> str:
        """Return what to use instead of a field that is no longer there; empty for any other path."""
        if path in cls.retired:
            return cls.retired[path]
        head, _, rest = path.partition(".")
        below = _classes(cls.model_fields.get(head)) if rest else []
        return below[0].instead_of(rest) if len(below) == 1 else ""

    @classmethod
    def members(cls, path: str) -> dict[str, "type[Config]"]:
        """Return the classes that a field may hold, by the `kind` that tells them apart; none if it has no kinds."""
        head, _, rest = path.partition(".")
        below = _classes(cls.model_fields.get(head))
        if rest:
            return below[0].members(rest) if len(below) == 1 else {}
        kinds = {member.model_fields["kind"].default: member for member in below if "kind" in member.model_fields}
        return {kind: member for kind, member in kinds.items() if isinstance(kind, str)}


def _identity(value: Any, dumped: Any, *, only_given: bool) -> Any:
    if isinstance(value, Config):
        return value.identity(only_given=only_given)
    if isinstance(value, tuple):
        return [_identity(item, json, only_given=only_given) for item, json in zip(value, dumped, strict=True)]
    return dumped


def _classes(field: FieldInfo | None) -> list[type[Config]]:
    """The Config classes of a field: one, several in a union, or none."""
    if field is None:
        return []
    kinds = get_args(field.annotation) if get_origin(field.annotation) in (Union, UnionType) else (field.annotation,)
    return [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Config)]


def _take(tree: dict[str, Any], path: str, *, into: str) -> None:
    """Move a field back to its earlier place, and remove a group that is left empty."""
    group, leaf = path.split(".")
    if leaf in tree.get(group, {}):
        tree[into] = tree[group].pop(leaf)
    if group in tree and not tree[group]:
        del tree[group]


class Choice(StrEnum):
    """A string to choose from, written as `NAME = "value", "what people read in the form"`."""

    _value_: str
    label: str

    def __new__(cls, value: str, label: str = "") -> "Choice":
        choice = str.__new__(cls, value)
        choice._value_ = value
        choice.label = label or value
        return choice
