"""The doctor, on stores and servers that are well and on such that are deliberately broken."""

import http.server
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from email.utils import formatdate
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

from infra.doctor import doctor, findings
from infra.ports import any_free
from infra.store_probe import ROUNDS, Finding, Verdict, examine
from stages.artifacts.folder import FileStore
from stages.config.seals import SEAL_KEY, name_of_key
from tests.answering import answering
from tests.conftest import enter
from tests.s3 import S3Server
from tests.unit.config.test_seals import FIRST, SECOND
from tests.unit.infra.test_deploy_probe import serving

HEALTHY = {
    name: {"status": "healthy", f"latest_{name}_heartbeat": "2026-01-01T00:00:00Z"}
    for name in ("metadatabase", "scheduler", "dag_processor", "triggerer")
}
ALIVE = {"data": {"result": {"result": [{"state": "ALIVE", "resources_total": {"CPU": 4.0, "GPU": 1.0}}]}}}
SEARCH = "/api/2.0/mlflow/experiments/search?max_results=1"


def told(found: list[Finding], verdict: Verdict) -> list[str]:
    return [f"{finding.subject}: {finding.what}" for finding in found if finding.verdict is verdict]


@pytest.mark.parametrize(
    ("value", "verdict", "said"),
    [
        ("", Verdict.NOT_ASKED, "ATHANOR_SEAL_KEY is not set"),
        (FIRST, Verdict.OK, f"{name_of_key(FIRST)}; Airflow's tasks and Ray's nodes must have the same"),
        (f"{SECOND},{FIRST}", Verdict.OK, f"{name_of_key(SECOND)}, and opens what {name_of_key(FIRST)} sealed"),
        ("changed-by-hand", Verdict.WRONG, "ATHANOR_SEAL_KEY: key 1 is no base64; it must be 32 bytes"),
    ],
)
def test_the_sealing_key_is_told_by_its_name_and_never_shown(value: str, verdict: Verdict, said: str) -> None:
    (finding,) = [found for found in findings({SEAL_KEY: value}) if found.subject == "sealing key"]
    assert finding.verdict is verdict
    assert said in finding.what
    assert not value or value not in f"{finding.what} {finding.advice}"


# ------------------------------------------------------------------- stores


def test_a_folder_is_well_and_left_as_it_was(file_store: str) -> None:
    found = list(examine(file_store))
    assert told(found, Verdict.WRONG) == []
    assert f"put if absent: atomic: one winner in each of {ROUNDS} races of 8 writers" in told(found, Verdict.OK)
    assert [path for path in Path(file_store.removeprefix("file://")).rglob("*") if path.is_file()] == []


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "store").write_text("a file where the folder should be")
    (finding,) = examine((tmp_path / "store").as_uri())
    assert finding.verdict is Verdict.WRONG
    assert "can be written" in finding.advice


def test_a_store_that_overwrites_is_wrong_and_one_that_looks_first_is_a_warning(
    file_store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def look_then_write(self: FileStore, key: str, data: bytes) -> bool:
        if self.exists(key):
            return False
        time.sleep(0.02)
        self.write_bytes(key, data)
        return True

    monkeypatch.setattr(FileStore, "put_if_absent", look_then_write)
    (finding,) = [finding for finding in examine(file_store) if finding.subject == "put if absent"]
    assert finding.verdict is Verdict.WARNING
    assert finding.what.startswith("not atomic: ")

    monkeypatch.setattr(FileStore, "put_if_absent", lambda self, key, data: self.write_bytes(key, data) is None)
    (finding,) = [finding for finding in examine(file_store) if finding.subject == "put if absent"]
    assert finding.verdict is Verdict.WRONG
    assert "ignores If-None-Match" in finding.what


@pytest.mark.integration
def test_each_server_is_described_as_it_is(every_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = f"{enter(every_server, monkeypatch)}/a/prefix"
    found = {finding.subject: finding for finding in examine(uri)}
    assert [finding for finding in found.values() if finding.verdict is Verdict.WRONG] == []
    assert found["rights"].what == "put, get, list, delete, multipart upload, abort"
    once, checksums = found["put if absent"], found["checksums"].what
    if every_server.kind == "ceph":
        assert (once.verdict, checksums) == (
            Verdict.OK,
            "when_required and when_supported; ignores CRC32; the SHA-256 in our manifests protects",
        )
    else:
        assert (once.verdict, checksums) == (
            Verdict.WARNING,
            "when_required and when_supported; refuses data with a wrong CRC32",
        )
    left = [found["uploads"].what, *(entry.key for entry in listed(uri))]
    assert left == ["none was left half-way"]


def listed(uri: str):
    from stages.artifacts.addresses import open_store

    return open_store(uri).listing()


@pytest.mark.integration
@pytest.mark.parametrize(
    ("broken", "words", "advice"),
    [
        ({"AWS_SECRET_ACCESS_KEY": "wrong"}, "secret key does not belong", "AWS_SECRET_ACCESS_KEY"),
        ({"AWS_ACCESS_KEY_ID": "nobody"}, "does not know the access key|does not belong", "AWS_ACCESS_KEY_ID"),
        ({"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}, "does not answer", "AWS_ENDPOINT_URL"),
    ],
)
def test_a_broken_store_is_told_within_seconds(
    every_server: S3Server, monkeypatch: pytest.MonkeyPatch, broken: dict[str, str], words: str, advice: str
) -> None:
    uri = enter(every_server, monkeypatch)
    for name, value in broken.items():
        monkeypatch.setenv(name, value)
    begin = time.monotonic()
    (finding,) = examine(uri)
    assert finding.verdict is Verdict.WRONG
    assert any(text in finding.what for text in words.split("|"))
    assert advice in finding.advice
    assert time.monotonic() - begin < 60  # no outage that one waits out, which is 180 s


@pytest.mark.integration
def test_a_bucket_that_is_missing_is_told(every_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    enter(every_server, monkeypatch)
    (finding,) = examine("s3://no-such-bucket-here/prefix")
    assert finding.verdict is Verdict.WRONG
    assert "the bucket does not exist" in finding.what
    assert "Create it" in finding.advice


def test_no_credentials_at_all_are_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    (finding,) = examine("s3://bucket")
    assert "no credentials were found" in finding.what


@contextmanager
def in_front_of(
    server: S3Server, change: Callable[[str, str], tuple[int, str, dict[str, str]] | None]
) -> Iterator[str]:
    """A proxy before the S3 server: `change(method, path)` answers in its place, or adds headers with status 0."""

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _pass(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            status, text, extra = change(self.command, self.path) or (0, "", {})
            headers = httpx.Headers()
            content = text.encode()
            if not status:
                url = server.endpoint + self.path
                answer = httpx.request(self.command, url, headers=dict(self.headers), content=body, trust_env=False)
                status, content, headers = answer.status_code, answer.content, answer.headers
            dropped = ("content-length", "transfer-encoding", "connection", "content-encoding", "date")
            length = headers.get("Content-Length") if self.command == "HEAD" else None
            self.send_response_only(status)
            kept = {name: value for name, value in headers.items() if name.lower() not in dropped}
            sent = {"Date": headers.get("Date") or formatdate(usegmt=True), **kept, **extra}
            for name, value in {**sent, "Content-Length": length or str(len(content))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _pass

        def log_message(self, format: str, *args: object) -> None:
            pass

    with answering(Handler) as url:
        yield url


DENIED = (403, "<Error><Code>AccessDenied</Code><Message>no</Message></Error>", {"Content-Type": "application/xml"})


@pytest.mark.integration
def test_the_one_right_that_is_missing_is_named(swift_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = f"{enter(swift_server, monkeypatch)}/prefix"
    with in_front_of(
        swift_server, lambda method, path: DENIED if "uploads" in path and method == "GET" else None
    ) as url:
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        found = list(examine(uri))
    missing = [finding.subject for finding in found if finding.verdict is Verdict.WRONG]
    assert missing[0] == "right: list and abort multipart uploads"


@pytest.mark.integration
@pytest.mark.parametrize(("seconds", "verdict"), [(120, Verdict.WARNING), (-3600, Verdict.WRONG)])
def test_a_clock_that_is_off_is_told(
    swift_server: S3Server, monkeypatch: pytest.MonkeyPatch, seconds: int, verdict: Verdict
) -> None:
    uri = enter(swift_server, monkeypatch)

    def later(method: str, path: str) -> tuple[int, str, dict[str, str]]:
        return 0, "", {"Date": formatdate(time.time() + seconds, usegmt=True)}

    with in_front_of(swift_server, later) as url:
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        (finding,) = [finding for finding in examine(uri) if finding.subject == "clock"]
    assert finding.verdict is verdict
    assert ("ahead of" if seconds > 0 else "behind") in finding.what


# ------------------------------------------------------------------ servers


def about(settings: dict[str, str], subject: str) -> Finding:
    (finding,) = [finding for finding in findings(settings) if finding.subject == subject]
    return finding


def test_when_all_is_well_the_status_is_zero_and_what_is_not_set_is_not_asked(file_store: str) -> None:
    lines: list[str] = []
    answers = {
        "/api/v2/monitor/health": (200, HEALTHY),
        "/api/v0/nodes": (200, ALIVE),
        SEARCH: (200, {"experiments": []}),
        "/version": (200, 3.17),
    }
    with serving(answers) as url:
        settings = {
            "ARTIFACT_STORE": file_store,
            "AIRFLOW__CORE__EXECUTION_API_SERVER_URL": f"{url}/execution/",
            "RAY_JOBS_URL": url,
            "MLFLOW_TRACKING_URI": url,
        }
        assert doctor(settings, lines.append) == 0
    assert any("1 nodes, 4 CPU, 1 GPU" in line for line in lines)
    assert doctor({"ARTIFACT_STORE": file_store}, lines.append) == 0
    assert sum("not asked" in line for line in lines) == 3


def test_without_a_store_the_status_is_one_and_says_what_to_set() -> None:
    lines: list[str] = []
    assert doctor({}, lines.append) == 1
    assert "set ARTIFACT_STORE to file:///folder or s3://bucket/prefix" in lines[1]


def test_a_scheduler_without_heartbeat_is_named(file_store: str) -> None:
    sick = {**HEALTHY, "scheduler": {"status": "unhealthy", "latest_scheduler_heartbeat": None}}
    with serving({"/api/v2/monitor/health": (200, sick)}) as url:
        finding = about({"ARTIFACT_STORE": file_store, "AIRFLOW_API_URL": url}, "Airflow")
    assert (finding.verdict, finding.what) == (Verdict.WRONG, "scheduler is unhealthy, last heartbeat never")


def test_a_wrong_token_of_ray_is_told_from_no_token(file_store: str) -> None:
    with serving({"/api/v0/nodes": (401, {})}) as url:
        parts = urlsplit(url)
        given = f'{{"conn_type": "ray_jobs", "host": "{parts.hostname}", "port": {parts.port}, "password": "wrong"}}'
        finding = about({"ARTIFACT_STORE": file_store, "AIRFLOW_CONN_RAY_DEFAULT": given}, "Ray")
        assert finding.what.endswith("refuses the token")
        finding = about({"ARTIFACT_STORE": file_store, "RAY_JOBS_URL": url}, "Ray")
        assert finding.what.endswith("refuses us, who have no token")
    assert "ray_default" in finding.advice


@pytest.mark.parametrize(
    ("status", "user", "words"), [(401, "", "no login"), (401, "eve", "the login of eve"), (403, "", "forbids")]
)
def test_mlflows_refusals_are_told_apart(file_store: str, status: int, user: str, words: str) -> None:
    with serving({SEARCH: (status, {"message": "no"})}) as url:
        settings = {"ARTIFACT_STORE": file_store, "MLFLOW_TRACKING_URI": url, "MLFLOW_TRACKING_USERNAME": user}
        assert words in about(settings, "MLflow").what


def test_a_stranger_a_closed_port_and_a_name_without_address_are_told_apart(file_store: str) -> None:
    base = {"ARTIFACT_STORE": file_store}
    with serving({"/api/v0/nodes": (200, {"hello": "world"})}) as url:
        assert "not as Ray does" in about({**base, "RAY_JOBS_URL": url}, "Ray").what
    assert "nothing listens" in about({**base, "RAY_JOBS_URL": f"http://127.0.0.1:{any_free()}"}, "Ray").what
    unknown = about({**base, "MLFLOW_TRACKING_URI": "http://no-such-host.invalid:5000"}, "MLflow")
    assert "does not resolve" in unknown.what
    assert "is not a server" in about({**base, "MLFLOW_TRACKING_URI": "sqlite:///x.db"}, "MLflow").what


@pytest.mark.parametrize("address", ["http://127.0.0.1:50a0", "nohttp", "http://:8080", "http://ray:None"])
def test_what_is_no_address_is_told(file_store: str, address: str) -> None:
    found = about({"ARTIFACT_STORE": file_store, "RAY_JOBS_URL": address}, "Ray")
    assert found.verdict is Verdict.WRONG
    assert "is no address" in found.what
    assert "http://host:port" in found.advice


def test_a_server_that_listens_and_never_answers_is_told(file_store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("infra.doctor.TIMEOUT_SECONDS", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        finding = about({"ARTIFACT_STORE": file_store, "RAY_JOBS_URL": url}, "Ray")
    assert "did not answer" in finding.what
