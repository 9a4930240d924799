"""Where the machines of a job meet, and by which way this one reaches the others.

What: ``host_and_port`` reads a rendezvous, ``local`` is this machine's address on the way there,
``interface`` the network interface that has it. How: the operating system chooses the way; nothing
is sent. Constraint: no name of this machine is looked up, because that often leads to an address
that the others do not reach.
"""

from __future__ import annotations

import contextlib
import ipaddress
import socket

import psutil

from finegraft.core.errors import ConfigError

_HERE = "127.0.0.1"


def host_and_port(rendezvous: str) -> tuple[str, int]:
    """Read ``host:port``.

    Raises:
        ConfigError: FG-DIST-005.
    """
    host, _, port = rendezvous.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise ConfigError(
            "FG-DIST-005",
            f"--rendezvous got {rendezvous!r}",
            allowed="HOST:PORT of machine 0, the same on every machine",
            fix="for example --rendezvous 192.168.1.10:29400",
        )
    return host, int(port)


def local(rendezvous: str) -> str:
    """The address under which the others reach this machine; without others its own.

    Raises:
        ConfigError: FG-DIST-005.
    """
    if not rendezvous:
        return _HERE
    host, port = host_and_port(rendezvous)
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, port))  # sends nothing; it chooses the way out
        return str(probe.getsockname()[0])
    return host


def interface(address: str) -> str | None:
    """The name of the network interface that has ``address``; None where none has."""
    with contextlib.suppress(ValueError):
        wanted = ipaddress.ip_address(address)
        for name, entries in psutil.net_if_addrs().items():
            for entry in entries:
                with contextlib.suppress(ValueError):
                    if ipaddress.ip_address(entry.address.split("%")[0]) == wanted:
                        return name
    return None
