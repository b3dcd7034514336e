"""Machines within this machine: Linux network namespaces on a switch, each of which can be cut off as by pulling its
cable. Nothing outside reaches them: they have no way out, and this process has an address of its own on the switch.

The switch is a bridge in a namespace of its own, because a firewall of this machine (Docker's, say) would filter it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import psutil

_PREFIX = "ath"
_NETWORK = "198.18"
"""Reserved for tests of networks (RFC 2544): nobody's address."""


@dataclass(frozen=True)
class Machine:
    """A namespace with an address of its own."""

    namespace: str
    address: str
    switch: str
    cable: str
    """The switch's end of its only connection."""

    @property
    def within(self) -> tuple[str, ...]:
        """What is put before a command that shall run there."""
        return ("ip", "netns", "exec", self.namespace)

    def cut(self) -> None:
        """Packets vanish from now on, in both directions and without a word."""
        _ip("-n", self.switch, "link", "set", self.cable, "down")

    def mend(self) -> None:
        _ip("-n", self.switch, "link", "set", self.cable, "up")

    def isolate(self, isolated: bool = True) -> None:
        """Packets between isolated machines vanish without a word; everybody else still reaches each of them."""
        state = "on" if isolated else "off"
        _ip("-n", self.switch, "link", "set", self.cable, "type", "bridge_slave", "isolated", state)


@dataclass(frozen=True)
class Network:
    """Machines by name, and the address under which they reach this process."""

    address: str
    machines: dict[str, Machine]


def missing_for_namespaces() -> str:
    """Why this machine cannot have namespaces, in words; empty when it can."""
    if not shutil.which("ip"):
        return "network namespaces need the program `ip` (Debian: iproute2), which is not on PATH"
    if os.geteuid() != 0:
        return "network namespaces need root"
    name = f"{_PREFIX}{os.getpid()}-probe"
    try:
        _ip("netns", "add", name)
        _ip("netns", "delete", name)
    except RuntimeError as error:
        return f"this machine does not let us make network namespaces: {error}"
    return ""


@contextmanager
def network(names: Sequence[str]) -> Iterator[Network]:
    """A switch with this process and a machine for each name on it; gone when the block ends."""
    _remove_leftovers()
    own, subnet = f"{_PREFIX}{os.getpid()}", f"{_NETWORK}.{os.getpid() % 250 + 1}"
    switch, plug = f"{own}-switch", f"{own}p"
    try:
        _ip("netns", "add", switch)
        _ip("-n", switch, "link", "add", "bridge", "type", "bridge")
        _ip("-n", switch, "link", "set", "bridge", "up")
        _ip("link", "add", plug, "type", "veth", "peer", "name", "c1", "netns", switch)
        _plug_in(switch, "c1")
        _ip("address", "add", f"{subnet}.1/24", "dev", plug)
        _ip("link", "set", plug, "up")
        machines = {}
        for number, name in enumerate(names, start=2):
            machine = Machine(f"{own}-{name}", f"{subnet}.{number}", switch, cable=f"c{number}")
            inside = ("-n", machine.namespace)
            _ip("netns", "add", machine.namespace)
            _ip(*inside, "link", "add", "eth0", "type", "veth", "peer", "name", machine.cable, "netns", switch)
            _plug_in(switch, machine.cable)
            _ip(*inside, "address", "add", f"{machine.address}/24", "dev", "eth0")
            _ip(*inside, "link", "set", "eth0", "up")
            _ip(*inside, "link", "set", "lo", "up")
            machines[name] = machine
        yield Network(f"{subnet}.1", machines)
    finally:
        _remove(own)


def _plug_in(switch: str, cable: str) -> None:
    _ip("-n", switch, "link", "set", cable, "master", "bridge", "up")


def _remove_leftovers() -> None:
    """What test sessions left behind that were killed."""
    for pid in {int(found[1]) for name in _namespaces() if (found := re.match(rf"{_PREFIX}(\d+)-", name))}:
        if not psutil.pid_exists(pid):
            _remove(f"{_PREFIX}{pid}")


def _remove(own: str) -> None:
    """The interfaces of a namespace end with it, and so do their other ends."""
    for name in _namespaces():
        if name.startswith(f"{own}-"):
            _ip("netns", "delete", name)


def _namespaces() -> list[str]:
    return [entry["name"] for entry in json.loads(_ip("-json", "netns", "list") or "[]")]


def _ip(*words: str) -> str:
    done = subprocess.run(("ip", *words), capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"ip {' '.join(words)}: {done.stderr.strip()}")
    return done.stdout
