"""Parts of the sentences that tell a user what is wrong."""

import difflib
from collections.abc import Iterable


def nearest(name: str, known: Iterable[str]) -> str:
    """`, did you mean rank?` if a known name resembles `name`, else nothing: the end of a sentence about an
    unknown name.
    """
    near = difflib.get_close_matches(name, list(known), n=1)
    return f", did you mean {near[0]}?" if near else ""


def first_line(error: object) -> str:
    """What an exception, or the output of a program, says in its first line, without a full stop; the name of
    its class where it says nothing.
    """
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(" .") if lines else type(error).__name__
