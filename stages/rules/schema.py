"""Whether a response is JSON of a given schema (JSON Schema, draft 2020-12, by the library `jsonschema`).

A schema comes from settings or from a prompt's row. References to other documents are refused, because following them
reads the network, and so is `patternProperties`; patterns are searched with a time limit.
"""

import json
import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

from stages.rules.compare import PATTERN_SECONDS
from stages.rules.failed import RuleFailedError

_BLOCK = re.compile(r"```[ \t]*(?:json)?[ \t]*\n(.*?)\n?```", re.DOTALL | re.IGNORECASE)
_REFERENCES = ("$ref", "$dynamicRef", "$recursiveRef")
_REFUSED = ("patternProperties", "$id", "$schema", "$vocabulary")
_DEEPEST = 64


def json_in(response: str, *, fenced: bool) -> Any:
    """The value that a response is. With `fenced` a fenced block, if there is one, counts in its place, the last of
    several. Raises ValueError for anything else, NaN and repeated keys among it."""
    text = response.strip()
    if fenced and (blocks := _BLOCK.findall(text)):
        text = blocks[-1].strip()
    try:
        return json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_without_repeats)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key is repeated")
    return found


def schema_value(response: str, schema: str, *, fenced: bool, parsed_value: float) -> float:
    """1 for JSON that the schema allows, `parsed_value` for other JSON, 0 for what is no JSON."""
    try:
        value = json_in(response, fenced=fenced)
    except ValueError:
        return 0.0
    return 1.0 if _allows(schema, value) else parsed_value


def _allows(schema: str, value: Any) -> bool:
    from jsonschema.exceptions import ValidationError
    from referencing.exceptions import Unresolvable

    try:
        return _validator(schema).is_valid(value)
    except (ValidationError, Unresolvable, RecursionError):
        raise RuleFailedError("schema_is_invalid") from None


def problem_of(schema: str) -> str:
    """Say what is wrong with the text of a schema; empty when nothing is."""
    from jsonschema import Draft202012Validator
    from jsonschema.exceptions import SchemaError

    try:
        read = json.loads(schema)
    except (ValueError, RecursionError) as error:
        return f"it is no JSON: {error}"
    if not isinstance(read, Mapping):
        return "it is no JSON object"
    try:
        for name, value in _keywords(read):
            if name in _REFUSED:
                return f"{name!r} is not supported"
            if name in _REFERENCES and not str(value).startswith("#"):
                return f"{name}={value!r} leads to another document, and only references that begin with # are followed"
        Draft202012Validator.check_schema(read)
    except SchemaError as error:
        return error.message
    except (RecursionError, re.error) as error:
        return f"it cannot be read: {error}"
    return ""


def _keywords(schema: Any, depth: int = 0) -> Iterator[tuple[str, Any]]:
    """Every key with its value. Names of properties and literal values are among them: a schema that has a property
    `$id` is refused, too."""
    if depth > _DEEPEST:
        raise RecursionError(f"deeper than {_DEEPEST} levels")
    if isinstance(schema, Mapping):
        for name, value in schema.items():
            yield name, value
            yield from _keywords(value, depth + 1)
    elif isinstance(schema, list):
        for value in schema:
            yield from _keywords(value, depth + 1)


@lru_cache(maxsize=4096)
def _validator(schema: str) -> Any:
    from jsonschema import Draft202012Validator
    from jsonschema.validators import extend
    from referencing import Registry

    if problem_of(schema):
        raise RuleFailedError("schema_is_invalid")
    known = extend(Draft202012Validator, {"pattern": _pattern})
    return known(json.loads(schema), registry=Registry())


def _pattern(validator: Any, pattern: str, instance: Any, schema: Any) -> Iterator[Any]:
    import regex
    from jsonschema.exceptions import ValidationError

    if not isinstance(instance, str):
        return
    try:
        found = regex.search(pattern, instance, timeout=PATTERN_SECONDS)
    except TimeoutError:
        raise RuleFailedError("pattern_takes_too_long") from None
    except regex.error:
        raise RuleFailedError("pattern_is_invalid") from None
    if not found:
        yield ValidationError(f"{instance!r} does not match {pattern!r}")
