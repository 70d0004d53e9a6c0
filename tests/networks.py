"""Machines of a network that can be cut off: network namespaces, each on a switch by a cable of its own."""

import contextlib
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import psutil


def _ip(words: str, check: bool = True) -> None:
    subprocess.run(["ip", *words.split()], check=check, capture_output=not check)


def _line(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.NoSuchProcess):
        return " ".join(process.cmdline())
    return ""


@dataclass
class Network:
    """A switch with this machine on it, at `here`, and others that are added. Wants root."""

    number: int
    names: list[str] = field(default_factory=list)

    @property
    def here(self) -> str:
        """This machine's address in the network."""
        return self._address(1)

    def address_of(self, name: str) -> str:
        """A machine's address in the network."""
        return self._address(self.names.index(name) + 2)

    def _address(self, host: int) -> str:
        return f"10.{77 + self.number // 256}.{self.number % 256}.{host}"

    def cable(self, name: str) -> str:
        """The end at the switch of a machine's cable."""
        return f"{name}c"

    def add(self) -> tuple[str, str]:
        """(name of a new machine's namespace, its address)."""
        name = f"a{self.number}n{len(self.names)}"
        _ip(f"netns add {name}")
        self.names.append(name)
        address = self.address_of(name)
        _ip(f"link add {self.cable(name)} type veth peer name eth0 netns {name}")
        _ip(f"link set {self.cable(name)} master {self.switch} up")
        for words in (f"addr add {address}/24 dev eth0", "link set eth0 up", "link set lo up"):
            _ip(f"-n {name} {words}")
        _ip(f"-n {name} route add default via {self.here}")
        return name, address

    def cut(self, name: str) -> None:
        """Pulls a machine's cable: nothing arrives any more, and nobody is told."""
        _ip(f"link set {self.cable(name)} nomaster")

    def mend(self, name: str) -> None:
        """Plugs it in again."""
        _ip(f"link set {self.cable(name)} master {self.switch}")

    def processes(self, name: str) -> list[psutil.Process]:
        """What runs on a machine."""
        told = subprocess.run(["ip", "netns", "pids", name], check=True, capture_output=True, text=True)
        return [psutil.Process(int(pid)) for pid in told.stdout.split()]

    def holders(self, word: str) -> list[str]:
        """The machines on which a process runs with this in its command line, in the order in which they came."""
        return [name for name in self.names if any(word in _line(process) for process in self.processes(name))]

    @property
    def switch(self) -> str:
        """The name of the bridge."""
        return f"a{self.number}sw"


@contextmanager
def network() -> Iterator[Network]:
    """A network of this process's own; all its machines are gone afterwards."""
    found = Network(os.getpid() % 4096)
    _ip(f"link add {found.switch} type bridge")
    try:
        _ip(f"addr add {found.here}/24 dev {found.switch}")
        _ip(f"link set {found.switch} up")
        yield found
    finally:
        for name in found.names:
            _ip(f"link del {found.cable(name)}", check=False)  # else it stays as long as a process over there
            _ip(f"netns del {name}", check=False)
        _ip(f"link del {found.switch}", check=False)
