"""Free ports on loopback: the well-known one if it is free, otherwise the next free one above it."""

from __future__ import annotations

import random
import socket
from collections.abc import Iterable, Mapping
from pathlib import Path

# name -> the port users expect; searched upwards from there
PREFERRED = {
    "airflow": 8080,
    "mlflow": 5000,
    "ray_dashboard": 8265,
    "ray_gcs": 6379,
    # Ray's own default, 52365, is among the ports that the kernel gives to whoever asks for none, such as Ray's agents.
    "ray_agent_http": 8266,
}
SEARCHED = 200


def is_free(port: int) -> bool:
    """Whether no process listens on it, neither on loopback nor on all interfaces."""
    with socket.socket() as probe:
        probe.settimeout(0.5)
        if probe.connect_ex(("127.0.0.1", port)) == 0:
            return False
    with socket.socket() as probe:
        # servers set this too: without it a port whose last connections linger in TIME_WAIT would look taken
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def first_free(preferred: int, *, taken: Iterable[int] = ()) -> int:
    """The first free port from `preferred` upwards that is not in `taken`."""
    excluded = set(taken)
    for port in range(preferred, min(preferred + SEARCHED, 65536)):
        if port not in excluded and is_free(port):
            return port
    raise RuntimeError(f"no free port from {preferred} to {preferred + SEARCHED - 1}; stop what holds them")


def assign(recorded: Mapping[str, int]) -> dict[str, int]:
    """A free port for every name: the recorded one if it is still free, so that bookmarks keep working."""
    assigned: dict[str, int] = {}
    for name, preferred in PREFERRED.items():
        known = recorded.get(name)
        if known is not None and known not in assigned.values() and is_free(known):
            assigned[name] = known
        else:
            assigned[name] = first_free(preferred, taken=assigned.values())
    return assigned


def any_free() -> int:
    """Some free port, for servers of tests. It is below those that the kernel gives to connections and to servers that
    ask for none: one of these could take it before its own server starts."""
    candidates = range(_LOWEST, _first_given())
    for port in random.SystemRandom().sample(candidates, min(SEARCHED, len(candidates))):
        if is_free(port):
            return port
    raise RuntimeError(f"none of {SEARCHED} ports from {_LOWEST} to {_first_given() - 1} is free")


_LOWEST = 10_000


def _first_given() -> int:
    """The first port that the kernel gives away itself."""
    try:
        first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    except (OSError, ValueError):
        first = 0
    return first if first > _LOWEST + SEARCHED else 32_768
