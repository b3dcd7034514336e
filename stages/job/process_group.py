"""The torch process group of Ray Train's workers, over the network interface that Ray itself uses.

Surprising: gloo listens on the address that a machine's own name resolves to, and Debian's /etc/hosts makes that
127.0.1.1. Workers on two such machines would each wait for the other on its own loopback.
"""

import logging
import os

import psutil
from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend

logger = logging.getLogger(__name__)

GLOO_INTERFACE = "GLOO_SOCKET_IFNAME"


class _Backend(_TorchBackend):
    def on_start(self, worker_group, backend_config) -> None:
        worker_group.execute(choose_interface)
        super().on_start(worker_group, backend_config)


class OverRaysInterface(TorchConfig):
    """Pass it to a TorchTrainer as `torch_config`."""

    @property
    def backend_cls(self) -> type[_TorchBackend]:
        return _Backend


def choose_interface() -> None:
    """Point gloo to the interface that has this node's address in Ray, unless the user chose one. Runs in a worker."""
    from ray.util import get_node_ip_address

    if GLOO_INTERFACE in os.environ:
        return
    address = get_node_ip_address()
    if interface := interface_of(address):
        os.environ[GLOO_INTERFACE] = interface
    else:
        logger.warning(
            "no network interface of this machine has Ray's address %s; if workers do not find each other, set %s",
            address,
            GLOO_INTERFACE,
        )


def interface_of(address: str) -> str | None:
    """The name of the interface with this address; None when there is none, as behind address translation."""
    for name, entries in psutil.net_if_addrs().items():
        if any(entry.address.partition("%")[0] == address for entry in entries):
            return name
    return None
