"""The scan of open ports sees what it is there to see."""

import socket

import psutil
import pytest

from tests.listening import listeners


@pytest.mark.parametrize(
    ("family", "address", "near"),
    [
        (socket.AF_INET, "127.0.0.1", True),
        (socket.AF_INET, "0.0.0.0", False),
        (socket.AF_INET6, "::1", True),
        (socket.AF_INET6, "::ffff:127.0.0.1", True),
        (socket.AF_INET6, "::", False),
    ],
)
def test_a_port_on_loopback_is_told_from_one_that_others_reach(family: int, address: str, near: bool) -> None:
    with socket.socket(family, socket.SOCK_STREAM) as server:
        if family == socket.AF_INET6:
            server.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)  # as gRPC does
        server.bind((address, 0))
        server.listen()
        port = server.getsockname()[1]
        assert [entry.on_loopback for entry in listeners([psutil.Process()]) if entry.port == port] == [near]


def test_datagrams_count_too() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.bind(("0.0.0.0", 0))
        port = server.getsockname()[1]
        assert [entry.on_loopback for entry in listeners([psutil.Process()]) if entry.port == port] == [False]
