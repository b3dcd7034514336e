"""Scratch folders: no other user's, nothing left over, nothing in use removed."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from stages.config.errors import ConfigError
from stages.job.scratch import scratch_folder, scratch_home, sweep_scratch

ATTEMPT = """
import time
from stages.job.scratch import scratch_folder
with scratch_folder() as folder:
    (folder / "weights").write_bytes(b"x" * 1000)
    print(folder, flush=True)
    time.sleep(60)
"""


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ATHANOR_SCRATCH", str(tmp_path / "scratch"))
    return scratch_home()


def attempt() -> tuple[subprocess.Popen[str], Path]:
    process = subprocess.Popen([sys.executable, "-c", ATTEMPT], stdout=subprocess.PIPE, text=True)
    assert process.stdout
    return process, Path(process.stdout.readline().strip())


def test_what_a_killed_attempt_left_is_removed_and_what_another_uses_is_not(home: Path) -> None:
    killed, left = attempt()
    alive, used = attempt()
    try:
        killed.send_signal(signal.SIGKILL)
        killed.wait()
        assert left.is_dir()
        (home / "cache").mkdir()
        assert sweep_scratch(home) == 1
        assert not left.exists()
        assert (used / "weights").exists()
        assert (home / "cache").is_dir()
    finally:
        alive.kill()
        alive.wait()
    with scratch_folder() as folder:  # the next attempt clears up, too
        assert sorted(home.glob("attempt-*")) == [folder]


@pytest.mark.skipif(os.getuid() != 0, reason="only root can make another user's link")
def test_another_users_link_to_a_folder_of_ours_is_refused(home: Path, tmp_path: Path) -> None:
    """Its owner may turn it elsewhere while we work."""
    (tmp_path / "ours").mkdir()
    home.symlink_to(tmp_path / "ours")
    with scratch_folder():
        pass  # our own link may lead to a larger disk
    os.lchown(home, 65534, 65534)
    with pytest.raises(ConfigError, match="is a link that belongs to user 65534"), scratch_folder():
        pass
    assert list((tmp_path / "ours").iterdir()) == []
    assert sweep_scratch(home) == 0


@pytest.mark.skipif(os.getuid() != 0, reason="only root can make another user's folder")
def test_a_link_of_ours_to_another_users_folder_is_refused(home: Path, tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    os.chown(tmp_path / "theirs", 65534, 65534)
    home.symlink_to(tmp_path / "theirs")
    with pytest.raises(ConfigError, match=r"leads to .*theirs, which belongs to user 65534"), scratch_folder():
        pass


def test_the_default_folder_is_closed_to_others_and_a_named_one_keeps_its_mode(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home.mkdir(mode=0o755)
    with scratch_folder() as folder:
        assert folder.stat().st_mode & 0o077 == 0
    assert home.stat().st_mode & 0o777 == 0o755
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    for unset in ("ATHANOR_SCRATCH", "unset"):
        monkeypatch.setenv("ATHANOR_SCRATCH", "")
        monkeypatch.delenv(unset, raising=False)
        scratch_home().mkdir(mode=0o755)
        with scratch_folder():
            pass
        assert scratch_home().stat().st_mode & 0o777 == 0o700
        scratch_home().rmdir()


def test_a_disk_without_locks_ends_no_stage_and_keeps_what_is_in_use(
    home: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """NFS grants an exclusive lock only to who may write, and a folder cannot be opened for that."""
    real = fcntl.flock

    def refused(handle: int, operation: int) -> None:
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))

    monkeypatch.setattr(fcntl, "flock", refused)
    with scratch_folder() as folder:
        assert folder.is_dir()
        assert "has no locks" in caplog.text
        monkeypatch.setattr(fcntl, "flock", real)  # another machine may mount it with locks
        assert sweep_scratch(home) == 0
        assert folder.is_dir()
    assert list(home.iterdir()) == []


def test_a_folder_that_could_not_be_named_is_not_left_behind(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(path: Path, target: Path) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(Path, "rename", refused)
    with pytest.raises(OSError, match=r"\[Errno 5\]"), scratch_folder():
        pass
    assert list(home.iterdir()) == []


@pytest.mark.parametrize("name", ["stage-abc", ".new-abc"])
def test_what_no_lock_tells_of_is_removed_when_nothing_in_it_has_changed_for_a_month(home: Path, name: str) -> None:
    weights = home / name / "output" / "weights"
    weights.parent.mkdir(parents=True)
    weights.write_text("x")
    then = time.time() - 31 * 24 * 3600
    for path in (weights.parent, weights.parent.parent):
        os.utime(path, (then, then))
    assert sweep_scratch(home) == 0  # a file in it is new
    os.utime(weights, (then, then))
    assert sweep_scratch(home) == 1
    assert list(home.iterdir()) == []
