"""What the stack keeps on disk: private where it is secret, short where sockets need it."""

import errno
import json
import os
import stat
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from infra import layout as layout_module
from infra.layout import (
    CHECKOUT,
    DamagedStateError,
    Layout,
    StackRecord,
    StackSecrets,
    choose_runtime_dir,
    is_ours,
    write_airflow_passwords,
)
from infra.plain_paths import is_plain, plain
from infra.ports import PREFERRED
from infra.private import NotPrivateError, write_private
from stages.config.seals import read_key_ring


def permissions(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_secrets_are_generated_once_and_readable_by_the_owner_alone(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    first = StackSecrets.load_or_generate(layout)
    assert StackSecrets.load_or_generate(layout) == first
    assert permissions(layout.secrets) == 0o600
    assert len(first.jwt_secret) >= 64
    assert StackSecrets.load_or_generate(Layout(tmp_path / "other")) != first


def test_a_file_that_is_older_than_the_sealing_key_gets_one_and_keeps_the_rest(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    made = StackSecrets.load_or_generate(layout)
    older = made.model_dump(exclude={"seal_key"})
    write_private(layout.secrets, json.dumps(older))
    found = StackSecrets.load_or_generate(layout)
    assert found.model_dump(exclude={"seal_key"}) == older
    assert len(read_key_ring(found.seal_key)) == len(read_key_ring(made.seal_key)) == 1
    assert StackSecrets.load_or_generate(layout) == found
    assert permissions(layout.secrets) == 0o600


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


def record(**changes: object) -> StackRecord:
    fields = {"stack_id": "x", "ports": dict(PREFERRED), "runtime_dir": "/tmp/x", "artifact_store": "file:///x"}
    return StackRecord.model_validate({**fields, **changes})


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        '{"stack_id": ""}',
        "\x00" * 20,
        '{"stack_id": "x", "ports": {}, "runtime_dir": "", "artifact_store": ""}',
    ],
)
def test_a_damaged_record_is_told_from_none(text: str, tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    assert StackRecord.load(layout) is None
    record().save(layout)
    assert StackRecord.load(layout) == record()
    layout.record.write_text(text)
    with pytest.raises(DamagedStateError, match=r"stack\.json is damaged .*make down"):
        StackRecord.load(layout)


@pytest.mark.parametrize("text", ["", "{", '{"admin_password": "x"}', "\x00" * 20])
def test_damaged_secrets_are_kept_and_it_is_said_what_they_were_for(text: str, tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    layout.home.mkdir()
    layout.secrets.write_text(text)
    with pytest.raises(DamagedStateError, match=r"secrets\.json is damaged .*from a backup"):
        StackSecrets.load_or_generate(layout)
    assert layout.secrets.read_text() == text


def test_the_record_of_an_older_version_is_read(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    layout.home.mkdir()
    old = record().model_dump(exclude={"home", "checkout"})
    layout.record.write_text(json.dumps(old))
    assert StackRecord.load(layout) == record()


def test_what_an_older_version_left_open_is_closed(tmp_path: Path) -> None:
    """Databases hold people's passwords and connections; logs hold what models were trained on."""
    layout = Layout(tmp_path)
    for folder in (layout.home, layout.airflow, layout.mlflow, layout.logs):
        folder.mkdir(mode=0o755)
    for file in (layout.secrets, layout.airflow_passwords, *layout.databases, layout.supervisor_config):
        file.touch(mode=0o644)
    layout.close_to_others()
    assert {permissions(path) for path in (layout.home, layout.airflow, layout.mlflow, layout.logs)} == {0o700}
    assert {permissions(path) for path in (layout.secrets, layout.airflow_passwords, *layout.databases)} == {0o600}


def test_the_state_may_be_a_link_of_ours_to_a_larger_disk(tmp_path: Path) -> None:
    (tmp_path / "large").mkdir(mode=0o755)
    layout = Layout(tmp_path)
    layout.home.symlink_to(tmp_path / "large")
    layout.close_to_others()
    assert permissions(tmp_path / "large") == 0o700


@pytest.mark.skipif(os.getuid() != 0, reason="only root can make another user's files")
@pytest.mark.parametrize("made", ["folder", "link"])
def test_what_another_user_put_in_the_place_of_the_state_is_refused(made: str, tmp_path: Path) -> None:
    (tmp_path / "ours").mkdir()
    layout = Layout(tmp_path)
    layout.home.mkdir() if made == "folder" else layout.home.symlink_to(tmp_path / "ours")
    os.lchown(layout.home, 65534, 65534)
    with pytest.raises(NotPrivateError, match=r"belongs to user 65534.*ATHANOR_HOME"):
        layout.close_to_others()


def test_a_full_disk_leaves_the_old_file_and_nothing_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_private(tmp_path / "secrets.json", "old")

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_private(tmp_path / "secrets.json", "new")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


def test_the_state_lies_where_athanor_home_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ATHANOR_HOME", raising=False)
    assert Layout.of_environment().home == CHECKOUT / ".athanor"
    monkeypatch.setenv("ATHANOR_HOME", str(tmp_path / "elsewhere"))
    layout = Layout.of_environment()
    assert (layout.checkout, layout.home) == (CHECKOUT, tmp_path / "elsewhere" / ".athanor")


ODD = 'it\'s 100% $HOME ;x #y "z" ü'


def test_programs_get_plain_names_for_odd_paths_and_the_store_keeps_its_own(tmp_path: Path) -> None:
    layout = Layout(tmp_path / ODD)
    (layout.home / "store").mkdir(parents=True)
    links = tmp_path / "links"
    links.mkdir()
    named = layout.through_links(links)
    assert named.through_links(links) == named
    for path in (named.checkout, named.home, named.airflow, named.mlflow, named.supervisor_config):
        assert is_plain(path)
    assert named.store.samefile(layout.store)
    assert Path(unquote(urlsplit(layout.store.as_uri()).path)) == layout.store
    assert Layout(tmp_path).through_links(links) == Layout(tmp_path), "where nothing is odd, nothing changes"


def test_a_link_follows_a_checkout_that_was_moved(tmp_path: Path) -> None:
    links = tmp_path / "links"
    links.mkdir()
    for name in ("a b", "c d"):
        (tmp_path / name).mkdir()
        assert plain(tmp_path / name, links=links, name="code").resolve() == tmp_path / name
    assert list(links.iterdir()) == [links / "code"]


def test_sockets_of_an_odd_checkout_lie_in_a_plain_place(monkeypatch: pytest.MonkeyPatch) -> None:
    short = Path("/tmp") / f"ü{os.getpid()}"
    monkeypatch.setattr("tempfile.tempdir", "/tmp/my files")
    chosen = choose_runtime_dir(Layout(short), None)
    chosen.rmdir()
    assert is_plain(chosen)
