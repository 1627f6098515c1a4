"""Names, interfaces and ports, as one node sees them."""

import errno
import fcntl
import os
import socket
import struct
from typing import Any

#: Seconds that a connection to the master is tried.
PATIENCE = 4.0
#: The variables that tie a transport to an interface.
INTERFACE_VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "TP_SOCKET_IFNAME")
_SIOCGIFADDR = 0x8915


def facts(master: str | None, port: int | None) -> dict[str, Any]:
    """own: what this host's name resolves to. source, interface: where packets for the master leave. answer: what the master's
    port says: "open", "refused" (reached, nobody listens), "silent", "unreachable"."""
    found: dict[str, Any] = {
        "own": _addresses(socket.gethostname()),
        "interfaces": interfaces(),
        "asked": {name: os.environ[name] for name in INTERFACE_VARIABLES if os.environ.get(name)},
    }
    if master is None:
        return found
    found |= {"master": master, "master_addresses": _addresses(master)}
    if found["master_addresses"]:
        address = found["master_addresses"][0]
        found["source"] = _source(address)
        found["interface"] = next((name for name, own in found["interfaces"].items() if own == found["source"]), None)
        found["answer"] = _answer(address, port) if port else None
    return found


def interfaces() -> dict[str, str]:
    """Interface -> IPv4 address, of those that have one."""
    found = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            except OSError:  # it has no such address
                continue
            found[name] = socket.inet_ntoa(answer[20:24])
    return found


def _addresses(name: str) -> list[str]:
    """In the order in which a connection tries them; empty where the name means nothing."""
    try:
        return list(dict.fromkeys(entry[4][0] for entry in socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)))
    except OSError:
        return []


def _source(address: str) -> str | None:
    """The own address from which packets to `address` would leave. Nothing is sent."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((address, 9))
        except OSError:  # no route
            return None
        return probe.getsockname()[0]


def _answer(address: str, port: int) -> str:
    try:
        socket.create_connection((address, port), timeout=PATIENCE).close()
    except ConnectionRefusedError:
        return "refused"
    except TimeoutError:
        return "silent"
    except OSError:
        return "unreachable"
    return "open"


def port_facts(port: int) -> dict[str, Any]:
    """Whether rank 0 can listen here, and a port on which it could otherwise."""
    return {"port": port, "problem": _bind_problem(port), "another": free_port()}


def _bind_problem(port: int) -> str | None:
    with socket.socket() as listener:
        listener.setsockopt(
            socket.SOL_SOCKET, socket.SO_REUSEADDR, 1
        )  # as the rendezvous does: connections that fade away are no matter
        try:
            listener.bind(("", port))
            listener.listen()
        except OSError as error:
            return "in use" if error.errno == errno.EADDRINUSE else str(error.strerror or error)
    return None


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("", 0))
        return listener.getsockname()[1]
