"""What operators do to a live stack: ask the doctor, scan for open ports, collect garbage."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from infra import processes
from infra.__main__ import settings
from infra.layout import Layout
from infra.stack import Stack
from infra.supervisor import Supervisor
from stages.artifacts.addresses import open_store
from stages.artifacts.manifests import find_manifest, verify
from stages.config.graph import Stage
from stages.config.request import ArtifactRef, run_folder
from tests.listening import Listener, listeners
from tests.live_stack import PIPELINE, REPOSITORY, LiveStack

pytestmark = [pytest.mark.live, pytest.mark.timeout(1800)]

DAY = 86_400


def infra(live: LiveStack, *words: str) -> tuple[int, str]:
    """`python -m infra ...` on this stack, as from its own checkout; exit status and what it says."""
    environment = settings(Stack(Layout(live.home), say=print), of_environment=False)
    done = subprocess.run(
        [sys.executable, "-m", "infra", *words, "--environment"],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    print(done.stdout, done.stderr)
    return done.returncode, done.stdout


# ------------------------------------------------------------------ doctor


def test_the_doctor_finds_nothing_wrong_with_a_stack_that_is_well(live: LiveStack) -> None:
    status, said = infra(live, "doctor")
    assert said.splitlines()[-1] == "nothing is wrong"
    assert status == 0
    marks = {line.split()[0] for line in said.splitlines()[:-1] if not line.startswith(" ")}
    assert marks == {"ok"}, "neither a warning nor anything that was not asked"
    for subject in ("store", "put if absent", "Airflow", "Ray", "MLflow"):
        assert any(line[4:].strip().startswith(subject) for line in said.splitlines()), subject


@pytest.mark.parametrize(("component", "subject"), [("mlflow", "MLflow"), ("ray", "Ray")])
def test_the_doctor_names_what_was_stopped(live: LiveStack, component: str, subject: str) -> None:
    with stopped(live, component):
        status, said = infra(live, "doctor")
    assert status == 1
    assert said.splitlines()[-1] == "1 thing wrong"
    (fault,) = [
        number for number, line in enumerate(said.splitlines()) if subject in line and "nothing listens" in line
    ]
    assert "Start it (`make up`" in said.splitlines()[fault + 1]
    live.wait(f"{component} is well again", lambda: infra(live, "doctor")[0] == 0, seconds=240)


@contextmanager
def stopped(live: LiveStack, component: str) -> Iterator[None]:
    """A component that somebody stopped by hand, so that nothing starts it again; started again at the end."""
    words = ["supervisorctl", "-s", f"unix://{live.record.supervisor_socket}", "stop", component]
    subprocess.run([str(Path(sys.executable).parent / words[0]), *words[1:]], check=True, timeout=120)
    try:
        yield
    finally:
        Supervisor(Layout(live.home), live.record).start(component)


# ------------------------------------------------------------------- ports


@pytest.fixture(scope="module")
def seen(live: LiveStack, first_run: str) -> tuple[str, list[Listener], set[str]]:
    """A run with a vocabulary of its own that nothing came of: its id, every port that was open while it ran, and the
    stages whose jobs ran meanwhile."""
    run_id = live.pipeline("abandoned", last_stage="pretrain", overrides={"tokenize.vocab_size": 500})
    ports: dict[Listener, None] = {}
    jobs: set[str] = set()
    while (state := live.api.run_state(PIPELINE, run_id)) not in ("success", "failed"):
        family = processes.marked(live.record.stack_id)
        ports |= dict.fromkeys(listeners(family))
        jobs |= set(stages_of(family))
        time.sleep(0.5)
    assert state == "success"
    return run_id, list(ports), jobs


def stages_of(family: Iterable[psutil.Process]) -> Iterator[str]:
    """Of the job drivers among these processes: `python -m stages <store>/runs/<run>/<stage>/config.json`."""
    for process in family:
        try:
            words = process.cmdline()
        except psutil.NoSuchProcess:
            continue
        if words[1:3] == ["-m", "stages"]:
            yield words[3].split("/")[-2]


def test_every_port_of_a_stack_at_work_is_on_loopback(live: LiveStack, seen: tuple) -> None:
    """Airflow, Ray, MLflow, their children, and the jobs of stages, which open ports of their own."""
    _, ports, jobs = seen
    assert jobs >= {"tokenize", "pretrain"}, "the scan saw the work itself"
    assert {entry.port for entry in ports} >= set(live.record.ports.values())
    assert [entry for entry in ports if not entry.on_loopback] == []


# ----------------------------------------------------------------- garbage


def test_garbage_collection_takes_what_was_abandoned_and_nothing_else(
    live: LiveStack, first_run: str, seen: tuple
) -> None:
    abandoned, store = seen[0], open_store(live.record.artifact_store)
    root = Path(live.record.artifact_store.removeprefix("file://"))
    kept = [row.result.artifact for row in live.rows(first_run).values() if row.result is not None]
    gone = [live.artifact(abandoned, stage) for stage in (Stage.TOKENIZE, Stage.PRETRAIN)]
    assert len(kept) >= 7
    assert live.artifact(abandoned, Stage.CURATE) in kept, "both runs share the documents"
    assert infra(live, "gc") == (0, "nothing to delete\n"), "all of it is young"

    unfinished = root / "artifacts" / "tokens" / ("ab" * 32) / "a.bin"
    half = root / "artifacts" / "tokens" / ("cd" * 32) / f".b.bin.{'0' * 32}"
    for path in (unfinished, half):
        path.parent.mkdir(parents=True)
        path.write_bytes(b"somebody was killed here")
    age([folder_of(root, ref) for ref in (*kept, *gone)], days=40)
    age([root / "runs" / run_folder(PIPELINE, run_id) for run_id in (first_run, abandoned)], days=40)
    age([unfinished.parent, half.parent], days=2)

    status, listed = infra(live, "gc")
    assert status == 0
    named = {line.split("  (")[0].split("  ")[-1] for line in listed.splitlines()[:-1]}
    assert named == {
        *(folder_of(root, ref).relative_to(root).as_posix() for ref in gone),
        unfinished.parent.relative_to(root).as_posix(),
        half.with_name("b.bin").relative_to(root).as_posix(),
    }
    assert "nothing was deleted" in listed.splitlines()[-1]
    assert unfinished.exists(), "it only looks unless told to delete"

    status, said = infra(live, "gc", "--delete")
    assert (status, said.splitlines()[-1].startswith("deleted: ")) == (0, True)
    assert not unfinished.exists()
    assert not half.exists()
    assert [ref for ref in gone if find_manifest(store, ref.kind, ref.fingerprint)] == []
    for ref in kept:
        manifest = find_manifest(store, ref.kind, ref.fingerprint)
        assert manifest is not None, ref
        verify(store, manifest, hashes=True)
    assert infra(live, "gc") == (0, "nothing to delete\n")


def folder_of(root: Path, ref: ArtifactRef) -> Path:
    return root / "artifacts" / ref.kind / ref.fingerprint


def age(folders: Iterable[Path], *, days: float) -> None:
    """Let everything there be last written so many days ago."""
    then = time.time() - days * DAY
    for folder in folders:
        assert folder.is_dir(), folder
        for path in folder.rglob("*"):
            os.utime(path, (then, then))
