"""Functions of others as rules: which may run, what identifies their code, and what of their values counts."""

import hashlib
import importlib
import inspect
import math
import os
from collections.abc import Callable
from typing import Any

from stages.config.errors import ConfigError
from stages.rules.failed import RuleFailedError
from stages.rules.function_process import RuleProcess

ALLOWED_MODULES = "ATHANOR_RULE_MODULES"
"""Variable of the workers' environment: modules whose functions may judge responses, with commas between them."""

LARGEST = 1e12
"""Of a rule's values: the mean of a few of 1e308 would be infinite."""


def allowed_function(address: str, *, field: str) -> Callable[..., Any]:
    """Import `module:name`; raises ConfigError, which names the field, unless the workers' administrators allow the
    module."""
    module, _, name = address.partition(":")
    allowed = os.environ.get(ALLOWED_MODULES, "").replace(",", " ").split()
    if module not in allowed:
        raise ConfigError(
            f"{field}: function={address!r} runs code, and {ALLOWED_MODULES} does not hold {module!r}; it holds "
            f"{', '.join(allowed) or 'nothing'}",
            advice=f"Let whoever runs Ray read the module and add it to {ALLOWED_MODULES} there (docs/SECURITY.md): it "
            "will run with the workers' credentials.",
        )
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"{field}: function={address!r} cannot be imported: {error}",
            advice="Install its module where Ray's processes run, and check the names.",
        ) from error
    if not callable(found):
        raise ConfigError(
            f"{field}: function={address!r} is a {type(found).__name__}",
            advice="Name a function of a response and of what it is compared with (docs/SCORERS.md).",
        )
    return found


def called_rule(address: str) -> Callable[[str, Any], float]:
    """Return what calls a function of others with a response and what it is compared with; raises RuleFailedError for a
    value that is no number, or so large that a mean of such values is none."""
    process = RuleProcess(address)

    def called(response: str, other: Any) -> float:
        value = process.call(response, other)
        if not math.isfinite(value):
            raise RuleFailedError("not_finite")
        if abs(value) > LARGEST:
            raise RuleFailedError("value_too_large")
        return value

    return called


def source_of(function: Callable[..., Any]) -> str:
    """Text of the module that a function stands in, since what it calls there counts, too; empty for compiled code."""
    try:
        return inspect.getsource(inspect.getmodule(function) or function)
    except (OSError, TypeError):
        return ""


def check_digest(function: Callable[..., Any], address: str, sha256: str, *, field: str) -> None:
    """Raise ConfigError unless the module's file has the digest that the settings name.

    The digest is a setting, so it is in the fingerprint: other code is another artifact. What the module imports is not
    covered.
    """
    try:
        with open(inspect.getsourcefile(inspect.getmodule(function) or function) or "", "rb") as file:
            found = hashlib.sha256(file.read()).hexdigest()
    except (OSError, TypeError):
        raise ConfigError(
            f"{field}: function={address!r} has no source file, by which its code could be told from other code",
            advice="Name a function of a Python module.",
        ) from None
    if found != sha256:
        raise ConfigError(
            f"{field}: the file of function={address!r} has sha256={found!r}, and the settings name {sha256!r}",
            advice="Read the file; if it is the one that you mean, give its sha256.",
        )
