"""What an error of MLflow means, and what MLflow's limits do to values; test_mlflow_hostile.py meets a real server."""

import json

import pytest
import requests
from mlflow.exceptions import MlflowException, RestException

from stages.artifacts.addresses import open_store
from stages.artifacts.s3_client import StoreError
from stages.config import mlflow_limits as limits
from stages.config.errors import Category, ConfigError, DataError, StageError
from stages.tracking.events import FileEvent, MetricsEvent, StartEvent, from_line, to_line
from stages.tracking.spool import Refused, set_aside
from stages.tracking.trouble import Trouble, as_stage_error, explain, is_unreachable, trouble_of


def failed(code: str, text: str = "x") -> MlflowException:
    return RestException({"error_code": code, "message": text})


DELETED_RUN = "The run 0a1b must be in the 'active' state. Current state is deleted."
DELETED_EXPERIMENT = "The experiment 7 must be in the 'active' state. Current state is deleted."


@pytest.mark.parametrize(
    ("error", "trouble", "says"),
    [
        (failed("INTERNAL_ERROR"), Trouble.OUTAGE, "x"),
        (failed("TEMPORARILY_UNAVAILABLE"), Trouble.OUTAGE, "x"),
        (failed("INVALID_PARAMETER_VALUE"), Trouble.REFUSAL, "x"),
        (failed("INVALID_PARAMETER_VALUE", DELETED_RUN), Trouble.LASTING, "mlflow runs restore --run-id 0a1b"),
        (failed("INVALID_PARAMETER_VALUE", DELETED_EXPERIMENT), Trouble.LASTING, "restore --experiment-id 7"),
        (failed("RESOURCE_DOES_NOT_EXIST", "Run with id=0a1b not found"), Trouble.LASTING, "removed for good"),
        (failed("PERMISSION_DENIED"), Trouble.LASTING, "permission EDIT"),
        (failed("PERMISSION_DENIED", "Invalid Host header"), Trouble.LASTING, "MLFLOW_HOSTS"),
        (failed("UNAUTHENTICATED"), Trouble.LASTING, "MLFLOW_TRACKING_PASSWORD"),
        (failed("ENDPOINT_NOT_FOUND"), Trouble.LASTING, "not an MLflow server"),
        (ConfigError("x"), Trouble.LASTING, "x"),
        (StoreError("no answer of the store"), Trouble.OUTAGE, "no answer of the store"),
        (StoreError("no access", category=Category.CONFIG), Trouble.LASTING, "no access"),
    ],
)
def test_an_error_is_told_as_what_it_is(
    error: MlflowException | StageError, trouble: Trouble, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow:5000")
    assert trouble_of(error) is trouble
    assert says in explain(error)
    assert "does not answer" not in explain(error)
    wanted = Category.INFRASTRUCTURE if trouble is Trouble.OUTAGE else Category.CONFIG
    assert as_stage_error(error, "models were not registered").category is wanted


def caused_by(cause: Exception) -> MlflowException:
    try:
        raise MlflowException("API request failed") from cause
    except MlflowException as error:
        return error


def test_a_certificate_is_told_apart_from_a_server_that_is_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://ada:secret@mlflow")
    assert "REQUESTS_CA_BUNDLE" in explain(caused_by(requests.exceptions.SSLError("bad")))
    assert explain(caused_by(requests.exceptions.ConnectionError("no"))).endswith("does not answer (ConnectionError)")
    assert "secret" not in explain(caused_by(requests.exceptions.ConnectionError("no")))
    assert "Permission denied" in explain(PermissionError(13, "Permission denied"))
    assert is_unreachable(requests.exceptions.ConnectionError("no"))
    assert not is_unreachable(PermissionError(13, "Permission denied"))


def answered(status: int) -> requests.HTTPError:
    response = requests.Response()
    response.status_code = status
    return requests.HTTPError(f"{status} for url", response=response)


def test_an_answer_of_the_storage_of_files_is_told_apart_from_mlflow_that_is_away(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow:5000")
    internal = MlflowException("API request failed with exception (Caused by 'too many 500 error responses')")
    assert not is_unreachable(internal)
    assert trouble_of(internal) is Trouble.OUTAGE
    assert "HTTP 500" in explain(caused_by(requests.exceptions.RetryError("too many 500 error responses")))
    assert is_unreachable(MlflowException("failed with exception (too many 503 error responses)"))
    assert [is_unreachable(answered(status)) for status in (403, 413, 502, 503, 507)] == [
        False,
        False,
        True,
        True,
        False,
    ]
    wanted = [Trouble.REFUSAL, Trouble.OUTAGE, Trouble.REFUSAL, Trouble.OUTAGE]
    assert [trouble_of(answered(status)) for status in (400, 403, 413, 507)] == wanted


def test_a_long_value_is_cut_with_a_mark_and_a_short_one_stays() -> None:
    assert limits.shortened("short", 500) == "short"
    cut = limits.shortened("é" * 534, 500)
    assert len(cut) == 500
    assert cut.startswith("ééé")
    assert "cut: 534 characters, sha256 " in cut
    assert limits.shortened("a\0b\ud800", 500) == "a\ufffdb?"


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("train/loss", "train/loss"),
        ("reward/accuracy_odd?kind", "reward/accuracy_odd-kind"),
        ("a//b", "a/-/b"),
        ("../up", "-/up"),
        ("/a", "-/a"),
        ("a/.", "a/-"),
    ],
)
def test_a_key_is_one_that_mlflow_takes(name: str, key: str) -> None:
    assert limits.key(name) == key


def test_long_keys_are_cut_and_stay_different() -> None:
    one, other = limits.key("k" * 300 + "1"), limits.key("k" * 300 + "2")
    assert len(one) == len(other) == 250
    assert one != other


@pytest.mark.parametrize(
    "line",
    [
        '{"type":"file","path":"/proc/self/environ","name":"e.txt","parent":false}',
        '{"type":"file","attachment":"../../x","name":"e.txt"}',
        '{"type":"file","attachment":"/etc/passwd","name":"e.txt"}',
        '{"type":"file","attachment":"a","content":"aGVsbG8=","name":"e.txt"}',
        '{"type":"file","name":"e.txt"}',
        '{"type":"file","content":"no base64!","name":"e.txt"}',
        '{"type":"file","content":"aGVsbG8=","name":"../e.txt"}',
        '{"type":"file","content":"aGVsbG8=","name":"/e.txt"}',
        '{"type":"file","content":"aGVsbG8=","name":"a\\\\b.txt"}',
        '{"type":"file","content":"aGVsbG8=","name":"MLmodel"}',
        '{"type":"start","fingerprint":"../x","params":{},"tags":{},"time":1}',
        '{"type":"start","fingerprint":"f","params":{},"tags":{"mlflow.parentRunId":"x"},"time":1}',
        '{"type":"start","fingerprint":"f","params":{},"tags":{"athanor.run_id":"x"},"time":1}',
        '{"type":"start","fingerprint":"f","params":{},"tags":{"lineage.fingerprint":"x"},"time":1}',
        '{"type":"start","fingerprint":"f","run_id":"x","time":1}',
        '{"type":"metrics","step":1e30,"values":{},"time":1}',
        '{"type":"metrics","step":1,"values":{"a":[]},"time":1}',
        '{"type":"metrics","step":1,"values":{},"time":-1}',
        '{"type":"finish","manifest":{},"history":"","time":1}',
        '{"type":"other"}',
        "{}",
        "[]",
        "",
        "null",
        "\0",
        "[" * 100_000,
        '{"type":"metrics","step":' + "9" * 5000 + "}",
    ],
)
def test_a_line_that_is_no_record_of_ours_is_refused_in_a_sentence(line: str) -> None:
    with pytest.raises(DataError) as caught:
        from_line(line.encode())
    assert 0 < len(caught.value.message) < 400


def test_lines_of_earlier_versions_are_read() -> None:
    start = '{"type": "start", "fingerprint": "f", "params": {"a": "1"}, "tags": {"git.commit": "c"}, "time": 5}'
    assert from_line(start.encode()) == StartEvent(fingerprint="f", params={"a": "1"}, tags={"git.commit": "c"}, time=5)
    file = '{"type": "file", "name": "lineage/run.svg", "parent": true, "content": "aGVsbG8="}'
    assert from_line(file.encode()) == FileEvent(name="lineage/run.svg", parent=True, content="aGVsbG8=")
    measured = '{"type": "metrics", "step": 3, "values": {"a": Infinity}, "time": 5}'
    assert from_line(measured.encode()) == MetricsEvent(step=3, values={"a": float("inf")}, time=5)


def test_what_a_stage_writes_is_json_and_reads_back() -> None:
    line = to_line(MetricsEvent(step=1, values={"half \ud800": float("inf"), "ü": -0.5}, time=1))
    json.loads(line, parse_constant=lambda token: pytest.fail(f"{token} is not JSON"))
    found = from_line(line)
    assert isinstance(found, MetricsEvent)
    assert list(found.values.values()) == [float("inf"), -0.5]
    assert found.values["ü"] == -0.5


def test_what_is_set_aside_adds_up_and_nothing_costs_no_request(tmp_path) -> None:
    store = open_store(tmp_path.as_uri())
    key = "runs/r/sft/mlflow-spool.jsonl"
    set_aside(store, key, [])
    assert not store.exists("runs/r/sft/mlflow-spool.refused.jsonl")
    set_aside(store, key, [Refused("one", "why")])
    set_aside(store, key, [Refused("two", "because")])
    kept = [json.loads(line) for line in store.read_bytes("runs/r/sft/mlflow-spool.refused.jsonl").splitlines()]
    assert kept == [{"reason": "why", "what": "one"}, {"reason": "because", "what": "two"}]
