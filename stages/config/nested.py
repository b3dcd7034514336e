"""Nested settings as one flat table: `{"sft": {"seed": 1}}` and `{"sft.seed": 1}` mean the same."""

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel

from stages.config.errors import ConfigError

_DEEPEST = 32


def dotted(values: Mapping[str, Any] | BaseModel) -> dict[str, Any]:
    """Return every leaf by its dotted path, in order; a group without fields has no leaf and so no path."""
    return dict(leaves(values))


def dotted_once(values: Mapping[str, Any], what: str) -> dict[str, Any]:
    """`dotted`, for what people write: raises ConfigError when a leaf is spelled twice, of which one would win."""
    flat: dict[str, Any] = {}
    for path, value in leaves(values):
        if path in flat:
            raise ConfigError(
                f"{what}: {path!r} is given twice, as {flat[path]!r} and as {value!r}", advice="Give it once."
            )
        flat[path] = value
    return flat


def leaves(values: Mapping[str, Any] | BaseModel, prefix: str = "", *, depth: int = 1) -> Iterator[tuple[str, Any]]:
    """Yield every leaf with its dotted path; raises ConfigError for settings nested beyond any use."""
    if depth > _DEEPEST:
        raise ConfigError(
            f"settings are nested deeper than {_DEEPEST} groups, at {prefix[:80]!r}",
            advice="Write each setting by its dotted path, as in {'sft.seed': 1}.",
        )
    for name, value in values.items() if isinstance(values, Mapping) else values:
        if isinstance(value, Mapping | BaseModel):
            yield from leaves(value, f"{prefix}{name}.", depth=depth + 1)
        else:
            yield f"{prefix}{name}", value
