"""Where sources may lie: the innermost folder that is named open or closed decides."""

import os
import pwd
from pathlib import Path

import pytest

from stages.config.errors import ConfigError
from stages.config.places import SOURCE_ROOTS, check_source, local_path

CHECKOUT = Path(__file__).resolve().parents[3]


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (SOURCE_ROOTS, "ATHANOR_HOME", "AIRFLOW_HOME", "ARTIFACT_STORE", "HF_HOME", "HF_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)


def _is_open(address: str | Path) -> bool:
    try:
        check_source(str(address), field="documents")
    except ConfigError as error:
        assert "not open to sources" in error.message  # noqa: PT017 - the other refusals are not asked for here
        return False
    return True


@pytest.mark.parametrize("place", ["/data", "/mnt/corpus/a.txt", "/srv", "/home/ann/corpus", "/opt/x", "/"])
def test_usual_places_are_open(place: str) -> None:
    assert _is_open(place)


@pytest.mark.parametrize(
    "place",
    [
        "/etc/ssl",
        "/proc/1/environ",
        "/sys",
        "/run/secrets/x",
        "/boot",
        "/dev/sda",
        "/var/log/auth.log",
        "/home/ann/.ssh/id_rsa",
        "/home/ann/.aws",
        f"{pwd.getpwuid(0).pw_dir}/.netrc",
        "/Users/ann/.ssh",
        "//etc",
        "///etc/",
        "/data/../etc",
    ],
)
def test_system_folders_and_dot_folders_of_homes_are_closed(place: str) -> None:
    assert not _is_open(place)
    assert not _is_open(f"file://{place}")


def test_names_that_only_begin_like_closed_folders_are_open() -> None:
    for place in ("/etcetera", "/procedures", "/devel/data", "/home/ann/x/.hidden", "/rooted/.x"):
        assert _is_open(place)


def test_the_own_folder_of_the_stack_is_closed_and_its_artifacts_are_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ATHANOR_HOME", str(tmp_path))
    for home in (CHECKOUT / ".athanor", tmp_path / ".athanor"):
        for closed in ("", "secrets.json", "store", "store/runs/x", "airflow/airflow.db", "storehouse"):
            assert not _is_open(home / closed)
        assert _is_open(home / "store" / "artifacts" / "preferences" / "f")
    assert _is_open(tmp_path / "corpus")


def test_airflows_home_is_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert not _is_open(tmp_path / "airflow" / "airflow.cfg")
    monkeypatch.setenv("AIRFLOW_HOME", str(tmp_path / "elsewhere"))
    assert not _is_open(tmp_path / "elsewhere" / "airflow.cfg")
    assert _is_open(tmp_path / "airflow" / "data.txt")


def test_the_cache_of_the_hub_is_open_and_the_token_next_to_it_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert _is_open(tmp_path / ".cache/huggingface/hub/models--a--b/snapshots/1")
    assert not _is_open(tmp_path / ".cache/huggingface/token")
    assert not _is_open("~/.cache/other")


def test_a_user_without_a_home_is_no_reason_to_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/")
    assert _is_open("/data/x")
    assert not _is_open("/.secrets/x")
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(os, "getuid", lambda: 2**31 - 7)
    assert _is_open("/data/x")


def test_roots_of_the_operator_close_everything_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "data").symlink_to(tmp_path / "disk")
    monkeypatch.setenv(SOURCE_ROOTS, os.pathsep.join([str(tmp_path / "data"), "/etc/corpora", ""]))
    monkeypatch.setenv("ARTIFACT_STORE", (tmp_path / "my store").as_uri())
    for place in (tmp_path / "data" / "x", tmp_path / "disk", "/etc/corpora/a", tmp_path / "my store/artifacts/x"):
        assert _is_open(place)
    for place in ("/mnt", tmp_path, tmp_path / "disk2", "/etc/hosts", "/", tmp_path / "my store/runs"):
        assert not _is_open(place)
    with pytest.raises(ConfigError, match=SOURCE_ROOTS) as told:
        check_source("/mnt/x", field="documents")
    assert "documents='/mnt/x'" in told.value.message
    monkeypatch.setenv(SOURCE_ROOTS, "data")
    with pytest.raises(ConfigError, match="not absolute"):
        check_source("/mnt/x")


def test_what_lies_on_no_disk_is_no_matter_of_places() -> None:
    for address in ("s3://bucket/etc", "hf://org/name?split=train", "org/name"):
        assert _is_open(address)


def test_file_addresses_keep_every_character() -> None:
    assert local_path("file:///data/a%23b%20c") == Path("/data/a#b c")
    assert local_path("file:///data/a#b?c=d") == Path("/data/a#b?c=d")
    assert local_path("file://localhost/data") == Path("/data")
    assert local_path(Path("/data/ü %41").as_uri()) == Path("/data/ü %41")


def test_a_link_that_may_not_be_looked_at_is_no_reason_to_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    """As /proc/1/root is to everybody but the owner of that process."""

    def denied(path: object) -> str:
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(os.path, "realpath", denied)
    assert not _is_open("/proc/1/root/etc")
    assert _is_open("/data/x")


def test_a_name_holds_no_nul_even_when_it_is_spelled_out() -> None:
    with pytest.raises(ConfigError, match="%00"):
        check_source("file:///data/%00")
