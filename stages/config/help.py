"""The string under a field of a config class, which is the field's only documentation.

It is read from the source when a form or a page shows it. Pydantic could attach it to every field when a class is made,
but then each start of a stage and each reading of a DAG file would pay for it: 0.1 s of CPU.
"""

import ast
import sys
from functools import cache
from inspect import cleandoc
from itertools import pairwise
from pathlib import Path

from stages.config.base import Config


def field_help(model: type[Config]) -> dict[str, str]:
    """Return the documentation of each field, inherited ones included; empty for a field without any."""
    texts: dict[str, str] = {}
    for owner in reversed(model.__mro__):
        if issubclass(owner, Config):
            texts |= _documented(owner.__module__).get(owner.__qualname__, {})
    return {name: texts.get(name, "") for name in model.model_fields}


@cache
def _documented(module: str) -> dict[str, dict[str, str]]:
    """Class -> field -> the string below it."""
    source = Path(sys.modules[module].__file__ or "").read_text(encoding="utf-8")
    classes = [node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)]
    return {node.name: _below_fields(node.body) for node in classes}


def _below_fields(body: list[ast.stmt]) -> dict[str, str]:
    return {
        field.target.id: cleandoc(below.value.value)
        for field, below in pairwise(body)
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
        if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant) and isinstance(below.value.value, str)
    }
