"""`make up` and `make down` on what they find: damaged records, copies, other users, full disks. Processes are real
ones that only carry a stack's marks; no component is started."""

import errno
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from infra import stack as stack_module
from infra.__main__ import main
from infra.layout import Layout, StackRecord
from infra.ports import PREFERRED
from infra.processes import marking, stacks_at
from infra.stack import Stack, StackError


@pytest.fixture(autouse=True)
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATHANOR_SCRATCH", str(tmp_path / "scratch"))
    monkeypatch.delenv("ARTIFACT_STORE", raising=False)


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def stack(tmp_path: Path, said: list[str]) -> Stack:
    layout = Layout(tmp_path / "checkout")
    layout.home.mkdir(parents=True)
    return Stack(layout, say=said.append)


@pytest.fixture
def running(stack: Stack) -> Iterator[subprocess.Popen[bytes]]:
    """A process of this stack, whose record is there."""
    record = StackRecord(
        stack_id=f"test-{os.getpid()}",
        ports=dict(PREFERRED),
        runtime_dir=str(stack.layout.home / "run"),
        artifact_store=stack.layout.store.as_uri(),
        home=str(stack.layout.home),
        checkout=str(stack.layout.checkout),
    )
    record.save(stack.layout)
    with started(marking(record.stack_id, record.home)) as process:
        yield process
        process.kill()


def started(environment: dict[str, str]) -> subprocess.Popen[bytes]:
    code = "print(flush=True); import time; time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, **environment}, stdout=subprocess.PIPE)
    assert process.stdout
    process.stdout.readline()
    return process


@pytest.mark.parametrize("damage", ["", "{", '{"stack_id": ""}', None])
def test_down_finds_what_runs_without_a_record(
    stack: Stack, running: subprocess.Popen[bytes], said: list[str], damage: str | None
) -> None:
    if damage is None:
        stack.layout.record.unlink()
    else:
        stack.layout.record.write_text(damage)
    stack.down()
    running.wait(timeout=5)
    assert said[-1] == "stopped"
    stack.down()
    assert said[-1] == "nothing to stop"


def test_down_finds_a_stack_of_an_older_version_without_a_record(stack: Stack, said: list[str]) -> None:
    marks = {"ATHANOR_STACK": f"old-{os.getpid()}", "AIRFLOW_HOME": str(stack.layout.airflow)}
    with started(marks) as process:
        assert stacks_at(stack.layout.home) == {marks["ATHANOR_STACK"]}
        stack.down()
        process.wait(timeout=5)


def test_down_stops_a_stack_whose_folder_was_deleted(stack: Stack, running: subprocess.Popen[bytes]) -> None:
    shutil.rmtree(stack.layout.home)
    stack.down()
    running.wait(timeout=5)


def test_a_copy_of_a_checkout_leaves_the_original_alone(
    stack: Stack, running: subprocess.Popen[bytes], said: list[str], tmp_path: Path
) -> None:
    shutil.copytree(stack.layout.checkout, tmp_path / "copy")
    copied = Stack(Layout(tmp_path / "copy"), say=said.append)
    copied.down()
    assert said == ["nothing to stop"]
    assert running.poll() is None
    with pytest.raises(StackError, match="does not run"):
        copied.record()


def test_a_checkout_that_was_moved_still_stops_its_stack(
    stack: Stack, running: subprocess.Popen[bytes], said: list[str], tmp_path: Path
) -> None:
    stack.layout.checkout.rename(tmp_path / "moved")
    Stack(Layout(tmp_path / "moved"), say=said.append).down()
    running.wait(timeout=5)


def test_a_start_on_a_full_disk_is_refused_in_words(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000))  # pyright: ignore
    with pytest.raises(StackError, match=r"has 1000 B left, a start needs .*ATHANOR_HOME"):
        stack.up()
    assert not stack.layout.record.exists()


@pytest.mark.parametrize("free", [0, 10**9])
def test_a_component_that_failed_on_a_full_disk_is_told_with_the_disk(
    free: int, stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its log is empty then."""
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9 - free, free))  # pyright: ignore
    said = str(stack._broken("scheduler", "no heartbeat yet"))
    assert said.startswith("scheduler failed: no heartbeat yet\n")
    assert ("has 0 B left; make room, then run `make up` again" in said) == (free == 0)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can mount")
def test_a_disk_that_is_really_full_ends_in_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "none", disk], capture_output=True, check=False
    ).returncode:
        pytest.skip("no right to mount")
    try:
        (disk / "filling").write_bytes(b"x" * shutil.disk_usage(disk).free)
        monkeypatch.setenv("ATHANOR_HOME", str(disk))
        monkeypatch.setattr("sys.argv", ["infra", "up"])
        monkeypatch.setattr(stack_module, "LEAST_FREE_BYTES", 0)
        assert main() == 1
        assert "No space left on device" in capsys.readouterr().err
    finally:
        subprocess.run(["umount", disk], check=True)


def test_another_checkout_with_the_same_athanor_home_is_not_taken_for_this_one(
    stack: Stack, running: subprocess.Popen[bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("infra.supervisor.Supervisor.answers", lambda _: True)
    other = Stack(Layout(tmp_path / "other", stack.layout.checkout), say=print)
    with pytest.raises(StackError, match=r"runs the code of .*checkout, this is .*other"):
        other.up()


def test_two_starts_on_one_machine_wait_for_each_other(
    stack: Stack, said: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise both find the same ports free."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    code = (
        "import sys, time; from pathlib import Path; from infra.stack import Stack; from infra.layout import Layout\n"
        "with Stack(Layout(Path('/nowhere')), print)._starting():\n    print(flush=True); time.sleep(0.5)"
    )
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    with subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE) as first:
        assert first.stdout
        first.stdout.readline()
        begin = time.monotonic()
        with stack._starting():
            assert time.monotonic() - begin > 0.2
    assert said == ["another checkout is starting its stack; waiting for it"]


@pytest.mark.skipif(os.getuid() != 0, reason="only root can make another user's files")
@pytest.mark.parametrize("planted", ["file", "link"])
def test_a_lock_that_another_user_planted_keeps_nobody_waiting(
    planted: str, stack: Stack, said: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    lock = tmp_path / f"athanor-{os.getuid()}.starting"
    lock.touch() if planted == "file" else lock.symlink_to(tmp_path / "made")
    os.lchown(lock, 65534, 65534)
    with stack._starting():
        assert not (tmp_path / "made").exists()
    assert said == []


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.ENOSPC])
def test_an_unwritable_place_is_told_with_the_way_out(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(stack: Stack) -> None:
        raise OSError(number, os.strerror(number), "/state/x")

    monkeypatch.setenv("ATHANOR_HOME", str(tmp_path))
    monkeypatch.setattr("sys.argv", ["infra", "up"])
    monkeypatch.setattr(Stack, "up", refuse)
    assert main() == 1
    said = capsys.readouterr().err
    assert said.startswith(f"error: /state/x: {os.strerror(number)}; ")
    assert "set ATHANOR_HOME to a folder" in said


def test_garbage_collection_without_a_stack_says_how_to_get_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ATHANOR_HOME", str(tmp_path))
    monkeypatch.setattr("sys.argv", ["infra", "gc"])
    assert main() == 1
    said = capsys.readouterr()
    assert not said.out
    assert "ARTIFACT_STORE is not set and no local stack runs; run `make up`" in said.err


@pytest.mark.parametrize("command", ["up", "status", "gc"])
def test_an_interrupted_command_speaks_of_the_stack_only_when_it_changes_it(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setenv("ATHANOR_HOME", str(tmp_path))
    monkeypatch.setattr("sys.argv", ["infra", command])
    monkeypatch.setattr(Stack, "up" if command == "up" else "record", interrupted)
    assert main() == 130
    said = capsys.readouterr().err
    assert said.startswith("interrupted")
    assert ("`make up` continues" in said) == (command == "up")
