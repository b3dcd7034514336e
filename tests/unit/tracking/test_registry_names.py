"""Names in the evaluation of others, on their way to MLflow's registry."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from stages.config.errors import ConfigError
from stages.config.evaluation import Evaluation
from stages.config.graph import Stage
from stages.tracking.client import artifact_uri_of_model
from stages.tracking.registry import Registered, Registry
from tests.pipeline_records import EVALUATION, publish_run


def test_metrics_of_an_evaluation_get_names_that_mlflow_takes(tmp_path: Path) -> None:
    _, made = publish_run(tmp_path)
    measured = {**EVALUATION, "models": {"dpo": {"eval/win_rate": 0.6, "": 0.1, "<b>": 0.2, "a//b": 0.3}}}
    logged: list[Any] = []
    registry = Registry.__new__(Registry)
    registry._client = SimpleNamespace(  # pyright: ignore[reportAttributeAccessIssue]
        log_inputs=lambda run_id, datasets: None, log_batch=lambda run_id, metrics: logged.extend(metrics)
    )
    registry.log_evaluation(
        [Registered("dpo", "demo-aligned", "1", "m-1", "f" * 64, is_new=True)],
        Evaluation.from_report(measured, settings_digest=""),
        measured=made[Stage.EVALUATE],
        run_id="run",
    )
    assert {metric.key: metric.value for metric in logged} == {
        "eval/win_rate": 0.6,
        "-": 0.1,
        "-b-": 0.2,
        "a/-/b": 0.3,
    }


@pytest.mark.parametrize("address", ["models:/", "models:/a", "models:/a@", "models:/a@b@c", "models:/a/b/c", "a@b"])
def test_an_address_that_names_no_version_is_refused_before_mlflow_is_asked(address: str) -> None:
    with pytest.raises(ConfigError, match="names no version of a model"):
        artifact_uri_of_model(address)
