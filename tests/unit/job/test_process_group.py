"""Which network interface gloo is told to use: the one that has this node's address in Ray."""

import os
import socket

import pytest
import ray.util

from stages.job.process_group import GLOO_INTERFACE, choose_interface, interface_of


def test_loopback_is_the_interface_of_its_address_and_a_foreign_address_has_none():
    assert interface_of("127.0.0.1") in {name for _, name in socket.if_nameindex()}
    assert interface_of("192.0.2.1") is None  # reserved for documentation


@pytest.mark.parametrize(("told", "expected"), [("", interface_of("127.0.0.1")), ("eth7", "eth7")])
def test_gloo_uses_rays_interface_unless_the_user_said_which(told: str, expected: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "127.0.0.1")
    monkeypatch.setenv(GLOO_INTERFACE, told)
    if not told:
        monkeypatch.delenv(GLOO_INTERFACE)
    choose_interface()
    assert os.environ[GLOO_INTERFACE] == expected
    monkeypatch.delenv(GLOO_INTERFACE)
