"""Ports are the well-known ones when free, the recorded ones while free, and never two alike."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager

from infra import ports


@contextmanager
def listener(port: int = 0, host: str = "127.0.0.1") -> Iterator[int]:
    with socket.socket() as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind((host, port))
        server.listen()
        yield server.getsockname()[1]


def test_a_port_somebody_listens_on_is_not_free() -> None:
    with listener() as port:
        assert not ports.is_free(port)
    assert ports.is_free(port)


def test_a_listener_on_all_interfaces_takes_the_port_on_loopback_too() -> None:
    with listener(host="0.0.0.0") as port:
        assert not ports.is_free(port)


def test_first_free_skips_what_is_listened_on_and_what_was_given_away() -> None:
    with listener() as port:
        second = ports.first_free(port)
        assert second > port
        assert ports.first_free(port, taken=[second]) > second


def test_every_component_gets_its_own_port() -> None:
    assigned = ports.assign({})
    assert set(assigned) == set(ports.PREFERRED)
    assert len(set(assigned.values())) == len(assigned)


def test_a_recorded_port_is_kept_until_somebody_else_takes_it() -> None:
    with listener() as port:
        pass
    recorded = {"mlflow": port}
    assert ports.assign(recorded)["mlflow"] == port
    with listener(port):
        assert ports.assign(recorded)["mlflow"] != port


def test_a_free_port_is_none_that_the_kernel_gives_away() -> None:
    with listener() as given:
        chosen = {ports.any_free() for _ in range(20)}
    assert len(chosen) > 10
    assert max(chosen) < 32_768 <= given
    assert all(map(ports.is_free, chosen))


def test_ray_s_agent_gets_a_port_that_no_other_part_of_ray_is_given() -> None:
    assert max(ports.PREFERRED.values()) < 32_768
