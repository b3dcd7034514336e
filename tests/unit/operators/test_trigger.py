"""The trigger against a server with the behaviour, and the misbehaviour, of Ray's."""

import asyncio
import json
import re
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from operators.ray.jobs import RayEndpoint
from operators.trigger import RayJobTrigger
from tests.ray_stand_in import TOKEN, Job, StandInRay


def trigger(**settings: Any) -> RayJobTrigger:
    made = RayJobTrigger(ray_conn_id="ray_default", submission_id="a", settings={"poll_interval": 0.05}, **settings)
    path, arguments = made.serialize()
    assert path == "operators.trigger.RayJobTrigger"
    return RayJobTrigger(**json.loads(json.dumps(arguments)))


@pytest.fixture
def connected(ray: StandInRay, monkeypatch: pytest.MonkeyPatch) -> Callable[[RayJobTrigger], RayJobTrigger]:
    """Give a trigger the endpoint, which in a triggerer comes from Airflow's API server."""

    async def endpoint(self: RayJobTrigger) -> RayEndpoint:
        return RayEndpoint(f"http://127.0.0.1:{ray.port}", "", {"Authorization": f"Bearer {TOKEN}"})

    monkeypatch.setattr(RayJobTrigger, "_endpoint", endpoint)
    return lambda made: made


async def first_event(made: RayJobTrigger) -> dict[str, Any]:
    async for event in made.run():
        return event.payload
    raise AssertionError("no event")


def run(coroutine: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(coroutine)


def test_the_trigger_survives_serialisation_and_gives_back_what_it_carries(ray: StandInRay, connected):
    ray.jobs["a"] = Job("a", "true", "SUCCEEDED")
    event = run(first_event(connected(trigger(carry={"generation": 3}))))
    assert (event["status"], event["carry"]) == ("SUCCEEDED", {"generation": 3})


def test_a_second_triggerer_goes_on_in_the_log_where_the_first_one_died(
    ray: StandInRay, connected, tmp_path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr("operators.ray.watch._CURSOR_SECONDS", 0.05)
    settings = {"store_uri": tmp_path.as_uri(), "cursor_key": "runs/r/sft/log.json"}
    job = ray.jobs["a"] = Job("a", "true", log="one\ntwo\n")

    async def die_in_the_middle() -> None:
        first = asyncio.create_task(first_event(connected(trigger(**settings))))
        await asyncio.sleep(0.6)
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first

    run(die_in_the_middle())
    job.log += "three\n"
    job.status = "SUCCEEDED"
    run(first_event(connected(trigger(**settings))))
    assert re.findall(r"\] (one|two|three)\s", capsys.readouterr().out) == ["one", "two", "three"]
    assert ray.stops == []


def test_a_cancelled_trigger_leaves_the_job_alone_and_a_killed_one_stops_it(ray: StandInRay, connected):
    ray.jobs["a"] = Job("a", "true")

    async def restart_of_the_triggerer() -> None:
        made = connected(trigger())
        task = asyncio.create_task(first_event(made))
        await asyncio.sleep(0.2)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await made.cleanup()

    run(restart_of_the_triggerer())
    assert ray.stops == []
    run(connected(trigger(cancel_on_kill=False)).on_kill())
    assert ray.stops == []
    run(connected(trigger()).on_kill())
    assert (ray.stops, ray.jobs["a"].status) == (["a"], "STOPPED")
