"""Names and addresses that people type: one type for each, used by every form, setting and record where it enters.

Only their shape is checked here; whether something of that name exists is known where it is looked up.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field

from stages.config.mlflow_limits import EXPERIMENT_NAME
from stages.config.text import CONTROLS

MODELS = "models:/"
_EXPERIMENT = re.compile(rf"[^{CONTROLS}]*[^\s{CONTROLS}][^{CONTROLS}]*")
_REGISTERED = re.compile(rf"{MODELS}(?P<name>[^/:@{CONTROLS}]+)(?:@(?P<alias>[\w-]+)|/(?P<version>\d+))")
_LONGEST_MODEL = 256  # MLflow's own limit


@dataclass(frozen=True)
class RegisteredModel:
    """What `models:/name@alias` or `models:/name/version` says; one of alias and version is empty."""

    name: str
    alias: str = ""
    version: str = ""


def parse_model_address(address: str) -> RegisteredModel:
    """Take `models:/...` apart; raises ValueError for anything else."""
    found = _REGISTERED.fullmatch(address)
    if not found or len(found["name"]) > _LONGEST_MODEL:
        raise ValueError(
            f"{address!r} names no version of a model; use {MODELS}<name>@<alias> or {MODELS}<name>/<version>"
        )
    return RegisteredModel(found["name"], found["alias"] or "", found["version"] or "")


def _safe_run_name(value: str) -> str:
    """A run's name becomes part of model names, of keys in the object store and of lines in logs."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", value):
        raise ValueError(
            f"run_name={value!r} may hold letters, digits, '.', '_' and '-' only and starts with a letter or digit"
        )
    return value


def _without_controls(value: str) -> str:
    if not _EXPERIMENT.fullmatch(value):
        raise ValueError(f"experiment={value!r} must be one line of text with no control characters")
    return value


def _stripped(value: Any) -> Any:
    return value.strip() if isinstance(value, str) else value


def _model_address(address: str) -> str:
    if address.startswith("models:"):
        parse_model_address(address)
    return address


def without_blank_lines(lines: Iterable[str]) -> list[str]:
    """A form's field of one source a line: an empty last line is easily typed, and an empty path is the job's own
    working folder."""
    return [stripped for line in lines if (stripped := line.strip())]


RunName = Annotated[str, Field(min_length=1, max_length=64), AfterValidator(_safe_run_name)]
"""A run's name, harmless wherever it is put; registered models are called `<run name>-<role>`."""

ExperimentName = Annotated[str, Field(min_length=1, max_length=EXPERIMENT_NAME), AfterValidator(_without_controls)]
"""An MLflow experiment, which may have been made by others and so may hold spaces and slashes."""

ModelAddress = Annotated[str, BeforeValidator(_stripped), AfterValidator(_model_address)]
"""A registered model, an artifact, a folder or a name of a hub; of the first the whole shape is known."""

Lines = Annotated[list[str], AfterValidator(without_blank_lines)]
"""Several lines of a form, of which blank ones do not count."""
