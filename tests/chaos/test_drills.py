"""The drills of docs/DRILLS.md for store, workers and clock, a test a row: a real pretraining through a real
Airflow and a real Ray, with its store on a real S3 server behind a line of ours.

Whatever happens, the artifact is that of an undisturbed run, bit for bit. First S3 is away for everybody; then drills
that hurt nobody else run some at a time, each in a store of its own.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from stages.artifacts.addresses import open_store, split_artifact_uri
from stages.artifacts.deletion import delete
from stages.artifacts.lease import LeaseTimes
from stages.artifacts.manifests import find_intact
from stages.artifacts.retention import Policy, find
from tests.chaos.drills import Drill, World, address, drill_world, note, write_line
from tests.chaos.machine import Clock, flip_one_byte, require_memory_cgroups, small_disk, starve
from tests.chaos.stack import REPOSITORY
from tests.s3 import best_kind
from tests.small_world import make_tokens
from tests.unit.artifacts.test_lease import IDENTITY, held, publish_empty

pytestmark = [pytest.mark.chaos, pytest.mark.slow, pytest.mark.integration, pytest.mark.timeout(1800)]

AT_ONCE = 3
AWAY_SECONDS = 60
ENGINE = r"checkpoints/\w+/step-000000{step}/engine"
IN_THE_MIDDLE = 2 * 2**20
"Bytes of a checkpoint's part, or of a model, that have passed when the fault strikes."
LONGEST_WAIT = 400
WAITS = "which builds it"
"Says a run that waits for another's lease."
WEIGHTS = r"artifacts/base-model/\w+/model.safetensors"

Suffered = tuple[Drill, float]
"""A run that was disturbed and has ended well, and the seconds from the fault until then."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[World]:
    server = request.getfixturevalue(f"{best_kind()}_server")
    with drill_world(tmp_path_factory.mktemp("drills"), server) as made:
        yield made


# ---- S3 is away for everybody


@dataclass(frozen=True)
class Outage:
    checkpointing: Drill
    twins: tuple[Drill, Drill]
    "One publishes, one waits for it."
    seconds: float


@pytest.fixture(scope="module")
def outage(world: World) -> Outage:
    """S3 is away for a minute, for Airflow and all jobs, while one run saves, one publishes and one waits for that."""
    holds = [
        world.line.hold(f"PUT .*/down-saving/{ENGINE.format(step=16)}", after_bytes=IN_THE_MIDDLE),
        world.line.hold(f"PUT .*/down-publishing/{WEIGHTS}", after_bytes=IN_THE_MIDDLE),
    ]
    saving = world.start("down-saving", execution={"num_workers": 1})
    twins = world.start("down-publishing"), world.start("down-publishing")
    for hold in holds:
        assert hold.reached.wait(LONGEST_WAIT)
    world.stack.wait("one of the twins waits", lambda: any(WAITS in twin.job_log() for twin in twins))
    since = time.monotonic()
    world.line.cut()
    for hold in holds:
        hold.release(breaks=True)
    time.sleep(AWAY_SECONDS)
    assert {drill.row.state() for drill in (saving, *twins)} == {"deferred"}
    world.line.mend()
    for drill in (saving, *twins):
        drill.row.finish()
    return Outage(saving, twins, time.monotonic() - since)


def test_s3_is_down_during_a_checkpoint(outage: Outage, undisturbed: str):
    drill = outage.checkpointing
    assert drill.row.statuses() == ["SUCCEEDED"]
    sees = "nothing but warnings in the job's log: the task stays deferred, the first attempt succeeds"
    note(drill, "S3 down for 60 s during a checkpoint", sees=sees, seconds=outage.seconds, undisturbed=undisturbed)


def test_s3_is_down_during_a_publication_that_another_run_waits_for(outage: Outage, undisturbed: str):
    assert sorted(drill.result().hit for drill in outage.twins) == [False, True], "it was computed twice"
    for drill, does in zip(outage.twins, ("publishes", "waits for it"), strict=True):
        assert drill.row.statuses() == ["SUCCEEDED"]
        note(
            drill,
            f"S3 down for 60 s during a publication: the run that {does}",
            sees="the same",
            seconds=outage.seconds,
            undisturbed=undisturbed,
        )


# ---- one run is hit; a function does it, and returns when the run has ended well

Struck = tuple[Drill, float]
"""The run, and when the fault struck."""


def slow_line(world: World) -> Struck:
    world.slow_line.delay_seconds, world.slow_line.bytes_per_second = 0.15, 2 * 2**20
    drill = world.start("slow", before=f"env AWS_ENDPOINT_URL={address(world.slow_line)}")
    drill.row.finish()
    assert drill.row.statuses() == ["SUCCEEDED"]
    return drill, drill.started


def half_an_upload(world: World) -> Struck:
    """The second part of a checkpoint breaks off, and is sent again; with that of the next one its process dies."""
    second_part = rf"PUT .*/halves/{ENGINE}\S*partNumber=2"
    broken, fatal = (world.line.hold(second_part.format(step=step), after_bytes=IN_THE_MIDDLE) for step in ("08", "16"))
    drill = world.start("halves")
    assert broken.reached.wait(LONGEST_WAIT)
    broken.release(breaks=True)
    assert fatal.reached.wait(LONGEST_WAIT)
    (half,) = drill.store.unfinished()
    assert "step-00000016" in half.key, "what broke off before was not finished"
    since = time.monotonic()
    drill.driver().kill()
    fatal.release(breaks=True)
    drill.row.finish()
    assert drill.row.statuses() == ["FAILED", "SUCCEEDED"]
    assert "resumed from the checkpoint of step 8 of 24" in drill.row.task_log()
    at_once = Policy(unfinished_hours=0)
    (waste,) = [entry for entry in find(drill.store, set, at_once) if entry.what == "upload"]
    assert waste.key == half.key
    assert delete(drill.store, [waste], set, at_once) == [waste]
    assert [*drill.store.unfinished()] == []
    return drill, since


def wrong_keys(world: World) -> Struck:
    keys = world.stack.home / "keys"
    before = f"env -u AWS_ACCESS_KEY_ID -u AWS_SECRET_ACCESS_KEY AWS_SHARED_CREDENTIALS_FILE={keys}"

    def hand_out(secret: str) -> None:
        keys.write_text(f"[default]\naws_access_key_id = {world.server.access_key}\naws_secret_access_key = {secret}\n")

    hand_out("mistyped")
    drill = world.start("keys", before=before)
    assert drill.row.finish() == "failed"
    assert drill.row.statuses() == ["FAILED"], "retried, though no retry can help"
    assert "the secret key does not belong to the access key" in drill.told()
    assert "Check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY" in drill.told()
    assert "botocore" not in drill.told(), "the reason is hidden among other lines"
    since = time.monotonic()
    hand_out(world.server.secret_key)
    return again(drill), since


def full_bucket(world: World) -> Struck:
    bucket = world.server.new_bucket()
    hold = world.line.hold(f"PUT .*/full/{ENGINE.format(step='08')}")
    drill = world.start("full", bucket=bucket, execution={"max_retries": 0})
    assert hold.reached.wait(LONGEST_WAIT)
    since = time.monotonic()
    world.server.limit(bucket, 1)
    hold.release()
    assert drill.row.finish() == "failed"
    assert drill.row.statuses() == ["FAILED"]
    assert "the quota is used up" in drill.told()
    assert "`python -m infra gc`" in drill.told()
    world.server.limit(bucket, None)
    return again(drill), since


def damaged_input(world: World) -> Struck:
    """Its reader names the file, and the stage that made it does not pass for done any more."""
    copy, damaged = world.copy(world.tokens, "input"), "documents/train/tokens-00000.npy"
    store, key = split_artifact_uri(copy.uri)
    flip_one_byte(store, f"{key}/{damaged}")
    elsewhere = world.stack.home / "elsewhere"  # a machine that has no copy of it
    drill = world.start("input", tokens=copy, before=f"env ATHANOR_SCRATCH={elsewhere}", execution={"max_retries": 0})
    assert drill.row.finish() == "failed"
    assert f"{copy.uri}/{damaged} does not have the content that its manifest records" in drill.told()
    assert "Clear the stage that produced it" in drill.told()
    assert find_intact(store, copy.kind, copy.fingerprint) is None, "its stage would be a hit, and damaged for ever"
    world.copy(world.tokens, "input")  # what its stage does
    return again(drill), drill.started


def damaged_checkpoint(world: World) -> Struck:
    hold = world.line.hold(f"PUT .*/flipped/{WEIGHTS}")
    drill = world.start("flipped")
    assert hold.reached.wait(LONGEST_WAIT)
    (newest,) = [key for key in drill.store.list("checkpoints") if "step-00000016/engine" in key]
    flip_one_byte(drill.store, newest)
    since = time.monotonic()
    drill.driver().kill()
    hold.release(breaks=True)
    drill.row.finish()
    assert drill.row.statuses() == ["FAILED", "SUCCEEDED"]
    assert "step-00000016 is damaged and passed over" in drill.row.task_log()
    assert "resumed from the checkpoint of step 8 of 24" in drill.row.task_log()
    return drill, since


def no_memory(world: World) -> Struck:
    require_memory_cgroups()
    hold = world.line.hold(f"PUT .*/memory/{ENGINE.format(step=16)}")
    drill = world.start("memory", execution={"num_workers": 1})
    assert hold.reached.wait(LONGEST_WAIT)
    since = time.monotonic()
    try:
        starve(drill.worker())
    finally:
        hold.release(breaks=True)
    drill.row.finish()
    assert drill.row.statuses() == ["FAILED", "SUCCEEDED"]
    assert "a training worker died" in drill.told()
    assert "check with `dmesg` whether the kernel" in drill.told()
    return drill, since


def full_disk(world: World) -> Struck:
    with small_disk(world.stack.home / "disk", 16) as disk:
        before = f"env ATHANOR_SCRATCH={disk.folder} TMPDIR={disk.folder}"
        drill = world.start("disk", before=before, execution={"max_retries": 0})
        since = time.monotonic()
        assert drill.row.finish() == "failed"
        assert "a disk of the worker's machine is full" in drill.told()
        assert f"{disk.folder} (ATHANOR_SCRATCH)" in drill.told()
        disk.grow(500)
        return again(drill), since


def wrong_clock(world: World) -> Struck:
    clock = Clock(world.stack.home / "clock")
    clock.ahead(400)
    before = "env " + " ".join(f"{name}={shlex.quote(value)}" for name, value in clock.environment.items())
    drill = world.start("clock", before=before, execution={"max_retries": 0})
    since = time.monotonic()
    assert drill.row.finish() == "failed"
    assert "the clocks of this machine and of the server differ too much" in drill.told()
    assert "Set this machine's clock" in drill.told()
    clock.ahead(0)
    return again(drill), since


def twins(world: World) -> Struck:
    drills = [world.start("twins"), world.start("twins")]
    assert [drill.row.finish() for drill in drills] == ["success", "success"]
    assert [drill.row.statuses() for drill in drills] == [["SUCCEEDED"], ["SUCCEEDED"]]
    assert sorted(drill.result().hit for drill in drills) == [False, True], "it was computed twice"
    assert any(WAITS in drill.job_log() for drill in drills)
    assert drills[0].digest() == drills[1].digest()
    return drills[0], drills[0].started


def again(drill: Drill) -> Drill:
    """The user has done what the task said, and clears it."""
    drill.row.clear()
    drill.row.stack.wait(f"{drill.name} begins anew", lambda: drill.row.run_state() not in ("success", "failed"))
    assert drill.row.finish() == "success"
    return drill


def calm(world: World) -> Struck:
    """Nothing happens."""
    drill = world.start("calm")
    assert drill.row.finish() == "success"
    return drill, drill.started


DRILLS: tuple[Callable[[World], Struck], ...] = (
    calm,
    no_memory,
    full_bucket,
    half_an_upload,
    damaged_checkpoint,
    full_disk,
    damaged_input,
    wrong_keys,
    wrong_clock,
    slow_line,
    twins,
)


@pytest.fixture(scope="module")
def drills(world: World, request: pytest.FixtureRequest) -> Iterator[dict[str, Future[Suffered]]]:
    """Some at a time; with `-k`, those that are read."""
    tests = [item for item in request.session.items if isinstance(item, pytest.Function)]
    if any("outage" in test.fixturenames for test in tests):
        request.getfixturevalue("outage")
    selected = {test.callspec.params.get("name") for test in tests if hasattr(test, "callspec")}

    def suffer(drill: Callable[[World], Struck]) -> Suffered:
        struck, since = drill(world)
        return struck, time.monotonic() - since

    with ThreadPoolExecutor(AT_ONCE) as threads:
        chosen = [drill for drill in DRILLS if drill is calm or drill.__name__ in selected]
        yield {drill.__name__: threads.submit(suffer, drill) for drill in chosen}


@pytest.fixture(scope="module")
def undisturbed(drills: dict[str, Future[Suffered]]) -> str:
    """Digest of what every drill must end with."""
    drill, _ = drills["calm"].result()
    return drill.digest()


SEEN: dict[str, tuple[str, str]] = {
    "slow_line": (
        "S3 slow: 150 ms each way, 2 MiB/s a connection",
        "nothing: one attempt, which takes longer",
    ),
    "half_an_upload": (
        "a checkpoint's multipart upload cut off half-way, and the job's process killed half-way through the next",
        "nothing of the cut; then one failed attempt, `The stage's process was killed (signal 9)`, and the retry "
        "resumes from the previous checkpoint; `make gc` lists and removes the unfinished upload",
    ),
    "wrong_keys": (
        "wrong secret key",
        "failed without a retry: `the secret key does not belong to the access key`, and what to check; then cleared",
    ),
    "full_bucket": (
        "bucket quota used up during training",
        "`the quota is used up`, raise it or `python -m infra gc`; cleared, it resumes from its checkpoint",
    ),
    "damaged_input": (
        "a byte of an input flipped in the store",
        "refused with the file's name; the stage that made it is no longer a hit, so clearing it builds it again",
    ),
    "damaged_checkpoint": (
        "a byte of the newest checkpoint flipped, then the job's process killed",
        "one failed attempt; the retry says that this checkpoint is damaged and resumes from the previous one",
    ),
    "no_memory": (
        "training worker killed by the kernel's OOM killer",
        "one failed attempt, `a training worker died`, with a hint about memory; the retry resumes from the checkpoint",
    ),
    "full_disk": (
        "disk full on the worker",
        "`a disk of the worker's machine is full`, with its folders; then cleared",
    ),
    "wrong_clock": (
        "worker's clock 400 days ahead",
        "`the clocks of this machine and of the server differ too much`: `Set this machine's clock`; then cleared",
    ),
    "twins": (
        "two identical runs at once",
        "the second says which run it waits for, then takes the artifact: computed once",
    ),
}
"""Drill -> the fault, and what the user sees, which the drill itself asserts."""


@pytest.mark.parametrize("name", SEEN)
def test_a_drill_ends_as_if_nothing_had_been(name: str, drills: dict[str, Future[Suffered]], undisturbed: str):
    drill, seconds = drills[name].result()
    fault, sees = SEEN[name]
    note(drill, fault, sees=sees, seconds=seconds, undisturbed=undisturbed)


# ---- one machine's clock is wrong, and others live


LOOK = """
import sys, threading, time
from stages.artifacts.lease import LeaseTimes, acquire
from stages.artifacts.retention import Policy, find
from stages.artifacts.addresses import open_store
from tests.unit.artifacts.test_lease import IDENTITY, KIND, owner
time.sleep = threading.Event().wait  # libfaketime refuses the moments until which Python sleeps
store = open_store(sys.argv[1])
print("it is", time.time())
print("waste:", [entry.key for entry in find(store, set, Policy(nothing_registered=True))])
times = LeaseTimes(beat_seconds=0.5, stale_seconds=5, poll_seconds=0.2)
print("lease:", acquire(store, kind=KIND, fingerprint=IDENTITY, owner=owner("waiter"), times=times))
"""
"""What a machine does that collects garbage, and then waits for another's lease."""


def look(store_uri: str, clock: Clock) -> subprocess.Popen[str]:
    clock.ahead(400)
    return subprocess.Popen(
        [sys.executable, "-c", LOOK, store_uri],
        env={**os.environ, **clock.environment, "PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_a_wrong_clock_makes_nothing_that_lives_look_expired(tmp_path: Path):
    """In a folder that several machines share; its files are stamped by a clock that is right."""
    since, store = time.monotonic(), open_store((tmp_path / "store").as_uri())
    make_tokens(tmp_path, store.root_uri)
    store.write_bytes(f"checkpoints/{IDENTITY}/step-00000008/checkpoint.json", b"{}")
    with held(store, "holder", LeaseTimes(beat_seconds=0.5)):
        looking = look(store.root_uri, Clock(tmp_path / "clock"))
        time.sleep(25)  # its start and several times its patience
        assert looking.poll() is None, looking.communicate()[0]
        publish_empty(store)
    said, _ = looking.communicate(timeout=60)
    assert float(re.findall(r"it is (\S+)", said)[0]) > time.time() + 399 * 86_400
    assert "waste: []" in said
    assert "lease: None" in said, "it took over from one that lived"
    fault = (
        "clock of the machine that collects garbage, and then waits for another's lease, 400 days ahead; shared folder"
    )
    write_line(fault, "nothing: no garbage is found, no lease taken over", equal="-", seconds=time.monotonic() - since)


def test_s3_refuses_a_wrong_clock_before_anything_is_called_garbage(world: World, tmp_path: Path):
    since = time.monotonic()
    said, _ = look(f"s3://{world.bucket}/world", Clock(tmp_path / "clock")).communicate(timeout=120)
    assert "StoreError: s3://" in said
    assert "the clocks of this machine and of the server differ too much" in said
    assert "waste" not in said
    sees = "refused before it looks: `the clocks of this machine and of the server differ too much`"
    write_line("the same with S3", sees, equal="-", seconds=time.monotonic() - since)
