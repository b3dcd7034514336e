"""A Docker engine for the tests: the one that is there, or on request one of our own, in its own directory.

ATHANOR_TEST_ENGINE=own, as root on Debian, installs docker.io and debootstrap with apt-get, fetches the Compose plugin
from Debian trixie, starts dockerd on a private socket and stops it by its process id afterwards. Such a machine may be
unable to pull images: the base image then comes from debootstrap, Postgres and S3 from infra/compose/local-images.yml.
The directory, ATHANOR_TEST_ENGINE_DIR, is kept: it holds the build cache, which is cut back after each use.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

BASE_IMAGE = "athanor/debian:bookworm"
CACHE = "8gb"
"What is kept of images that no tag names and of the build cache; one set of images is about 6 GB."
FREE_GB = 10
"What one build and one run need on the disk; Ceph's monitor stops on a full one."


class NoEngine(RuntimeError):
    """There is none; the message says why and what to do."""


@dataclass(frozen=True)
class Engine:
    """How to call docker, and whether images must be built locally."""

    environment: Mapping[str, str]
    local_images: bool

    def docker(self, *words: str, check: bool = True, seconds: float = 120, **arguments) -> str:
        done = subprocess.run(
            ["docker", *words],
            env={**os.environ, **self.environment},
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
            **arguments,
        )
        if check and done.returncode:
            raise AssertionError(
                f"docker {' '.join(words[:8])}: {done.returncode}\n{done.stdout}\n{done.stderr[-6000:]}"
            )
        return done.stdout


@contextmanager
def docker_engine() -> Iterator[Engine]:
    """The engine of this machine; ATHANOR_TEST_ENGINE=own brings one up. Raises NoEngine."""
    if os.environ.get("ATHANOR_TEST_ENGINE") == "own":
        with _own_engine() as engine:
            yield engine
        return
    engine = Engine({}, local_images=os.environ.get("ATHANOR_TEST_IMAGES") == "local")
    for words in (("info",), ("compose", "version")):
        try:
            engine.docker(*words)
        except (AssertionError, FileNotFoundError) as error:
            raise NoEngine(
                f"`docker {' '.join(words)}` does not work here ({str(error).splitlines()[-1]}); start Docker, or as "
                "root on Debian set ATHANOR_TEST_ENGINE=own, which installs docker.io and runs an engine of its own"
            ) from None
    yield engine


# --------------------------------------------------------------- our own


@contextmanager
def _own_engine() -> Iterator[Engine]:
    root = Path(os.environ.get("ATHANOR_TEST_ENGINE_DIR", "/var/tmp/athanor-engine"))
    _requirements()
    for name in ("data", "exec", "config/cli-plugins"):
        (root / name).mkdir(parents=True, exist_ok=True)
    shutil.copy(compose_program(root / "trixie"), root / "config" / "cli-plugins" / "docker-compose")
    environment = {"DOCKER_HOST": f"unix://{root}/docker.sock", "DOCKER_CONFIG": str(root / "config")}
    engine = Engine(environment, local_images=True)
    with (root / "dockerd.log").open("ab") as log:
        daemon = subprocess.Popen(
            [
                *("dockerd", "--host", environment["DOCKER_HOST"], "--data-root", str(root / "data")),
                *("--exec-root", str(root / "exec"), "--pidfile", str(root / "docker.pid")),
                *("--default-ulimit", "nofile=20000:20000"),
            ],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    try:
        _wait(engine, daemon, root)
        _require_space(engine, root)
        _base_image(engine, root)
        try:
            yield engine
        finally:
            _prune(engine)
    finally:
        daemon.terminate()
        try:
            daemon.wait(timeout=60)
        except subprocess.TimeoutExpired:
            daemon.kill()
            daemon.wait()
        subprocess.run(["umount", str(root / "exec/netns/default")], capture_output=True, check=False)


def _requirements() -> None:
    if os.geteuid() or not shutil.which("apt-get"):
        raise NoEngine("ATHANOR_TEST_ENGINE=own needs root on Debian")
    packages = {"dockerd": ("docker.io", "containerd"), "debootstrap": ("debootstrap",)}
    missing = [package for program, names in packages.items() if not shutil.which(program) for package in names]
    if missing:
        _call("apt-get", "update", "--quiet")
        _call("apt-get", "install", "--yes", "--quiet", "--no-install-recommends", *missing)


def compose_program(folder: Path) -> Path:
    """Debian bookworm has no Compose 2; trixie's package is one program, unpacked into `folder` without root."""
    program = folder / "unpacked/usr/libexec/docker/cli-plugins/docker-compose"
    if program.exists():
        return program
    (folder / "lists" / "partial").mkdir(parents=True, exist_ok=True)
    keyring = "/usr/share/keyrings/debian-archive-keyring.gpg"
    (folder / "sources.list").write_text(f"deb [signed-by={keyring}] {_mirror()} trixie main\n")
    options = {
        "Dir::Etc::sourcelist": folder / "sources.list",
        "Dir::Etc::sourceparts": "-",
        "Dir::State::lists": folder / "lists",
        "Dir::Cache": folder / "cache",
        "APT::Get::List-Cleanup": "0",
    }
    words = [word for name, value in options.items() for word in ("-o", f"{name}={value}")]
    _call("apt-get", *words, "update", "--quiet")
    _call("apt-get", *words, "download", "docker-compose/trixie", cwd=folder)
    _call("dpkg-deb", "-x", str(next(folder.glob("docker-compose_*.deb"))), str(folder / "unpacked"))
    return program


def _base_image(engine: Engine, root: Path) -> None:
    if engine.docker("images", "--quiet", BASE_IMAGE).strip():
        return
    folder = root / "bookworm"
    shutil.rmtree(folder, ignore_errors=True)
    _call("debootstrap", "--variant=minbase", "bookworm", str(folder), _mirror())
    with subprocess.Popen(["tar", "--directory", str(folder), "--create", "."], stdout=subprocess.PIPE) as packed:
        engine.docker("import", "-", BASE_IMAGE, stdin=packed.stdout, seconds=600)
    shutil.rmtree(folder)


def _wait(engine: Engine, daemon: subprocess.Popen[bytes], root: Path, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while daemon.poll() is None and time.monotonic() < deadline:
        try:
            engine.docker("info")
            return
        except AssertionError:
            time.sleep(0.3)
    raise NoEngine(
        f"dockerd did not start; the end of {root}/dockerd.log:\n{(root / 'dockerd.log').read_text()[-2000:]}"
    )


def _require_space(engine: Engine, root: Path) -> None:
    """Raise AssertionError where the disk is too small; what a killed run left of its build is dropped first."""
    if shutil.disk_usage(root).free < FREE_GB * 1e9:
        _prune(engine)
    if (free := shutil.disk_usage(root).free / 1e9) < FREE_GB:
        raise AssertionError(
            f"{root} has {free:.1f} GB free; the images and one run need {FREE_GB}: free some, or set "
            "ATHANOR_TEST_ENGINE_DIR to a directory on another disk"
        )


def _prune(engine: Engine) -> None:
    """Drop the images of earlier builds and the oldest of the build cache: each commit adds about 5 GB."""
    engine.docker("image", "prune", "--force", seconds=600)
    engine.docker("builder", "prune", "--force", "--keep-storage", CACHE, seconds=600)


def _mirror() -> str:
    """The Debian mirror that this machine's apt uses."""
    asked = ["apt-get", "indextargets", "--format", "$(REPO_URI)", "Identifier: Packages"]
    told = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.split()
    mirrors = [uri.rstrip("/") for uri in told if uri.rstrip("/").endswith("/debian")]
    if not mirrors:
        raise NoEngine("apt has no source that ends in /debian; add Debian's main archive to its sources")
    return mirrors[0]


def _call(*command: str, cwd: Path | None = None) -> None:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    if done.returncode:
        raise NoEngine(f"{' '.join(command[:3])} failed: {done.stderr[-1500:]}")


if __name__ == "__main__":
    print(compose_program(Path(sys.argv[1]).resolve()))
