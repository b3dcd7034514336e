"""Nested settings as one flat table: `{"sft": {"seed": 1}}` and `{"sft.seed": 1}` mean the same."""

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel


def dotted(values: Mapping[str, Any] | BaseModel, prefix: str = "") -> dict[str, Any]:
    """Return every leaf by its dotted path, in order; a group without fields has no leaf and so no path."""
    flat: dict[str, Any] = {}
    for name, value in values.items() if isinstance(values, Mapping) else values:
        if isinstance(value, Mapping | BaseModel):
            flat |= dotted(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat
