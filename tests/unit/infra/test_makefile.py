"""The Makefile in checkouts with awkward names; a small script plays the Python of the virtual environment."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.places import REPOSITORY

ODD = ["a b", "it's", "100%", "$HOME", "$(x)", 'say "hi"', "ü", "a;b", "#a", "back\\slash", "`id`", "a & b"]
RECORDER = '#!/bin/sh\nprintf "%s|" "$(pwd)" "${ATHANOR_HOME-}" "$@"; echo\n'


@pytest.fixture(autouse=True)
def no_home(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ATHANOR_HOME", "MAKEFLAGS", "MFLAGS", "MAKELEVEL"):
        monkeypatch.delenv(name, raising=False)


def checkout(folder: Path, state: Path | None = None) -> Path:
    """The files that the Makefile looks at, and a set-up that has been done."""
    folder.mkdir(parents=True)
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(REPOSITORY / name, folder)
        os.utime(folder / name, (1, 1))
    python = (state or folder) / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(RECORDER)
    python.chmod(0o755)
    (python.parent.parent / ".athanor-setup").touch()
    return folder


def make(folder: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["make", *words], cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("name", ODD)
def test_every_path_reaches_the_programs_as_it_is(name: str, tmp_path: Path) -> None:
    folder = checkout(tmp_path / name)
    for target in ("up", "down", "status", "doctor"):
        done = make(folder, target)
        assert (done.returncode, done.stdout) == (0, f"{folder}||-m|infra|{target}|\n"), done.stderr
    assert "make up" in make(folder, "help").stdout


@pytest.mark.parametrize("name", ODD)
def test_the_state_may_lie_elsewhere(name: str, tmp_path: Path) -> None:
    home = tmp_path / name
    folder = checkout(tmp_path / "checkout", home)
    done = make(folder, "up", ATHANOR_HOME=str(home))
    assert (done.returncode, done.stdout) == (0, f"{folder}|{home}|-m|infra|up|\n"), done.stderr
    assert not (folder / ".venv").exists()


def test_down_is_no_success_while_a_stack_may_run(tmp_path: Path) -> None:
    folder = checkout(tmp_path / "a b")
    shutil.rmtree(folder / ".venv")
    assert make(folder, "down").stdout.startswith("nothing to stop")
    (folder / ".athanor").mkdir()
    (folder / ".athanor" / "stack.json").touch()
    done = make(folder, "down")
    assert done.returncode != 0
    assert "make setup, then make down" in done.stderr


def test_clean_removes_what_is_ours_and_nothing_else(tmp_path: Path) -> None:
    home = tmp_path / "my state"
    folder = checkout(tmp_path / "checkout", home)
    (home / ".athanor").mkdir()
    (home / "letters").touch()
    assert make(folder, "clean", ATHANOR_HOME=str(home)).returncode == 0
    assert [path.name for path in home.iterdir()] == ["letters"]


def test_set_up_runs_again_after_its_files_have_changed(tmp_path: Path) -> None:
    folder = checkout(tmp_path / "a b")
    assert make(folder, "setup").stdout == ""
    (folder / "constraints.txt").touch()
    os.utime(folder / ".venv" / ".athanor-setup", (2, 2))
    done = make(folder, "setup")
    assert "-m|uv|pip|install|" in done.stdout, done.stderr
    assert make(folder, "setup").stdout == ""


def test_export_passes_on_addresses_as_they_are_and_asks_for_the_model(tmp_path: Path) -> None:
    folder = checkout(tmp_path / "a b")
    python = folder / ".venv" / "bin" / "python"  # no stack runs, so there are no settings of one
    python.write_text(RECORDER.replace("printf", '[ "$2" = infra ] && exit 1\nprintf', 1))
    address = "models:/it's $HOME@champion"
    done = make(folder, "export", "EXPORT=--dtype bf16", MODEL=address, TO="/a b/c")
    expected = f"{folder}||-m|stages.export|{address}|--to|/a b/c|--dtype|bf16|\n"
    assert (done.returncode, done.stdout) == (0, expected), done.stderr
    refused = make(folder, "export")
    assert refused.returncode != 0
    assert "name a model: make export MODEL=" in refused.stderr
