"""Ray Jobs REST API for tasks: synchronous, without ray installed, authenticated by the connection's token.

httpx rather than requests, because Airflow's task process has already loaded it: importing a second HTTP library would
cost every task a tenth of a second.
"""

from collections.abc import Callable, Mapping
from functools import cached_property
from types import TracebackType
from typing import Any

from airflow.sdk import BaseHook
from airflow.sdk.exceptions import AirflowNotFoundException

from operators.ray.jobs import (
    JobInfo,
    RayEndpoint,
    RayRefusedError,
    RayUnreachableError,
    check_answer,
    read_answer,
    submission_body,
)

DEFAULT_CONN_ID = "ray_default"


class RayJobHook(BaseHook):
    """Submit, look at, list and stop Ray jobs."""

    conn_name_attr = "ray_conn_id"
    default_conn_name = DEFAULT_CONN_ID
    conn_type = "ray_jobs"
    hook_name = "Ray Jobs"

    def __init__(self, ray_conn_id: str = DEFAULT_CONN_ID) -> None:
        super().__init__()
        self.ray_conn_id = ray_conn_id

    @cached_property
    def endpoint(self) -> RayEndpoint:
        try:
            return RayEndpoint.from_connection(self.get_connection(self.ray_conn_id))
        except AirflowNotFoundException:
            # Airflow says the same of a URI that it cannot read, such as one with an IPv6 address without brackets.
            raise RayRefusedError(
                f"connection {self.ray_conn_id!r} is not defined, or Airflow cannot read it",
                advice=f"Define it in Airflow, or as JSON in AIRFLOW_CONN_{self.ray_conn_id.upper()}.",
            ) from None

    @cached_property
    def _http(self) -> Any:
        import httpx

        endpoint = self.endpoint
        return httpx.Client(
            base_url=endpoint.base_url,
            headers=endpoint.headers,
            verify=endpoint.ssl_context(),
            timeout=endpoint.timeout_seconds,
        )

    def __enter__(self) -> "RayJobHook":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        if "_http" in self.__dict__:
            self._http.close()
            del self.__dict__["_http"]

    def version(self) -> dict[str, Any]:
        return self._request("GET", "/api/version", read=lambda found: {**found}, what="tell its version")

    def submit_job(
        self,
        *,
        submission_id: str,
        entrypoint: str,
        metadata: Mapping[str, str] | None = None,
        num_cpus: float = 0,
        num_gpus: float = 0,
        env_vars: Mapping[str, str] | None = None,
    ) -> None:
        """Start a job; raises JobExistsError when the id is taken."""
        body = submission_body(
            submission_id=submission_id,
            entrypoint=entrypoint,
            metadata=metadata or {},
            num_cpus=num_cpus,
            num_gpus=num_gpus,
            env_vars=env_vars or {},
        )
        what = f"start job {submission_id}"
        # The answer's content tells Ray from the page of a proxy, which starts nothing.
        self._request("POST", "/api/jobs/", read=lambda found: {**found}, what=what, json=body)

    def get_job(self, submission_id: str) -> JobInfo | None:
        """Return the job, or None when the cluster does not know it."""
        what = f"show job {submission_id}"
        return self._request("GET", f"/api/jobs/{submission_id}", read=JobInfo.from_json, what=what, absent_ok=True)

    def list_jobs(self) -> list[JobInfo]:
        """Return the jobs that were submitted through the Jobs API."""
        return self._request(
            "GET",
            "/api/jobs/",
            read=lambda jobs: [JobInfo.from_json(job) for job in jobs if job.get("submission_id")],
            what="list jobs",
        )

    def stop_job(self, submission_id: str) -> bool:
        """Ask a job to stop; False when there was nothing to stop. Harmless to repeat."""
        stopped = self._request(
            "POST",
            f"/api/jobs/{submission_id}/stop",
            read=lambda found: bool(found.get("stopped")),
            what=f"stop job {submission_id}",
            absent_ok=True,
        )
        return bool(stopped)

    def get_logs(self, submission_id: str) -> str:
        log = self._request(
            "GET",
            f"/api/jobs/{submission_id}/logs",
            read=lambda found: str(found.get("logs") or ""),
            what="send the log",
            absent_ok=True,
        )
        return log or ""

    def test_connection(self) -> tuple[bool, str]:
        """Airflow's "Test" button: reach the head, check the token, show the version."""
        try:
            version = self.version()
            jobs = self.list_jobs()
        except RayRefusedError as error:
            return False, f"{str(error).rstrip('.')}. {error.advice}".strip()
        except RayUnreachableError as error:
            return False, str(error)
        finally:
            self.close()
        return True, f"Ray {version.get('ray_version', '?')} at {self.endpoint.base_url}, {len(jobs)} jobs known"

    def _request(
        self,
        method: str,
        path: str,
        *,
        read: Callable[[Any], Any],
        what: str,
        absent_ok: bool = False,
        json: Any = None,
    ) -> Any:
        """Return `read` of the answer's JSON; None for what is absent, where that is allowed."""
        import httpx

        try:
            answer = self._http.request(method, path, json=json)
        except httpx.HTTPError as error:
            raise RayUnreachableError(
                f"Ray at {self.endpoint.base_url} could not be asked to {what}: {type(error).__name__}: {error}"
            ) from None
        except httpx.InvalidURL as error:
            raise RayRefusedError(
                f"Ray at {self.endpoint.base_url} could not be asked to {what}: {error}",
                advice="Correct the host of the connection, or NO_PROXY, which takes IPv6 addresses without brackets.",
            ) from None
        if absent_ok and answer.status_code == 404:
            return None
        check_answer(answer.status_code, answer.text, what=what)
        return read_answer(answer.text, read, what=what)
