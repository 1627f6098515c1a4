"""Hostfiles: one line `host slots=N` for every host, as DeepSpeed's launcher and Open MPI read them."""

import re
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from distlora.cluster.addresses import is_loopback
from distlora.errors import UserError
from distlora.files.user_texts import read_user_bytes

#: A name or an address, with or without a user, that ssh cannot mistake for an option.
_HOST = re.compile(r"([A-Za-z0-9_][\w.-]*@)?[A-Za-z0-9_:][\w.:-]*", re.ASCII)


#: More ranks than any host has.
_SLOTS = re.compile(r"\d{1,6}", re.ASCII)


@dataclass(frozen=True)
class Host:
    """A line of a hostfile. name: as it is given to ssh. slots: ranks on the host. place: file and line, for
    messages.
    """

    name: str
    slots: int
    place: str

    @property
    def address(self) -> str:
        """The name without a user."""
        return self.name.rpartition("@")[2]


def read_hostfile(path: str | Path) -> list[Host]:
    """The hosts in the order of the file. The first is rank 0's. Blank lines and comments (#) are skipped.

    Raises UserError with the number of the line.
    """
    remedy = "; give a file of lines such as `node1 slots=8`"
    content = read_user_bytes(path, "a hostfile", f"{path}: no such hostfile{remedy}", remedy=remedy)
    return parse_hostfile(content, str(path))


def this_machine_alone(hosts: Sequence[Host]) -> bool:
    """Whether the only host is the machine that asks, which needs no ssh."""
    name = socket.gethostname()
    return len(hosts) == 1 and (
        is_loopback(hosts[0].address) or hosts[0].address in (name, name.partition(".")[0])
    )


def parse_hostfile(content: bytes, source: str) -> list[Host]:
    """The hosts in the content of a hostfile. source: its name, for messages. Raises as `read_hostfile`."""
    hosts: list[Host] = []
    for number, raw in enumerate(content.splitlines(), 1):
        place = f"{source}:{number}"
        if not raw.isascii():
            shown = raw.decode(errors="replace").strip()
            raise UserError(
                f"{place}: {shown!r} has a character that is not ASCII; "
                "host names and `slots=N` are plain ASCII"
            )
        line = raw.decode().partition("#")[0].strip()
        if line:
            hosts.append(_host(line, place))
    if not hosts:
        raise UserError(f"{source} names no host; write one line a host, such as `node1 slots=8`")
    _refuse_duplicates(hosts)
    return hosts


def _host(line: str, place: str) -> Host:
    name, *words = line.split()
    slots = words[0].removeprefix("slots=") if len(words) == 1 and words[0].startswith("slots=") else ""
    if not _SLOTS.fullmatch(slots):
        raise UserError(
            f"{place}: found {line!r}, wanted a host and its slots, such as `{_example(name)} slots=8`"
        )
    if not _HOST.fullmatch(name):
        raise UserError(f"{place}: {name!r} is no host name; write a name or an address that ssh reaches")
    if int(slots) == 0:
        raise UserError(f"{place}: {name} has slots=0; give the number of its ranks, or remove the line")
    return Host(name, int(slots), place)


def _example(name: str) -> str:
    """The name if it is one, else some name, for the example in a message."""
    return name if _HOST.fullmatch(name) else "node1"


def _refuse_duplicates(hosts: list[Host]) -> None:
    seen: dict[str, Host] = {}
    for host in hosts:
        other = seen.setdefault(host.address.lower(), host)
        if other is not host:
            raise UserError(
                f"{host.place}: {host.address} stands in {other.place} already; "
                "write it once, with all its slots"
            )
