"""Reads SLURM's short form of a list of hosts, such as `node[1-3,7],gpu-a[01-02]`."""

import re
from collections.abc import Iterator

from distlora.errors import UserError

#: Brackets of a name, and digits of a number, as SLURM writes at most.
_BRACKETS, _DIGITS = 8, 18
_PART = re.compile(rf"[^\[\],\s]*(\[[\d,-]+\][^\[\],\s]*){{0,{_BRACKETS}}}", re.ASCII)
_BRACKET = re.compile(r"\[([\d,-]+)\]", re.ASCII)


def hosts(text: str) -> Iterator[str]:
    """Yields the hosts in the order of the list. It expands the list only as far as the caller reads it.

    Numbers keep their leading zeros. An empty text yields nothing. Raises UserError for a text that is no
    such list.
    """
    end = 0
    while end < len(text):
        part = _PART.match(text, end)
        if not part[0] or text[part.end() : part.end() + 1] not in ("", ","):
            raise UserError(
                f"'{text}' is no list of hosts as SLURM writes it, such as node[1-3,7]; "
                "set MASTER_ADDR to rank 0's host"
            )
        yield from _expand(part[0])
        end = part.end() + 1


def _expand(part: str) -> Iterator[str]:
    bracket = _BRACKET.search(part)
    if bracket is None:
        yield part
        return
    for number in _numbers(bracket[1]):
        yield from _expand(f"{part[: bracket.start()]}{number}{part[bracket.end() :]}")


def _numbers(text: str) -> Iterator[str]:
    """1-3,07 -> 1, 2, 3, 07."""
    for span in filter(None, text.split(",")):
        first, _, last = span.partition("-")
        wrong = not first or (not last and "-" in span) or "-" in last
        if wrong or max(len(first), len(last)) > _DIGITS or int(last or first) < int(first):
            raise UserError(
                f"'{span}' is no span of numbers in a list of hosts, such as 1-3; "
                "set MASTER_ADDR to rank 0's host"
            )
        for number in range(int(first), int(last or first) + 1):
            yield str(number).zfill(len(first))
