"""Whatever is put into a form or into overrides, the answer is a configuration or a sentence."""

from pathlib import Path
from typing import Any

from hypothesis import example, given
from hypothesis import strategies as st

from stages.config.errors import ConfigError
from stages.config.nested import dotted
from stages.config.pipeline import PipelineConfig
from stages.config.recipes import tiny
from stages.config.resolve import resolve
from tests.fuzz.cases import cases, confined, damaged_values, outcome

_FORM = {
    "run_name": "nightly",
    "recipe": "tiny",
    "base_model": "",
    "previous_data": "",
    "alignment": "both",
    "last_stage": "report",
    "documents": ["installed-docs"],
    "instructions": ["derived"],
    "preferences": ["derived#weight=1"],
    "seed": 1,
    "promotion": "auto",
    "overrides": {"sft.optimizer.learning_rate": 0.001},
}
_PATHS = sorted(dotted(tiny().model_dump(mode="json")))


def _with_real_numbers(value: Any) -> Any:
    """The marks of `damaged_values` as Python's JSON reader would give them; it takes no more than 4,300 digits."""
    marks = {"@nan@": float("nan"), "@inf@": float("inf"), "@-inf@": -float("inf"), "@1e999@": 1e999, "@int@": 10**4000}
    match value:
        case dict():
            return {key: _with_real_numbers(child) for key, child in value.items()}
        case list():
            return [_with_real_numbers(child) for child in value]
        case str():
            return marks.get(value, value)
        case _:
            return value


def _check(values: Any, tmp_path: Path) -> None:
    if not isinstance(values, dict):
        return  # Airflow itself refuses a configuration that is no object
    with confined(tmp_path):
        config = outcome(lambda: resolve(values))
    if isinstance(config, ConfigError):
        return
    assert isinstance(config, PipelineConfig)
    text = config.model_dump_json()
    assert PipelineConfig.model_validate_json(text) == config
    assert "/" not in config.run_name
    assert config.run_name.strip(".")


@cases
@given(damaged_values(_FORM))
def test_any_form_is_a_configuration_or_a_sentence(tmp_path: Path, values: Any) -> None:
    _check(_with_real_numbers(values), tmp_path)


@cases
@given(st.sampled_from(_PATHS), damaged_values({"value": 1}))
@example("run_name", {"value": "../../evil"})
def test_any_override_is_a_configuration_or_a_sentence(tmp_path: Path, path: str, drawn: Any) -> None:
    value = _with_real_numbers(drawn.get("value") if isinstance(drawn, dict) else drawn)
    _check({"recipe": "tiny", "overrides": {path: value}}, tmp_path)


@cases
@given(damaged_values(tiny().model_dump(mode="json")))
def test_any_nested_override_is_a_configuration_or_a_sentence(tmp_path: Path, tree: Any) -> None:
    _check({"recipe": "tiny", "overrides": _with_real_numbers(tree)}, tmp_path)
