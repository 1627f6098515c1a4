"""Host names, addresses and interfaces, as this host sees them. Only the look-up of a name sends packets."""

import errno
import fcntl
import re
import socket
import struct

#: From Linux's sockios.h: the request for the address of an interface.
_SIOCGIFADDR = 0x8915
#: The problem of a port that somebody listens on.
IN_USE = "in use"
_LOOPBACK = re.compile(r"localhost(\..*)?|127\.[\d.]+|::1")


def is_loopback(name: str) -> bool:
    """Whether a name or an address means the machine that asks. The name is not resolved."""
    return bool(_LOOPBACK.fullmatch(name))


def addresses(name: str) -> list[str]:
    """The addresses of a name, in the order in which a connection tries them; empty for an unknown name."""
    try:
        return list(
            dict.fromkeys(entry[4][0] for entry in socket.getaddrinfo(name, None, type=socket.SOCK_STREAM))
        )
    except (OSError, UnicodeError):
        return []


def source(address: str) -> str | None:
    """This host's address from which packets to `address` would leave; None without a route."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((address, 9))
        except OSError:
            return None
        return probe.getsockname()[0]


def interfaces() -> dict[str, str]:
    """Interface -> IPv4 address, for the interfaces that have one."""
    found = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            except OSError:  # this interface has no IPv4 address
                continue
            found[name] = socket.inet_ntoa(answer[20:24])
    return found


def interface_of(address: str | None) -> str | None:
    """The interface that has this address; None if no interface has it."""
    return next((name for name, own in interfaces().items() if own == address), None)


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as listener:
        listener.bind(("", 0))
        return listener.getsockname()[1]


def problem_with_port(port: int) -> str | None:
    """Why nobody could listen on this port here; None if one can."""
    try:
        # The socket may reuse the address, as the rendezvous may: closed connections in TIME_WAIT do no harm.
        socket.create_server(("", port)).close()
    except OSError as error:
        return IN_USE if error.errno == errno.EADDRINUSE else str(error.strerror or error)
    return None
