"""What the stack keeps on disk: private where it is secret, short where sockets need it."""

import os
import stat
from pathlib import Path

import pytest

from infra import layout as layout_module
from infra.layout import Layout, StackRecord, StackSecrets, choose_runtime_dir, is_ours, write_airflow_passwords


def permissions(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_secrets_are_generated_once_and_readable_by_the_owner_alone(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    first = StackSecrets.load_or_generate(layout)
    assert StackSecrets.load_or_generate(layout) == first
    assert permissions(layout.secrets) == 0o600
    assert len(first.jwt_secret) >= 64
    assert StackSecrets.load_or_generate(Layout(tmp_path / "other")) != first


def test_the_login_file_is_private_and_holds_the_printed_password(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    write_airflow_passwords(layout, "a-password")
    assert layout.airflow_passwords.read_text() == '{"admin": "a-password"}\n'
    assert permissions(layout.airflow_passwords) == 0o600


def test_sockets_lie_in_the_checkout_when_its_path_is_short(tmp_path_factory: pytest.TempPathFactory) -> None:
    short = Path("/tmp") / f"a{os.getpid()}"
    try:
        assert choose_runtime_dir(Layout(short), None) == short / ".athanor/run"
    finally:
        for directory in (short / ".athanor/run", short / ".athanor", short):
            directory.rmdir()


def test_a_long_checkout_path_moves_sockets_to_a_private_short_directory_that_is_kept(tmp_path: Path) -> None:
    layout = Layout(tmp_path / ("long" * 20))
    chosen = choose_runtime_dir(layout, None)
    try:
        assert len(str(chosen)) <= layout_module.LONGEST_SOCKET_ROOT
        assert permissions(chosen) == 0o700
        assert choose_runtime_dir(layout, str(chosen)) == chosen
    finally:
        chosen.rmdir()
    again = choose_runtime_dir(layout, str(chosen))  # a reboot emptied the temporary directory
    assert again.is_dir()
    again.rmdir()


def test_a_link_in_a_shared_directory_is_not_taken_for_ours(tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(tmp_path)
    assert is_ours(tmp_path)
    assert not is_ours(link)


def test_a_damaged_record_counts_as_none(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    assert StackRecord.load(layout) is None
    record = StackRecord(stack_id="x", ports={"airflow": 1}, runtime_dir="/tmp/x", artifact_store="file:///x")
    record.save(layout)
    assert StackRecord.load(layout) == record
    layout.record.write_text(layout.record.read_text()[:20])
    assert StackRecord.load(layout) is None
