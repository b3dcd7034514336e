"""Scratch folders: nobody else's, nothing left over, nothing in use removed."""

import os
import signal
import subprocess
import sys
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
    monkeypatch.delenv("ATHANOR_SCRATCH")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    scratch_home().mkdir(mode=0o755)
    with scratch_folder():
        pass
    assert scratch_home().stat().st_mode & 0o777 == 0o700
