"""The registry when MLflow fails; tests/integration/test_mlflow.py and test_promote.py have working ones."""

import pytest
from mlflow.exceptions import MlflowException

from stages.config.errors import Category, StageError
from stages.tracking.registry import outage_is_infrastructure


def test_an_error_of_mlflow_is_retried_and_shows_no_password() -> None:
    with pytest.raises(StageError, match="models were not registered in MLflow") as caught, outage_is_infrastructure():
        raise MlflowException("http://ada:secret@mlflow:5000 does not answer")
    assert caught.value.category is Category.INFRASTRUCTURE
    assert "secret" not in caught.value.message


def test_an_error_of_ours_keeps_its_own_words() -> None:
    with pytest.raises(KeyError), outage_is_infrastructure():
        raise KeyError("role")
