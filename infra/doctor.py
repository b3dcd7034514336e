"""`make doctor`: checks that object store, Airflow, Ray and MLflow can do what the stages need; if not, it says what is
wrong and what to do. The exit status is 1 when something is wrong.

It checks the running local stack, or, if there is none or with `--environment`, the servers that the environment names,
so it also runs in any container of a deployment.
"""

from __future__ import annotations

import json
import socket
import ssl
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import SimpleNamespace
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

import httpx

from infra.store_probe import Finding, Verdict, examine, ok, warning, wrong
from operators.ray.jobs import RayEndpoint, RayRefusedError
from stages.config.errors import without_logins
from stages.config.seals import NEW_KEY, SEAL_KEY, read_key_ring

TIMEOUT_SECONDS = 10.0
_MARKS = {Verdict.OK: "ok     ", Verdict.WARNING: "warning", Verdict.WRONG: "WRONG  ", Verdict.NOT_ASKED: "-      "}


def doctor(settings: Mapping[str, str], say: Callable[[str], None]) -> int:
    """Check everything, print all findings, and return the exit status."""
    worst = 0
    for finding in findings(settings):
        say(without_logins(f"{_MARKS[finding.verdict]} {finding.subject:<16} {finding.what}"))
        if finding.advice:
            say(f"{'':<24} -> {finding.advice}")
        worst += finding.verdict is Verdict.WRONG
    say(f"{worst} thing{'s' if worst != 1 else ''} wrong" if worst else "nothing is wrong")
    return 1 if worst else 0


def findings(settings: Mapping[str, str]) -> Iterator[Finding]:
    """All findings; those about the store come first, because nothing works without it."""
    uri = settings.get("ARTIFACT_STORE")
    if uri:
        yield from examine(uri)
    else:
        yield wrong(
            "store",
            "ARTIFACT_STORE is not set and no local stack runs",
            "Run `make up`, or set ARTIFACT_STORE to file:///folder or s3://bucket/prefix.",
        )
    yield from _asked("Airflow", _airflow_url(settings), "AIRFLOW_API_URL", _airflow)
    try:
        ray, token = _ray_of(settings)
    except RayRefusedError as error:
        yield wrong("Ray", str(error), error.advice)
    else:
        yield from _asked("Ray", ray, "AIRFLOW_CONN_RAY_DEFAULT or RAY_JOBS_URL", lambda url: _ray(url, token))
    yield from _asked(
        "MLflow", settings.get("MLFLOW_TRACKING_URI", ""), "MLFLOW_TRACKING_URI", lambda url: _mlflow(url, settings)
    )
    yield _sealing_key(settings.get(SEAL_KEY, "").strip())


def _sealing_key(text: str) -> Finding:
    """Whether it is one; that both sides have the same one is seen by its name, in containers of both."""
    subject = "sealing key"
    if not text:
        what = f"{SEAL_KEY} is not set: no key of an endpoint can come from an Airflow connection"
        return Finding(Verdict.NOT_ASKED, subject, what)
    try:
        names = list(read_key_ring(text))
    except ValueError as error:
        return wrong(subject, f"{SEAL_KEY}: {error}", f"Make one with {NEW_KEY}, the same for Airflow and Ray.")
    others = f", and opens what {' and '.join(names[1:])} sealed" if names[1:] else ""
    return ok(subject, f"{names[0]}{others}; Airflow's tasks and Ray's nodes must have the same")


def _asked(subject: str, url: str, variable: str, ask: Callable[[str], Iterable[Finding]]) -> Iterator[Finding]:
    if not url:
        yield Finding(Verdict.NOT_ASKED, subject, f"not asked: {variable} is not set")
        return
    try:
        yield from ask(url.rstrip("/"))
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        yield wrong(subject, *_unreachable(url, error, variable))
    except (KeyError, TypeError, ValueError) as error:
        what = f"{url} answers, but not as {subject} does ({type(error).__name__}: {error})"
        yield wrong(subject, what, f"Something else listens there: correct {variable}.")


def _unreachable(url: str, error: Exception, variable: str) -> tuple[str, str]:
    """What is wrong and what to do, from the cause behind httpx's error, whose class alone does not say."""
    if isinstance(error, (httpx.InvalidURL, httpx.UnsupportedProtocol)):
        return f"{url!r} is no address", f"Set {variable} to something like http://host:port."
    host = httpx.URL(url).netloc.decode()
    match _first_cause(error):
        case ssl.SSLError():
            return (
                f"the certificate of {host} is not trusted",
                "Set SSL_CERT_FILE, and REQUESTS_CA_BUNDLE for MLflow's client, to the certificate of its authority.",
            )
        case socket.gaierror() | UnicodeError():
            return f"the name in {url} does not resolve", f"Correct {variable}, or run this inside its network."
        case _ if isinstance(error, httpx.TimeoutException):
            return (
                f"{host} did not answer within {TIMEOUT_SECONDS:.0f} s",
                "It may be overloaded, or a firewall drops our requests: look at its log and at network policies.",
            )
        case _:
            return f"nothing listens at {host}", f"Start it (`make up`, `make compose-up`), or correct {variable}."


def _first_cause(error: BaseException) -> BaseException:
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__ or error
    return error


def _get(url: str, *, token: str = "", login: tuple[str, str] | None = None, **params: Any) -> httpx.Response:
    loopback = httpx.URL(url).host in ("127.0.0.1", "localhost", "::1")
    return httpx.get(
        url,
        headers={"Authorization": f"Bearer {token}"} if token else {},
        auth=login,
        params=params,
        timeout=TIMEOUT_SECONDS,
        follow_redirects=True,
        trust_env=not loopback,  # no proxy
    )


def _airflow_url(settings: Mapping[str, str]) -> str:
    """The API server's address, from either of the variables that may hold it."""
    if url := settings.get("AIRFLOW_API_URL"):
        return url
    scheme, separator, rest = settings.get("AIRFLOW__CORE__EXECUTION_API_SERVER_URL", "").partition("://")
    return f"{scheme}://{rest.partition('/')[0]}" if separator else ""


def _airflow(url: str) -> Iterator[Finding]:
    response = _get(f"{url}/api/v2/monitor/health")
    if not response.is_success:
        yield wrong("Airflow", f"{url} answers {response.status_code}", "Look at the API server's log.")
        return
    report = response.json()
    for name in ("metadatabase", "scheduler", "dag_processor", "triggerer"):
        status = report[name]["status"]
        if status == "healthy":
            continue
        last = report[name].get(f"latest_{name}_heartbeat") or "never"
        seen = "" if name == "metadatabase" else f", last heartbeat {last}"
        yield wrong("Airflow", f"{name} is {status}{seen}", f"Start it again and look at its log: {name}.")
    if all(part["status"] == "healthy" for part in report.values() if part.get("status")):
        yield ok("Airflow", f"{url}: database, scheduler, DAG processor and triggerer are healthy")


def _ray_of(settings: Mapping[str, str]) -> tuple[str, str]:
    """Address and token from Airflow's connection, otherwise from Ray's own variables."""
    token = settings.get("RAY_AUTH_TOKEN") or settings.get("RAY_TOKEN", "")
    if not (text := settings.get("AIRFLOW_CONN_RAY_DEFAULT")):
        return settings.get("RAY_JOBS_URL") or settings.get("RAY_API_SERVER_ADDRESS", ""), token
    try:
        connection = _connection(text)
    except (AttributeError, TypeError, ValueError, RecursionError):
        raise RayRefusedError(
            "AIRFLOW_CONN_RAY_DEFAULT is neither a JSON object nor a URI that can be read",
            advice="Write it as docs/ORCHESTRATION.md shows; an IPv6 address in a URI needs brackets.",
        ) from None
    return RayEndpoint.from_connection(connection).base_url, connection.password or token


def _connection(text: str) -> Any:
    """A connection as Airflow reads it from the environment; Airflow itself is not in every container."""
    if text.lstrip().startswith(("{", "[")):
        found = json.loads(text)
        fields = {name: found.get(name) for name in ("host", "schema", "password")}
        port, extra = int(found["port"]) if found.get("port") else None, found.get("extra") or {}
        extra = json.loads(extra) if isinstance(extra, str) else extra
    else:
        parts = urlsplit(text)
        extra, port = dict(parse_qsl(parts.query)), parts.port
        extra = json.loads(extra["__extra__"]) if "__extra__" in extra else extra
        given = {"host": parts.hostname, "schema": parts.path[1:], "password": parts.password}
        fields = {name: unquote(value) if value else value for name, value in given.items()}
    return SimpleNamespace(conn_id="ray_default", port=port, extra_dejson=extra, **fields)


def _ray(url: str, token: str) -> Iterator[Finding]:
    response = _get(f"{url}/api/v0/nodes", token=token)
    if response.status_code in (401, 403):
        advice = "Give the connection ray_default the token of the head (RAY_AUTH_TOKEN there) as its password."
        yield wrong("Ray", f"{url} refuses {'the token' if token else 'us, who have no token'}", advice)
        return
    if not response.is_success:
        yield wrong("Ray", f"{url} answers {response.status_code}", "Look at the log of Ray's head.")
        return
    nodes = [node for node in response.json()["data"]["result"]["result"] if node["state"] == "ALIVE"]
    if not nodes:
        yield wrong("Ray", "the head answers, but none of its nodes is alive", "Look at the log of Ray's head.")
        return
    total: dict[str, float] = {}
    for node in nodes:
        for name in ("CPU", "GPU"):
            total[name] = total.get(name, 0) + node.get("resources_total", {}).get(name, 0)
    yield ok("Ray", f"{url}: {len(nodes)} nodes, {total['CPU']:.0f} CPU, {total['GPU']:.0f} GPU")


def _mlflow(url: str, settings: Mapping[str, str]) -> Iterator[Finding]:
    if url.partition("://")[0] not in ("http", "https"):
        advice = "Set MLFLOW_TRACKING_URI to the URL of a server: stages on other machines cannot see this one."
        yield wrong("MLflow", f"{url!r} is not a server", advice)
        return
    user, password = settings.get("MLFLOW_TRACKING_USERNAME", ""), settings.get("MLFLOW_TRACKING_PASSWORD", "")
    login = (user, password) if user else None
    response = _get(f"{url}/api/2.0/mlflow/experiments/search", login=login, max_results=1)
    if response.status_code == 401:
        who = f"the login of {user}" if user else "us, who have no login"
        advice = "Set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD to an account that it knows."
        yield wrong("MLflow", f"{url} refuses {who}", advice)
        return
    if response.status_code == 403:
        advice = "Start MLflow with this host in --allowed-hosts (MLFLOW_HOSTS for Compose), or give the user rights."
        yield wrong("MLflow", f"{url} forbids it: {response.text[:200]}", advice)
        return
    if not response.is_success:
        yield wrong("MLflow", f"{url} answers {response.status_code}", "Look at its log and at its database.")
        return
    if not isinstance(response.json(), dict):
        raise ValueError("no JSON object")
    version = _get(f"{url}/version", login=login).text.strip()
    if not version.startswith("3."):
        advice = "Use MLflow 3.17 or newer: older ones have no LoggedModels."
        yield warning("MLflow", f"{url} says that its version is {version[:40]!r}", advice)
        return
    yield ok("MLflow", f"{url}: version {version}, {'logged in as ' + user if user else 'without a login'}")
