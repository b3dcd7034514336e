"""Addresses of Ray as people write them: IPv6, a port in the host, a path behind a proxy; nonsense gets a sentence."""

import asyncio
import json
import socket
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from airflow.sdk import Connection

from operators.mlflow import MlflowServer, MlflowUnavailableError
from operators.notify import report_late
from operators.ray.client import RayJobClient
from operators.ray.hook import RayJobHook
from operators.ray.jobs import JobInfo, RayEndpoint, RayRefusedError, read_answer
from tests.places import SHARED


def endpoint(*, extra: dict[str, Any] | None = None, **fields: Any) -> RayEndpoint:
    connection = Connection(conn_id="ray", conn_type="ray_jobs", extra=json.dumps(extra or {}), **fields)
    return RayEndpoint.from_connection(connection)


@pytest.mark.parametrize(
    ("fields", "address"),
    [
        ({"host": "fd00::10"}, "http://[fd00::10]:8265"),
        ({"host": "[fd00::10]"}, "http://[fd00::10]:8265"),
        ({"host": "[fd00::10]:9000"}, "http://[fd00::10]:9000"),
        ({"host": "fd00::10", "port": 443, "schema": "https"}, "https://[fd00::10]:443"),
        ({"host": "::1"}, "http://[::1]:8265"),
        ({"host": "http://[fd00::10]:8265/"}, "http://[fd00::10]:8265"),
        ({"host": "head:9000"}, "http://head:9000"),
        ({"host": "head:9000", "port": 9000}, "http://head:9000"),
        ({"host": "head/ray"}, "http://head:8265/ray"),
        ({"host": "head/ray/", "port": 80}, "http://head:80/ray"),
        ({"host": "head:9000/a/b"}, "http://head:9000/a/b"),
        ({"host": " head "}, "http://head:8265"),
        ({"host": "10.0.0.1"}, "http://10.0.0.1:8265"),
        ({"host": "ray_head.svc"}, "http://ray_head.svc:8265"),
        ({"host": "head", "schema": "HTTPS"}, "https://head:8265"),
        ({"host": "https://ray.example.org/cluster/"}, "https://ray.example.org/cluster"),
        ({"host": "https://ray.example.org", "port": 8265}, "https://ray.example.org"),
        ({"host": "HTTPS://ray.example.org:8443", "port": 8443}, "https://ray.example.org:8443"),
        ({"host": "https://gate.example.org/team%20a/ray"}, "https://gate.example.org/team%20a/ray"),
        ({"host": "FD00:0::0010"}, "http://[fd00::10]:8265"),
    ],
)
def test_an_address_means_what_people_mean_by_it(fields: dict[str, Any], address: str) -> None:
    assert endpoint(**fields).base_url == address


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"host": "head:9000", "port": 8265}, "port=9000 in the host and port=8265"),
        ({"host": "http://head:9000", "port": 8265}, "port=9000 in the host and port=8265"),
        ({"host": "[fd00::10]:1", "port": 2}, "port=1 in the host and port=2"),
        ({"host": "head:0"}, "port"),
        ({"host": "head:70000"}, "port"),
        ({"host": "head:port"}, "port"),
        ({"host": "head", "port": 70000}, "port=70000"),
        ({"host": "fd00::10::1"}, "fd00::10::1"),
        ({"host": "[fd00::10"}, "fd00::10"),
        ({"host": "[head]"}, "head"),
        ({"host": "a b"}, "a b"),
        ({"host": "head\nx"}, "is not an address"),
        ({"host": "/ray"}, "is not an address"),
        ({"host": "http:///ray"}, "is not an address"),
        ({"host": "head?x=1"}, "is not an address"),
        ({"host": "head#x"}, "is not an address"),
        ({"host": "head/../x"}, "is not an address"),
        ({"host": "head%2f"}, "is not an address"),
        ({"host": "head/a/%2E%2e"}, "is not an address"),
        ({"host": "head/a b"}, "is not an address"),
        ({"host": "head:"}, "port ''"),
        ({"host": "8265"}, "is not an address"),
        ({"host": "10.0.0.256"}, "is not an address"),
        ({"host": "http://fd00::10"}, "is not an address"),
        ({"host": "fd00::10/ray"}, "is not an address"),
        ({"host": "fe80::1%eth0"}, "zone"),
        ({"host": "ftp://head"}, "scheme 'ftp'"),
        ({"host": "ray://head:10001"}, "scheme 'ray'"),
        ({"host": "head", "schema": "ray"}, "scheme 'ray'"),
        ({"host": "head", "extra": {"dashboard_url": "javascript:alert(1)"}}, "dashboard_url"),
        ({"host": "head", "extra": {"dashboard_url": "ray.example.org"}}, "dashboard_url"),
        ({"host": "head", "extra": {"timeout_seconds": "soon"}}, "timeout_seconds='soon'"),
        ({"host": "head", "extra": {"timeout_seconds": -1}}, "timeout_seconds=-1"),
        ({"host": "head", "extra": {"timeout_seconds": "nan"}}, "timeout_seconds='nan'"),
    ],
)
def test_nonsense_is_refused_with_the_connections_name(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(RayRefusedError, match="connection 'ray'") as refused:
        endpoint(**fields)
    assert says in str(refused.value)
    assert refused.value.advice


@pytest.mark.parametrize("host", ["me:pa55@head", "me:pa55@[fd00::10]", "http://me:pa55@head"])
def test_a_login_in_any_spelling_is_refused_without_repeating_it(host: str) -> None:
    with pytest.raises(RayRefusedError, match="holds a user name or password") as refused:
        endpoint(host=host)
    assert "pa55" not in f"{refused.value} {refused.value.advice}"


@pytest.mark.parametrize("secret", ["pa55\n", "pa55\r\nX-Evil: 1", "pä55\u2028"])
def test_a_secret_that_no_header_can_hold_is_refused_without_repeating_it(secret: str) -> None:
    places: list[dict[str, Any]] = [{"password": secret}, {"extra": {"secret_headers": json.dumps({"X-Team": secret})}}]
    for fields in places:
        with pytest.raises(RayRefusedError) as refused:
            endpoint(host="head", **fields)
        assert "55" not in f"{refused.value} {refused.value.advice}"


def test_what_follows_a_question_mark_may_be_a_token_and_is_not_repeated() -> None:
    dashboard = {"dashboard_url": "http://h/?k=s3cret"}
    places: list[dict[str, Any]] = [{"host": "head/?token=s3cret"}, {"host": "head", "extra": dashboard}]
    for fields in places:
        with pytest.raises(RayRefusedError) as refused:
            endpoint(**fields)
        assert "s3cret" not in f"{refused.value} {refused.value.advice}"


def test_the_dashboards_address_may_be_copied_from_one_of_its_pages() -> None:
    found = endpoint(host="head", extra={"dashboard_url": "https://ray.example.org/team/#/overview"})
    assert found.job_page("a") == "https://ray.example.org/team/#/jobs/a"


def button(monkeypatch: pytest.MonkeyPatch, **fields: Any) -> tuple[bool, str]:
    monkeypatch.setenv("AIRFLOW_CONN_RAY_TEST", json.dumps({"conn_type": "ray_jobs", **fields}))
    return RayJobHook("ray_test").test_connection()


def test_the_test_button_answers_in_a_sentence_whatever_was_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    for fields in ({"host": "a b"}, {"host": "head:9000", "port": 1}, {"host": "fd00::10::1"}, {"password": "x\n"}, {}):
        worked, words = button(monkeypatch, **fields)
        assert not worked
        assert "connection 'ray_test'" in words
    assert button(monkeypatch, host="head", extra={"ca_path": "/no/such.pem"}, schema="https") == (
        False,
        "connection 'ray_test': extra field ca_path='/no/such.pem' cannot be read: No such file or directory. "
        "Give a PEM file with certificates that exists on the machines of Airflow.",
    )


class SixServer(ThreadingHTTPServer):
    address_family = socket.AF_INET6


@pytest.fixture
def loopback_six() -> Iterator[tuple[SixServer, list[str]]]:
    """Ray behind a path on an IPv6 address; the last segment of what it is asked decides the answer."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if self.path.startswith("/login"):
                self.send_response(302)
                self.send_header("Location", "/html")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            body = b"<html>" if self.path.startswith("/html") else b'{"ray_version": "2.9"}'
            if self.path.endswith("/api/jobs/"):
                body = b"[]"
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_GET

        def log_message(self, format: str, *args: object) -> None: ...

    try:
        server = SixServer(("::1", 0), Handler)
    except OSError:
        pytest.skip("this machine has no IPv6")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server, asked
    server.shutdown()
    server.server_close()


def test_a_uri_that_airflow_cannot_read_is_told_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AIRFLOW_CONN_RAY_TEST", "ray-jobs://:t0ken@fd00::10:8265")
    worked, words = RayJobHook("ray_test").test_connection()
    assert (worked, "AIRFLOW_CONN_RAY_TEST" in words, "t0ken" in words) == (False, True, False)
    monkeypatch.setenv("AIRFLOW_CONN_RAY_TEST", "ray-jobs://:t0ken@[fd00::10]:8265/https")
    assert RayJobHook("ray_test").endpoint.base_url == "https://[fd00::10]:8265"


def test_a_proxy_exception_that_is_none_is_refused_and_not_retried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("NO_PROXY", "[::1]")
    worked, words = button(monkeypatch, host="head")
    assert (worked, "NO_PROXY" in words) == (False, True)


def test_the_test_button_reaches_a_head_on_ipv6_behind_a_path(
    monkeypatch: pytest.MonkeyPatch, loopback_six: tuple[SixServer, list[str]]
) -> None:
    server, asked = loopback_six
    port = server.server_address[1]
    worked, words = button(monkeypatch, host="::1/cluster", port=port)
    assert not worked, "a path cannot follow an IPv6 address without brackets"
    worked, words = button(monkeypatch, host="[::1]/cluster", port=port)
    assert (worked, words) == (True, f"Ray 2.9 at http://[::1]:{port}/cluster, 0 jobs known")
    assert asked == ["/cluster/api/version", "/cluster/api/jobs/"]
    worked, words = button(monkeypatch, host=f"http://[::1]:{port}/html")
    assert not worked
    assert "not JSON" in words


def test_what_is_not_ray_is_refused_and_not_retried(
    monkeypatch: pytest.MonkeyPatch, loopback_six: tuple[SixServer, list[str]]
) -> None:
    server, _ = loopback_six
    for path, says in (("html", "is not JSON as Ray sends it"), ("login", "HTTP 302")):
        connection = {"conn_type": "ray_jobs", "host": f"[::1]:{server.server_address[1]}/{path}"}
        monkeypatch.setenv("AIRFLOW_CONN_RAY_TEST", json.dumps(connection))
        calls: list[Callable[[RayJobHook], object]] = [
            lambda hook: hook.submit_job(submission_id="a", entrypoint="true"),
            lambda hook: hook.get_job("a"),
            lambda hook: hook.stop_job("a"),
            lambda hook: hook.get_logs("a"),
        ]
        for call in calls:
            with RayJobHook("ray_test") as hook, pytest.raises(RayRefusedError, match=says):
                call(hook)


async def _ask_as_the_triggerer_does(there: RayEndpoint) -> None:
    async with RayJobClient(there) as client:
        for call in (client.get_job, client.stop_job, client.get_logs):
            with pytest.raises(RayRefusedError, match="is not JSON as Ray sends it"):
                await call("a")


def test_the_triggerer_reaches_an_ipv6_address_behind_a_path_too(loopback_six: tuple[SixServer, list[str]]) -> None:
    server, asked = loopback_six
    asyncio.run(_ask_as_the_triggerer_does(endpoint(host=f"[::1]:{server.server_address[1]}/html/b")))
    assert asked == ["/html/b/api/jobs/a", "/html/b/api/jobs/a/stop", "/html/b/api/jobs/a/logs"]


@pytest.mark.parametrize(
    "data",
    [[], None, {}, {"status": "NEW"}, {"status": "FAILED", "metadata": [1]}, {"status": "RUNNING", "start_time": "x"}],
)
def test_a_job_of_another_form_is_refused_as_an_answer(data: object) -> None:
    with pytest.raises(RayRefusedError, match="not JSON as Ray sends it"):
        read_answer(json.dumps(data), JobInfo.from_json, what="show job a")


def test_the_host_from_the_field_works() -> None:
    path = SHARED / "cases" / "world" / "13_addresses.json"
    if not path.exists():
        pytest.skip("needs the cases that lie next to the repository")
    for host in json.loads(path.read_text())["ray_connection_host"]:
        assert endpoint(host=host).base_url == f"http://[{host}]:8265"


@pytest.mark.parametrize("address", ["http://fd00::10:5000", "http://a b", "http://host:port", "http://"])
def test_an_address_of_mlflow_that_is_none_is_told_as_what_it_is(address: str) -> None:
    with pytest.raises(MlflowUnavailableError, match="MLFLOW_TRACKING_URI"), MlflowServer(address) as server:
        server.model_version("x", alias="y")


def test_an_address_of_the_webhook_that_is_none_is_told_without_showing_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for address in ("hooks.example.org/s3cret", "http://fd00::10:80/s3cret", "ftp://x/s3cret"):
        caplog.clear()
        monkeypatch.setenv("ATHANOR_NOTIFY_URL", address)
        report_late(hours=2)
        (line,) = [record.getMessage() for record in caplog.records if record.name == "operators.notify"]
        assert line == "No notice of late: the webhook's address is not an http:// or https:// address"
        assert "s3cret" not in line
