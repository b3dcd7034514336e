"""A small HTTP server with the behaviour of the Ray Jobs API: job table, token, duplicate ids, stop, live log.

Unlike a real head it can be told to misbehave: to close the log's websocket in the middle of a line, to answer nothing,
to forget its jobs, or to accept a job and lose the answer.
"""

from __future__ import annotations

import asyncio
import threading
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from aiohttp import WSCloseCode, web

TOKEN = "stand-in-token"


@dataclass
class Job:
    submission_id: str
    entrypoint: str
    status: str = "RUNNING"
    log: str = ""
    message: str = ""
    error_type: str | None = None
    driver_exit_code: int | None = None
    body: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        keys = ("submission_id", "entrypoint", "status", "message", "error_type", "driver_exit_code")
        return {**{key: getattr(self, key) for key in keys}, "metadata": self.body.get("metadata")}


class StandInRay:
    """Runs in a thread of its own; the test changes `jobs` and the misbehaviours while clients talk to it."""

    def __init__(self) -> None:
        self.jobs: dict[str, Job] = {}
        self.posts: list[str] = []
        self.stops: list[str] = []
        self.down = False
        """Every request is answered with HTTP 503."""
        self.lose_answers = 0
        """So many POSTs are carried out and then answered with HTTP 502."""
        self.close_log_after: list[int] = []
        """Characters after which the next log connections are closed; then they stay open until the job ends."""
        self._ready = threading.Event()

    def __enter__(self) -> StandInRay:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()
        if not self._ready.wait(10):
            raise RuntimeError("the stand-in did not start")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)

    @property
    def connection(self) -> dict[str, Any]:
        return {"conn_type": "ray_jobs", "schema": "http", "host": "127.0.0.1", "port": self.port, "password": TOKEN}

    def _serve(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._main())

    async def _main(self) -> None:
        self._stop = asyncio.Event()
        application = web.Application(middlewares=[self._gate])
        application.router.add_get("/api/version", self._version)
        application.router.add_get("/api/v0/nodes", self._nodes)
        application.router.add_get("/api/jobs/", self._list)
        application.router.add_post("/api/jobs/", self._submit)
        application.router.add_get("/api/jobs/{id}", self._show)
        application.router.add_post("/api/jobs/{id}/stop", self._stop_job)
        application.router.add_get("/api/jobs/{id}/logs", self._logs)
        application.router.add_get("/api/jobs/{id}/logs/tail", self._tail)
        runner = web.AppRunner(application, shutdown_timeout=0.1, access_log=None)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        self.port = runner.addresses[0][1]
        self._ready.set()
        await self._stop.wait()
        await runner.cleanup()

    @web.middleware
    async def _gate(self, request: web.Request, handler: Any) -> web.StreamResponse:
        if self.down:
            return web.Response(status=503, text="starting")
        if request.headers.get("Authorization") != f"Bearer {TOKEN}":
            return web.Response(status=401, text="Unauthorized")
        return await handler(request)

    def _job(self, request: web.Request) -> Job:
        job = self.jobs.get(request.match_info["id"])
        if job is None:
            raise web.HTTPNotFound(text="Job does not exist")
        return job

    async def _version(self, request: web.Request) -> web.Response:
        return web.json_response({"ray_version": "2.60.0"})

    async def _nodes(self, request: web.Request) -> web.Response:
        nodes = [
            {"state": "ALIVE", "resources_total": {"CPU": 4.0}},
            {"state": "ALIVE", "resources_total": {"CPU": 2.0, "GPU": 1.0}},
            {"state": "DEAD", "resources_total": {"CPU": 64.0}},
        ]
        return web.json_response({"result": True, "msg": "", "data": {"result": {"result": nodes}}})

    async def _list(self, request: web.Request) -> web.Response:
        return web.json_response([job.to_json() for job in self.jobs.values()])

    async def _submit(self, request: web.Request) -> web.Response:
        body = await request.json()
        submission_id = body["submission_id"]
        self.posts.append(submission_id)
        if submission_id in self.jobs:
            trace = f"Traceback:\nValueError: Job with submission_id {submission_id} already exists."
            return web.Response(status=500, text=trace)
        self.jobs[submission_id] = Job(submission_id, body["entrypoint"], body=body)
        if self.lose_answers:
            self.lose_answers -= 1
            return web.Response(status=502, text="bad gateway")
        return web.json_response({"job_id": submission_id, "submission_id": submission_id})

    async def _show(self, request: web.Request) -> web.Response:
        return web.json_response(self._job(request).to_json())

    async def _stop_job(self, request: web.Request) -> web.Response:
        job = self._job(request)
        self.stops.append(job.submission_id)
        running = job.status in ("PENDING", "RUNNING")
        if running:
            job.status = "STOPPED"
        return web.json_response({"stopped": running})

    async def _logs(self, request: web.Request) -> web.Response:
        return web.json_response({"logs": self._job(request).log})

    async def _tail(self, request: web.Request) -> web.StreamResponse:
        job = self._job(request)
        websocket = web.WebSocketResponse()
        await websocket.prepare(request)
        limit = self.close_log_after.pop(0) if self.close_log_after else None
        sent = 0
        while not websocket.closed:
            piece = job.log[sent:] if limit is None else job.log[sent:limit]
            if piece:
                await websocket.send_str(piece)
                sent += len(piece)
            ended = job.status not in ("PENDING", "RUNNING") and sent == len(job.log)
            if ended or (limit is not None and sent >= limit):
                await websocket.close(code=WSCloseCode.OK)
                return websocket
            await asyncio.sleep(0.02)
        return websocket
