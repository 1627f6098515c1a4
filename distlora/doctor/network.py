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

#: Seconds for a connection to the master.
PATIENCE = 4.0
#: The variables that bind a transport to an interface.
INTERFACE_VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "TP_SOCKET_IFNAME")


def facts(master: str | None, port: int | None) -> dict[str, Any]:
    """The network as this node sees it.

    own: the addresses of this host's name. interfaces: name -> address. asked: the variables of the user that
    choose an interface. master_addresses: what the master's name resolves to. source, interface: where
    packets to the master leave this host. answer: the state of the master's port: "open", "refused" (reached,
    but nobody listens), "silent" or "unreachable".
    """
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
    """problem: why rank 0 cannot listen on this port, or None. another: a free port."""
    return {"port": port, "problem": problem_with_port(port), "another": free_port()}
