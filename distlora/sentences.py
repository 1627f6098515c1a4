"""Parts of the sentences that tell a user what is wrong."""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice

#: Characters of a name, and names, beyond which nobody has mistyped one for another.
_LONGEST_NAME, _MOST_NAMES = 100, 1000


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of a sentence about an unknown name, such as ", did you mean rank?".

    It is empty if no known name is similar, and for a very long name. The first 1,000 known ones are tried.
    """
    if len(name) > _LONGEST_NAME:
        return ""
    short = [other for other in islice(known, _MOST_NAMES) if len(other) <= _LONGEST_NAME]
    same = [other for other in short if other.casefold() == name.casefold()]
    near = same or difflib.get_close_matches(name, short, n=1)
    return f", did you mean {near[0]}?" if near else ""


def given_twice(names: Iterable[str]) -> str | None:
    """The first name that is there for the second time; None if all are different."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return None


def counted(number: int, noun: str) -> str:
    """Such as "1 rank" and "2 ranks"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def listed(names: Iterable[object], most: int = 20) -> str:
    """Names with commas between them; of many the first, and how many there are."""
    shown = list(map(str, names))
    more = f", … ({len(shown)} in all)" if len(shown) > most else ""
    return ", ".join(shown[:most]) + more


def of_several(predicate: str) -> str:
    """What is said of one thing, as it is said of several: "are never called" for "is never called"."""
    first, _, rest = predicate.partition(" ")
    for one, several in (
        ("its weight", "their weights"), ("its place", "their place"), ("depends on it", "depends on them"),
        ("+ b by itself", "+ b by themselves"),
    ):  # fmt: skip
        rest = rest.replace(one, several)
    verbs = {"is": "are", "does": "do"}
    return f"{verbs.get(first, first)} {rest}"


def ranks_on_hosts(ranks: Sequence[int], hosts: Sequence[str] | Mapping[int, str], separator: str) -> str:
    """Such as "rank 1 on node1; ranks 2, 3 on node2", with the separator "; ". hosts: of every rank."""
    by_host: dict[str, list[str]] = {}
    for rank in ranks:
        by_host.setdefault(hosts[rank], []).append(str(rank))
    return separator.join(
        f"rank{'s' if len(numbers) > 1 else ''} {', '.join(numbers)} on {host}"
        for host, numbers in by_host.items()
    )


def first_line(error: object) -> str:
    """The first line of an exception's message or of a program's output, without a full stop.

    An exception without a message gives the name of its class.
    """
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(" .") if lines else type(error).__name__


def size_text(count: float) -> str:
    """A number of bytes in the unit that suits it: 4.7 MiB."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"
