"""The watcher of a prefix against real folders; Airflow's state store is a dictionary with the same methods."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest

from operators.watcher import PrefixTrigger, list_prefix

POLL = 0.02


class StateStore:
    """What `asset_state_store` is to a watcher: the values outlive the trigger."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}

    async def aget(self, key: str, default: Any = None) -> Any:
        return self.values.get(key, default)

    async def aset(self, key: str, value: Any) -> None:
        self.values[key] = value


def watch(folder: Path, state: StateStore | None, *changes: Callable[[], object], polls: int = 8) -> list[str]:
    """Run the trigger over a series of changes with some polls after each; return the digests it reported."""

    async def run() -> list[str]:
        trigger = PrefixTrigger(folder.as_uri(), POLL)
        trigger.asset_state_store = cast(Any, state)
        seen: list[str] = []

        async def collect() -> None:
            async for event in trigger.run():
                seen.append(event.payload["digest"])

        task = asyncio.create_task(collect())
        for change in (lambda: None, *changes):
            change()
            await asyncio.sleep(polls * POLL)
        task.cancel()
        return seen

    return asyncio.run(run())


def test_a_change_fires_once_and_only_when_it_is_over(tmp_path: Path):
    state = StateStore()
    seen = watch(tmp_path, state, lambda: (tmp_path / "a.txt").write_text("one"))
    assert seen == [list_prefix(tmp_path.as_uri()).digest]

    async def growing() -> list[str]:
        trigger = PrefixTrigger(tmp_path.as_uri(), POLL)
        trigger.asset_state_store = cast(Any, state)
        reported: list[str] = []

        async def collect() -> None:
            async for event in trigger.run():
                reported.append(event.payload["digest"])

        task = asyncio.create_task(collect())
        with (tmp_path / "b.txt").open("w") as file:
            for _ in range(30):
                file.write("more")
                file.flush()
                await asyncio.sleep(POLL / 4)
        assert reported == []
        await asyncio.sleep(8 * POLL)
        task.cancel()
        return reported

    assert asyncio.run(growing()) == [list_prefix(tmp_path.as_uri()).digest]


def test_a_restart_neither_repeats_what_was_reported_nor_misses_what_came_meanwhile(tmp_path: Path):
    state = StateStore()
    (tmp_path / "a.txt").write_text("one")
    assert len(watch(tmp_path, state)) == 1
    assert watch(tmp_path, state) == []
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b.txt").write_text("two")
    assert len(watch(tmp_path, state)) == 1
    (tmp_path / "a.txt").write_text("changed")
    assert len(watch(tmp_path, state)) == 1


def test_a_triggerer_that_dies_before_the_event_is_stored_fires_again(tmp_path: Path):
    state = StateStore()
    (tmp_path / "a.txt").write_text("one")

    async def first_event() -> str:
        trigger = PrefixTrigger(tmp_path.as_uri(), POLL)
        trigger.asset_state_store = cast(Any, state)
        async for event in trigger.run():
            return event.payload["digest"]
        raise AssertionError

    assert [asyncio.run(first_event())] == watch(tmp_path, state)


def test_an_empty_or_absent_prefix_and_hidden_files_are_no_news(tmp_path: Path):
    absent = tmp_path / "absent"
    assert watch(absent, StateStore(), absent.mkdir, lambda: (absent / ".part").write_text("x")) == []


def test_an_outage_of_the_store_is_waited_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "a.txt").write_text("one")
    calls = iter(range(1000))

    def flaky(uri: str):
        if next(calls) < 3:
            raise OSError("connection refused")
        return list_prefix(uri)

    monkeypatch.setattr("operators.watcher.list_prefix", flaky)
    assert len(watch(tmp_path, None)) == 1


def test_it_survives_the_way_through_airflows_database(tmp_path: Path):
    from airflow.sdk._shared.module_loading import import_string

    path, settings = PrefixTrigger(tmp_path.as_uri(), 5.0).serialize()
    again = import_string(path)(**settings)
    assert (again.uri, again.poll_interval) == (tmp_path.as_uri(), 5.0)


@pytest.mark.integration
def test_a_prefix_in_s3_is_listed_with_its_versions(s3_store: str):
    from stages.artifacts.addresses import open_store

    store = open_store(f"{s3_store}/raw")
    empty = list_prefix(f"{s3_store}/raw")
    store.write_bytes("a/one.txt", b"one")
    open_store(s3_store).write_bytes("raw-other/two.txt", b"a neighbour")
    one = list_prefix(f"{s3_store}/raw")
    store.write_bytes("a/one.txt", b"two")
    assert (empty.num_objects, one.num_objects, one.num_bytes) == (0, 1, 3)
    assert len({empty.digest, one.digest, list_prefix(f"{s3_store}/raw").digest}) == 3
