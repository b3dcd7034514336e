"""The deferred part of a stage's task: waits for the Ray job in the triggerer and streams its log into the task log.

Airflow's database holds this module's path for every deferred task, so the class stays where it is.
"""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import asdict
from typing import Any

from airflow.sdk import BaseHook
from airflow.triggers.base import BaseTrigger, TriggerEvent

from operators.links import MlflowRunLink, mlflow_run_page
from operators.ray.client import RayJobClient
from operators.ray.jobs import RayEndpoint, RayUnreachableError
from operators.ray.watch import LogCursor, Outcome, WatchSettings, watch_job
from stages.config.mlflow import tracking_server

_STOP_SECONDS = 25.0


class RayJobTrigger(BaseTrigger):
    """Fires once, when the job has ended, is lost, or the cluster is away for too long.

    A triggerer may die and another one run the same trigger again. So the object store (`cursor_key`) keeps how much of
    the log was shown, and `cleanup`, which runs at every hand-over, stops nothing.
    `settings` are the fields of WatchSettings. `carry` comes back unchanged in the event.
    """

    def __init__(
        self,
        *,
        ray_conn_id: str,
        submission_id: str,
        settings: dict[str, float] | None = None,
        cancel_on_kill: bool = True,
        store_uri: str = "",
        cursor_key: str = "",
        carry: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.ray_conn_id = ray_conn_id
        self.submission_id = submission_id
        self.settings = WatchSettings(**(settings or {}))
        self.cancel_on_kill = cancel_on_kill
        self.store_uri = store_uri
        self.cursor_key = cursor_key
        self.carry = carry or {}

    def serialize(self) -> tuple[str, dict[str, Any]]:
        return "operators.trigger.RayJobTrigger", {
            "ray_conn_id": self.ray_conn_id,
            "submission_id": self.submission_id,
            "settings": asdict(self.settings),
            "cancel_on_kill": self.cancel_on_kill,
            "store_uri": self.store_uri,
            "cursor_key": self.cursor_key,
            "carry": self.carry,
        }

    async def run(self) -> AsyncIterator[TriggerEvent]:
        outcome = await self._watch()
        yield TriggerEvent({**outcome.to_json(), "carry": self.carry})

    async def on_kill(self) -> None:
        """The deferred task was marked failed or successful, or cleared: the job must end."""
        if not self.cancel_on_kill:
            self.log.info("cancel_on_kill is off: job %s continues.", self.submission_id)
            return
        async with asyncio.timeout(_STOP_SECONDS), RayJobClient(await self._endpoint()) as client:
            while True:
                try:
                    await client.stop_job(self.submission_id)
                except RayUnreachableError as error:
                    self.log.warning("%s; trying again.", error)
                    await asyncio.sleep(1)
                else:
                    self.log.info("Stopped Ray job %s.", self.submission_id)
                    return

    async def _endpoint(self) -> RayEndpoint:
        return RayEndpoint.from_connection(await BaseHook.aget_connection(self.ray_conn_id))

    async def _watch(self) -> Outcome:
        cursor = LogCursor(self.store_uri, self.cursor_key, self.submission_id)
        links: set[asyncio.Task[None]] = set()
        async with RayJobClient(await self._endpoint()) as client:
            outcome = await watch_job(
                client,
                self.submission_id,
                cursor=cursor,
                logger=self.log,
                settings=self.settings,
                on_mlflow_run=lambda run: links.add(asyncio.create_task(self._push_mlflow_link(run))),
                drain=True,
            )
            await asyncio.gather(*links)
            return outcome

    async def _push_mlflow_link(self, run: dict[str, Any]) -> None:
        """Make the MLflow button work while the job runs. `dag.test()` has no task instance: there it appears later."""
        ti, tracking_uri = self.task_instance, tracking_server()
        if ti is None or not tracking_uri:
            return
        from airflow.sdk.execution_time.xcom import XCom

        page = mlflow_run_page(tracking_uri, run["run_id"], run.get("experiment_id"))
        self.log.info("MLflow run: %s", page)
        try:
            await XCom.aset(
                key=MlflowRunLink().xcom_key,
                value=page,
                dag_id=ti.dag_id,
                task_id=ti.task_id,
                run_id=ti.run_id,
                map_index=-1 if ti.map_index is None else ti.map_index,
            )
        except Exception as error:  # noqa: BLE001 - without the button the job must still be watched
            self.log.warning("The MLflow button appears only when the task ends: %s: %s", type(error).__name__, error)
