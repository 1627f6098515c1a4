"""Names, interfaces and ports, as one node sees them."""

import os
import socket
from typing import Any

from distlora.cluster.addresses import (
    addresses,
    free_port,
    interface_of,
    interfaces,
    problem_with_port,
    source,
)

#: Seconds that a connection to the master is tried.
PATIENCE = 4.0
#: The variables that tie a transport to an interface.
INTERFACE_VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "TP_SOCKET_IFNAME")


def facts(master: str | None, port: int | None) -> dict[str, Any]:
    """own: what this host's name resolves to. source, interface: where packets for the master leave. answer:
    what the master's port says: "open", "refused" (reached, nobody listens), "silent", "unreachable"."""
    found: dict[str, Any] = {
        "own": addresses(socket.gethostname()),
        "interfaces": interfaces(),
        "asked": {name: os.environ[name] for name in INTERFACE_VARIABLES if os.environ.get(name)},
    }
    if master is None:
        return found
    found |= {"master": master, "master_addresses": addresses(master)}
    if found["master_addresses"]:
        address = found["master_addresses"][0]
        found["source"] = source(address)
        found["interface"] = interface_of(found["source"])
        found["answer"] = _answer(address, port) if port else None
    return found


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
    return {"port": port, "problem": problem_with_port(port), "another": free_port()}
