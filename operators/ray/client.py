"""Ray Jobs REST API for the triggerer: asynchronous, with the live log over a websocket."""

from collections.abc import AsyncIterator, Callable
from types import TracebackType
from typing import Any

import aiohttp

from operators.ray.jobs import JobInfo, RayEndpoint, RayUnreachableError, check_answer, read_answer, total_resources


class RayJobClient:
    """Use it as an async context manager."""

    def __init__(self, endpoint: RayEndpoint) -> None:
        self._endpoint = endpoint
        self._timeout = aiohttp.ClientTimeout(total=endpoint.timeout_seconds)

    async def __aenter__(self) -> "RayJobClient":
        self._session = aiohttp.ClientSession(
            headers=self._endpoint.headers,
            connector=aiohttp.TCPConnector(ssl=self._endpoint.ssl_context()),
            trust_env=True,
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._session.close()

    async def get_job(self, submission_id: str) -> JobInfo | None:
        """Return the job, or None when the cluster does not know it."""
        what = f"show job {submission_id}"
        return await self._request("GET", f"/api/jobs/{submission_id}", read=JobInfo.from_json, what=what)

    async def list_jobs(self) -> list[JobInfo]:
        """Return the jobs that were submitted through the Jobs API."""
        found = await self._request(
            "GET",
            "/api/jobs/",
            read=lambda jobs: [JobInfo.from_json(job) for job in jobs if job.get("submission_id")],
            what="list jobs",
        )
        return found or []

    async def stop_job(self, submission_id: str) -> bool:
        stopped = await self._request(
            "POST",
            f"/api/jobs/{submission_id}/stop",
            read=lambda found: bool(found.get("stopped")),
            what=f"stop job {submission_id}",
        )
        return bool(stopped)

    async def get_logs(self, submission_id: str) -> str:
        """Return the whole log so far."""
        path = f"/api/jobs/{submission_id}/logs"
        log = await self._request("GET", path, read=lambda found: str(found.get("logs") or ""), what="send the log")
        return log or ""

    async def cluster_resources(self) -> dict[str, float]:
        """Return the resources of all nodes together, used or not."""
        path = "/api/v0/nodes?detail=true&limit=10000"
        return await self._request("GET", path, read=total_resources, what="list its nodes") or {}

    async def tail_logs(self, submission_id: str) -> AsyncIterator[str]:
        """Yield the log from its first byte on, as it grows.

        The end of the iterator does not mean the end of the job: Ray may close the websocket at any time.
        """
        url = self._endpoint.url(f"/api/jobs/{submission_id}/logs/tail")
        try:
            async with self._session.ws_connect(url, heartbeat=30, max_msg_size=0) as websocket:
                async for message in websocket:
                    if message.type is aiohttp.WSMsgType.TEXT:
                        yield message.data
                    elif message.type is aiohttp.WSMsgType.ERROR:
                        raise RayUnreachableError(f"the log's websocket broke: {websocket.exception()!r}")
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise RayUnreachableError(f"the log's websocket failed: {type(error).__name__}: {error}") from None

    async def _request(self, method: str, path: str, *, read: Callable[[Any], Any], what: str) -> Any:
        """Return `read` of the answer's JSON, None for what is absent."""
        try:
            async with self._session.request(method, self._endpoint.url(path), timeout=self._timeout) as answer:
                text = await answer.text(errors="replace")
                if answer.status == 404:
                    return None
                check_answer(answer.status, text, what=what)
                return read_answer(text, read, what=what)
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise RayUnreachableError(
                f"Ray at {self._endpoint.base_url} could not be asked to {what}: {type(error).__name__}: {error}"
            ) from None
