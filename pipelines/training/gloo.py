"""How the processes of a training on CPUs find one another over a network."""

import os
from typing import Any

import psutil
import ray
from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend

VARIABLE = "GLOO_SOCKET_IFNAME"
"""Of PyTorch: the network interface that Gloo uses."""


class GlooConfig(TorchConfig):  # type: ignore[misc]
    """Ray Train's, for Gloo between the nodes of a cluster."""

    @property
    def backend_cls(self) -> Any:
        """What sets the processes up."""
        return _GlooBackend


class _GlooBackend(_TorchBackend):  # type: ignore[misc]
    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        worker_group.execute(name_interface)
        super().on_start(worker_group, backend_config)


def name_interface() -> None:
    """Names the interface that has this node's address in the cluster, unless the environment names one.

    Gloo asks for the host's name otherwise, which on many machines is 127.0.0.1 and leads the others to themselves.
    """
    here = ray.util.get_node_ip_address()
    for name, addresses in psutil.net_if_addrs().items():
        if any(each.address == here for each in addresses):
            os.environ.setdefault(VARIABLE, name)
