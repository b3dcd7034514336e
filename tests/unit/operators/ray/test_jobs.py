"""Connection, request body and the meaning of Ray's answers."""

import json

import pytest
from airflow.sdk import Connection

from operators.ray.jobs import (
    JobExistsError,
    JobInfo,
    RayEndpoint,
    RayRefusedError,
    RayUnreachableError,
    check_answer,
    submission_body,
)


def endpoint(**fields: object) -> RayEndpoint:
    extra = fields.pop("extra", None)
    connection = Connection(conn_id="ray", conn_type="ray_jobs", extra=json.dumps(extra), **fields)  # pyright: ignore[reportArgumentType]
    return RayEndpoint.from_connection(connection)


def test_a_host_alone_means_http_on_rays_port():
    assert endpoint(host="head", extra={}).base_url == "http://head:8265"


def test_a_whole_address_is_taken_as_it_is():
    assert endpoint(host="https://ray.example.org/cluster/", extra={}).base_url == "https://ray.example.org/cluster"


def test_the_password_becomes_the_bearer_token_and_is_not_shown():
    found = endpoint(host="head", password="s3cret", extra={"secret_headers": '{"X-Team": "llm-s3cret"}'})
    assert found.headers == {"Authorization": "Bearer s3cret", "X-Team": "llm-s3cret"}
    assert "s3cret" not in repr(found)


def test_headers_that_are_not_an_object_are_refused_with_the_connections_name():
    with pytest.raises(RayRefusedError, match=r"connection 'ray': extra field secret_headers is not a JSON object"):
        endpoint(host="head", extra={"secret_headers": "X-Team: llm"})


def test_headers_under_a_name_that_airflow_does_not_mask_are_refused():
    with pytest.raises(RayRefusedError, match="headers is shown to all who may read connections") as refused:
        endpoint(host="head", extra={"headers": {"X-Team": "llm"}})
    assert "secret_headers" in refused.value.advice


@pytest.mark.parametrize(
    "fields",
    [
        {"host": "https://user:pa55@ray.example.org", "extra": {}},
        {"host": "head", "extra": {"dashboard_url": "https://pa55@ray.example.org"}},
    ],
)
def test_a_password_in_an_address_is_refused_without_repeating_it(fields: dict):
    with pytest.raises(RayRefusedError, match="holds a user name or password") as refused:
        endpoint(**fields)
    assert "pa55" not in f"{refused.value} {refused.value.advice}"


def test_a_connection_without_a_host_is_refused():
    with pytest.raises(RayRefusedError, match="connection 'ray' has no host"):
        endpoint(extra={})


def test_browsers_may_know_the_dashboard_by_another_address():
    found = endpoint(host="10.0.0.1", extra={"dashboard_url": "https://ray.example.org/"})
    assert found.job_page("athanor-sft-1") == "https://ray.example.org/#/jobs/athanor-sft-1"


def test_tls_verification_can_be_switched_off_and_is_on_otherwise():
    assert endpoint(host="head", extra={"verify": False}).ssl_context() is False
    assert endpoint(host="head", extra={}).ssl_context() is True


def test_a_job_without_cpus_and_variables_asks_for_neither_a_lease_nor_a_runtime_environment():
    body = submission_body(submission_id="a", entrypoint="true", metadata={}, num_cpus=0, env_vars={})
    assert body == {"submission_id": "a", "entrypoint": "true", "metadata": {}}
    body = submission_body(submission_id="a", entrypoint="true", metadata={}, num_cpus=2, env_vars={"A": "1"})
    assert (body["entrypoint_num_cpus"], body["runtime_env"]) == (2, {"env_vars": {"A": "1"}})
    body = submission_body(submission_id="a", entrypoint="true", metadata={}, num_cpus=0, num_gpus=0.5, env_vars={})
    assert body["entrypoint_num_gpus"] == 0.5


@pytest.mark.parametrize(
    ("status", "text", "error", "says"),
    [
        (401, "Unauthorized", RayRefusedError, "token is missing or wrong"),
        (403, "Forbidden", RayRefusedError, "token is missing or wrong"),
        (500, "Traceback\nValueError: Job with submission_id a already exists.", JobExistsError, "start"),
        (400, "bad field", RayRefusedError, "HTTP 400: bad field"),
        (500, "Traceback\nRuntimeError: boom", RayUnreachableError, "HTTP 500: RuntimeError: boom"),
        (503, "", RayUnreachableError, "HTTP 503"),
        (429, "slow down", RayUnreachableError, "HTTP 429"),
    ],
)
def test_each_answer_has_one_meaning(status: int, text: str, error: type[Exception], says: str):
    with pytest.raises(error, match=says):
        check_answer(status, text, what="start")


def test_success_raises_nothing():
    check_answer(200, "already exists", what="start")


def test_a_job_is_read_with_its_reason():
    job = JobInfo.from_json(
        {"submission_id": "a", "status": "FAILED", "message": None, "error_type": "X", "driver_exit_code": 3}
    )
    assert (job.status.is_active, job.message, job.error_type, job.exit_code) == (False, "", "X", 3)
