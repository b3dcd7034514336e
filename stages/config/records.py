"""Reading of JSON that lies where others can write: what is malformed is a DataError with the file's name.

Python's parser raises more than its own error: RecursionError for deep nesting, ValueError for integers of thousands of
digits, UnicodeDecodeError. None of these is worth a retry, and all of them would be one.
"""

import json
import math
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from pydantic import ValidationError

from stages.config.base import Config
from stages.config.errors import DataError
from stages.config.text import one_line

Record = TypeVar("Record", bound=Config)
_LONGEST = 500
_ADVICE = "Something else wrote it, or it was damaged. Delete it, or bring it back from a backup."


def parse_json(data: bytes | str, name: str, *, advice: str = _ADVICE) -> Any:
    """Parse any JSON value; `name` says in the DataError where it lies."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{name} is not JSON: {_in_words(error)}", advice=advice) from None


def parse_object(data: bytes | str, name: str) -> dict[str, Any]:
    """Parse a JSON object, which is what all our records are."""
    found = parse_json(data, name)
    if not isinstance(found, dict):
        raise DataError(f"{name} holds a JSON {type(found).__name__}, not an object", advice=_ADVICE)
    return found


def parse_record(kind: type[Record], data: bytes | str, name: str, *, advice: str = _ADVICE) -> Record:
    """Parse and validate one of our records; the DataError names the first wrong field."""
    try:
        return kind.model_validate_json(data)
    except ValidationError as error:
        raise DataError(f"{name} is not a valid {kind.__name__}: {first_error(error)}", advice=advice) from None


def first_error(error: ValidationError, among: Callable[[Mapping[str, Any]], bool] = lambda problem: True) -> str:
    """Name the first wrong field and what is wrong with it; empty when no error is `among` those asked for."""
    for problem in filter(among, error.errors(include_url=False)):
        parts = (".".join(map(str, problem["loc"])), problem["msg"])
        return one_line(": ".join(filter(None, parts)), at_most=_LONGEST)
    return ""


def without_non_finite(value: Any, path: str = "") -> tuple[Any, dict[str, str]]:
    """Return JSON with null for NaN and infinities, which JSON does not have, and what stood where."""
    if isinstance(value, float) and not math.isfinite(value):
        return None, {path: str(value)}
    if isinstance(value, Mapping):
        inner = {key: without_non_finite(item, f"{path}.{key}" if path else str(key)) for key, item in value.items()}
        return {key: item for key, (item, _) in inner.items()}, _joined(found for _, found in inner.values())
    if isinstance(value, list | tuple):
        items = [without_non_finite(item, f"{path}.{number}") for number, item in enumerate(value)]
        return [item for item, _ in items], _joined(found for _, found in items)
    return value, {}


def _joined(parts: Any) -> dict[str, str]:
    return {path: was for part in parts for path, was in part.items()}


def _in_words(error: Exception) -> str:
    match error:
        case RecursionError():
            return "it is nested too deep"
        case UnicodeDecodeError():
            return f"it is not UTF-8 (byte {error.start})"
        case json.JSONDecodeError():
            return f"{error.msg} in line {error.lineno}, column {error.colno}"
        case _:
            return "an integer has too many digits" if "digits" in str(error) else str(error)
