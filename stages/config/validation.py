"""Validation whose errors name field, value, what is allowed and what to do."""

import difflib
import json
import re
from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from stages.config.errors import ConfigError
from stages.config.nested import leaves
from stages.config.text import HALVES, one_line

Model = TypeVar("Model", bound=BaseModel)
_HALF = re.compile(f"[{HALVES}]")
_LONGEST_NAME = 200


def validated(model: type[Model], data: Mapping[str, Any]) -> Model:
    """Validate and turn pydantic's report into one sentence a field."""
    advice = "Correct the named fields and trigger the run again."
    try:
        found = model.model_validate(data)
    except ValidationError as error:
        raise ConfigError(_explain(error, model), advice=advice) from None
    if wrong := next(
        (path for path, value in leaves(found) if _HALF.search(json.dumps(value, ensure_ascii=False, default=str))), ""
    ):
        raise ConfigError(f"{wrong}: it holds half a character (a surrogate), which no file can hold", advice=advice)
    return found


def did_you_mean(word: str, known: Mapping[str, Any] | list[str]) -> str:
    names = list(known)
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    if not close and "." not in word:
        leaves = {name.rsplit(".", 1)[-1]: name for name in names}
        close = [leaves[leaf] for leaf in difflib.get_close_matches(word, list(leaves), n=1, cutoff=0.6)]
    return f"Did you mean {close[0]!r}?" if close else ""


def _explain(error: ValidationError, model: type[BaseModel]) -> str:
    sentences = []
    for problem in error.errors():
        field = one_line(".".join(str(part) for part in problem["loc"]), at_most=_LONGEST_NAME) or model.__name__
        if problem["type"] == "extra_forbidden":
            hint = did_you_mean(str(problem["loc"][-1]), list(model.model_fields)) if len(problem["loc"]) == 1 else ""
            sentences.append(f"{field}: unknown field. {hint}".strip())
        elif problem["type"] == "value_error":
            sentences.append(f"{field}: {problem['msg'].removeprefix('Value error, ')}")
        else:
            sentences.append(f"{field}={problem['input']!r}: {problem['msg']}")
    return "; ".join(sentences)
