"""What processes listen on, as the kernel says it."""

from __future__ import annotations

import socket
from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import IPv6Address, ip_address

import psutil

from infra.processes import describe


@dataclass(frozen=True)
class Listener:
    """A TCP port that takes connections, or a UDP one that takes datagrams from anybody."""

    address: str
    port: int
    what: str

    @property
    def on_loopback(self) -> bool:
        address = ip_address(self.address)
        mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None  # gRPC's ::ffff:127.0.0.1
        return (mapped or address).is_loopback


def listeners(processes: Iterable[psutil.Process]) -> list[Listener]:
    """Every port that these processes listen on."""
    found = []
    for process in processes:
        try:
            for entry in process.net_connections("inet"):
                datagrams = entry.type is socket.SocketKind.SOCK_DGRAM and not entry.raddr
                if datagrams or entry.status == psutil.CONN_LISTEN:
                    found.append(Listener(entry.laddr[0], entry.laddr[1], describe(process)))
        except psutil.NoSuchProcess:
            continue
    return found
