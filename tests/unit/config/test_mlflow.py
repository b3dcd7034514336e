"""Where MLflow is and how to log in to it."""

import pytest

from stages.config.mlflow import authorization, tracking_server


@pytest.mark.parametrize(
    ("address", "server"),
    [
        ("http://mlflow:5000", "http://mlflow:5000"),
        ("https://ada:pw@mlflow", "https://ada:pw@mlflow"),
        ("sqlite:///mlflow.db", ""),
        ("httpfolder", ""),
        ("", ""),
    ],
)
def test_only_an_http_address_is_a_server(address: str, server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    assert tracking_server() == server


def test_a_user_name_wins_over_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    assert authorization() == ""
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "t")
    assert authorization() == "Bearer t"
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "Aladdin")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "open sesame")
    assert authorization() == "Basic QWxhZGRpbjpvcGVuIHNlc2FtZQ=="  # the example of RFC 7617
