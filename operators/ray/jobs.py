"""The Ray Jobs API as data, shared by the synchronous hook and the asynchronous client: endpoint, job, errors."""

import json
import math
import re
import ssl
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Protocol
from urllib.parse import quote

from stages.config.servers import AddressError, is_web_address, server_address

DEFAULT_PORT = 8265
LONGEST_TIMEOUT_SECONDS = 3600.0
_HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")  # RFC 9110, 5.6.2
HEADERS_FIELD = "secret_headers"
"""Airflow's API and logs mask an extra field by its name, not by what the connection form says about it."""


class RayUnreachableError(Exception):
    """No usable answer: the head is down, restarting, or behind a broken network. Waiting may help."""


class RayRefusedError(Exception):
    """Ray rejected the request: wrong token, wrong request. Waiting does not help."""

    def __init__(self, message: str, *, advice: str = "") -> None:
        super().__init__(message)
        self.advice = advice


class JobExistsError(Exception):
    """The submission id is taken: an earlier POST arrived, and only its answer was lost."""


class JobStatus(StrEnum):
    """Status of a Ray job, or what a watcher found instead of one."""

    PENDING = "PENDING"
    RUNNING = "RUNNING"
    STOPPED = "STOPPED"
    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"
    LOST = "LOST"
    """The cluster does not know the job."""
    UNREACHABLE = "UNREACHABLE"
    """The cluster did not answer for longer than allowed."""
    STALLED = "STALLED"
    """The job showed no sign of life for longer than allowed, and the watcher stopped it."""
    UNPLACED = "UNPLACED"
    """The cluster found no room for the job's own process in the time allowed, and the watcher stopped it."""

    @property
    def is_active(self) -> bool:
        return self in (JobStatus.PENDING, JobStatus.RUNNING)


@dataclass(frozen=True)
class JobInfo:
    """What the status endpoint says about a job."""

    submission_id: str
    status: JobStatus
    message: str = ""
    error_type: str | None = None
    exit_code: int | None = None
    metadata: dict[str, str] = field(default_factory=dict)
    started_at: float = 0.0
    """Seconds since the epoch; 0 = unknown."""

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "JobInfo":
        return cls(
            submission_id=data.get("submission_id") or data.get("job_id") or "",
            status=JobStatus(data["status"]),
            message=data.get("message") or "",
            error_type=data.get("error_type"),
            exit_code=data.get("driver_exit_code"),
            metadata=dict(data.get("metadata") or {}),
            started_at=(data.get("start_time") or 0) / 1000,
        )


class ConnectionLike(Protocol):
    """The parts of an Airflow connection that are read here."""

    conn_id: str
    host: str | None
    port: int | None
    schema: str | None
    password: str | None

    @property
    def extra_dejson(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class RayEndpoint:
    """Where a Ray head is and how to call it. Headers carry the token: they are neither shown nor logged."""

    base_url: str
    dashboard_url: str
    headers: dict[str, str] = field(repr=False)
    verify: bool = True
    ca_path: str = ""
    timeout_seconds: float = 15.0
    conn_id: str = ""

    @classmethod
    def from_connection(cls, connection: ConnectionLike) -> "RayEndpoint":
        """Read a connection of type `ray_jobs`; raises RayRefusedError that names the connection and the field."""
        extra = connection.extra_dejson
        if not isinstance(extra, Mapping):
            raise _refused(connection, "extra is not a JSON object", 'Write it as {"field": "value"}.')
        base_url = _base_url(connection)
        return cls(
            base_url=base_url,
            dashboard_url=_dashboard_url(connection, extra) or base_url,
            headers=_headers(connection, extra),
            verify=bool(extra.get("verify", True)),
            ca_path=str(extra.get("ca_path") or ""),
            timeout_seconds=_timeout(connection, extra),
            conn_id=connection.conn_id,
        )

    def url(self, path: str) -> str:
        return f"{self.base_url}{path}"

    def job_page(self, submission_id: str) -> str:
        """Page of the job in Ray's dashboard."""
        return f"{self.dashboard_url}/#/jobs/{quote(submission_id)}"

    def ssl_context(self) -> ssl.SSLContext | bool:
        """What HTTP clients take for TLS: True = the system's authorities, False = no verification."""
        if not (self.verify and self.ca_path):
            return self.verify
        try:
            return ssl.create_default_context(cafile=self.ca_path)
        except (OSError, ValueError) as error:
            why = (error.strerror if isinstance(error, OSError) else "") or error
            raise RayRefusedError(
                f"connection {self.conn_id!r}: extra field ca_path={self.ca_path!r} cannot be read: {why}",
                advice="Give a PEM file with certificates that exists on the machines of Airflow.",
            ) from None


def _refused(connection: ConnectionLike, what: str, advice: str) -> RayRefusedError:
    return RayRefusedError(f"connection {connection.conn_id!r}: {what}", advice=advice)


def _base_url(connection: ConnectionLike) -> str:
    host = str(connection.host or "").strip()
    if not host:
        raise RayRefusedError(
            f"connection {connection.conn_id!r} has no host",
            advice="Set it to the address of the Ray head, such as ray-head.example.org.",
        )
    _refuse_login(connection, "host", host)
    try:
        return server_address(
            host, scheme=str(connection.schema or "http"), port=connection.port, default_port=DEFAULT_PORT
        )
    except AddressError as error:
        raise _refused(connection, str(error), error.advice) from None


def _dashboard_url(connection: ConnectionLike, extra: Mapping[str, Any]) -> str:
    """Without what follows '#': people copy the address of a page of the dashboard."""
    given = str(extra.get("dashboard_url") or "").strip()
    _refuse_login(connection, "dashboard_url", given)
    if given and (not is_web_address(given) or "?" in given):
        shown = re.sub(r"(?s)[?].*", "?...", given)
        raise _refused(
            connection,
            f"extra field dashboard_url={shown!r} is not the address of a server; allowed: http://... and https://...",
            "Write it as browsers need it, such as https://ray.example.org, or leave it out.",
        )
    return given.partition("#")[0].rstrip("/")


def _refuse_login(connection: ConnectionLike, name: str, address: str) -> None:
    # Wherever the '@' is: a password with a '/' in it ends the host early.
    if "@" in address:
        raise _refused(
            connection,
            f"{name} holds a user name or password, which links and logs would show",
            f'Put it into {HEADERS_FIELD} as {{"Authorization": "Basic ..."}}, or use the token.',
        )


def _timeout(connection: ConnectionLike, extra: Mapping[str, Any]) -> float:
    given = extra.get("timeout_seconds")
    if given in (None, ""):
        return 15.0
    try:
        seconds = float(given)
    except (TypeError, ValueError, OverflowError):
        seconds = math.nan
    if not 0 < seconds <= LONGEST_TIMEOUT_SECONDS:  # also not a number
        raise _refused(
            connection,
            f"extra field timeout_seconds={given!r} is not allowed; "
            f"allowed: above 0, up to {LONGEST_TIMEOUT_SECONDS:g}",
            "Write the seconds to wait for one answer, such as 15.",
        )
    return seconds


def _headers(connection: ConnectionLike, extra: Mapping[str, Any]) -> dict[str, str]:
    """The extra headers and the token; refusals never repeat a value, because all of them are secrets."""
    if "headers" in extra:
        raise _refused(
            connection,
            "extra field headers is shown to all who may read connections",
            f"Name it {HEADERS_FIELD}: Airflow masks fields with `secret` in their name.",
        )
    given = extra.get(HEADERS_FIELD) or {}
    if isinstance(given, str):
        try:
            given = json.loads(given)
        except (ValueError, RecursionError):
            given = None
    if not isinstance(given, Mapping):
        raise _refused(
            connection, f"extra field {HEADERS_FIELD} is not a JSON object", 'Write it as {"Header-Name": "value"}.'
        )
    headers = {str(name): str(value) for name, value in given.items()}
    for name, value in headers.items():
        if not _HEADER_NAME.fullmatch(name) or not _can_be_sent(value):
            raise _refused(
                connection,
                f"extra field {HEADERS_FIELD} has a name or a value that no header can hold",
                "Allowed are printable ASCII characters, without blanks or line breaks at the ends.",
            )
    if token := str(connection.password or ""):
        if not _can_be_sent(token):
            raise _refused(
                connection,
                "password has characters that no header can hold",
                "Copy the cluster's token again, without blanks or line breaks at its ends.",
            )
        headers["Authorization"] = f"Bearer {token}"
    return headers


def _can_be_sent(value: str) -> bool:
    return value.isascii() and value.isprintable() and value == value.strip()


def submission_body(
    *,
    submission_id: str,
    entrypoint: str,
    metadata: Mapping[str, str],
    num_cpus: float,
    env_vars: Mapping[str, str],
    num_gpus: float = 0,
) -> dict[str, Any]:
    """The JSON of POST /api/jobs/.

    `entrypoint_num_cpus` is left out at 0: then the job's own process starts on the head at once, instead of
    waiting for a resource lease. Without `entrypoint_num_gpus` that process has no GPU of its own. An empty runtime
    environment is left out too: a job that has one shares no warm workers.
    """
    body: dict[str, Any] = {"submission_id": submission_id, "entrypoint": entrypoint, "metadata": dict(metadata)}
    if num_cpus:
        body["entrypoint_num_cpus"] = num_cpus
    if num_gpus:
        body["entrypoint_num_gpus"] = num_gpus
    if env_vars:
        body["runtime_env"] = {"env_vars": dict(env_vars)}
    return body


def read_answer(text: str, read: Callable[[Any], Any], *, what: str) -> Any:
    """Return `read` of an answer's JSON; raises RayRefusedError when something else than Ray has answered."""
    try:
        return read(json.loads(text))
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise RayRefusedError(
            f"Ray could not {what}: the answer is not JSON as Ray sends it ({type(error).__name__})",
            advice="Something else answers there, such as a proxy: correct host and port of the ray_jobs connection.",
        ) from None


def total_resources(nodes: Mapping[str, Any]) -> dict[str, float]:
    """Add up the resources of living nodes, from the answer of GET /api/v0/nodes?detail=true."""
    total: dict[str, float] = {}
    for node in nodes.get("data", {}).get("result", {}).get("result", ()):
        if node.get("state") == "ALIVE":
            for name, amount in (node.get("resources_total") or {}).items():
                total[name] = total.get(name, 0.0) + float(amount)
    return total


def check_answer(status: int, text: str, *, what: str) -> None:
    """Raise for every HTTP status that is not a success; callers interpret 404 themselves."""
    if status < 300:
        return
    if status < 400:
        raise RayRefusedError(
            f"Ray could not {what}: HTTP {status}, the server leads to another address.",
            advice="Correct scheme, host and port of the ray_jobs connection; a proxy may also ask for a login.",
        )
    if status in (401, 403):
        raise RayRefusedError(
            f"Ray refused to {what}: HTTP {status}, the token is missing or wrong.",
            advice="Put the cluster's token in the password of the ray_jobs connection.",
        )
    if "already exists" in text:
        raise JobExistsError(what)
    if 400 <= status < 500 and status not in (404, 408, 429):
        raise RayRefusedError(f"Ray refused to {what}: HTTP {status}: {_shorten(text)}")
    raise RayUnreachableError(f"Ray could not {what}: HTTP {status}: {_shorten(text)}")


def _shorten(text: str) -> str:
    lines = [line for line in text.strip().splitlines() if line.strip()]
    return (lines[-1] if lines else "no text")[:500]
