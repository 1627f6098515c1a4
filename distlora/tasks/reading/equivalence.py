"""Whether two expressions in LaTeX are the same mathematics: math-verify, in a process of its own.

See `equivalence_worker` for why. The process is started at the first comparison, and anew after one that it
did not survive.
"""

import atexit
import json
import os
import re
import subprocess
import sys
import threading
from functools import lru_cache

from distlora.errors import UserError
from distlora.tasks.reading import equivalence_worker
from distlora.tasks.reading.final_answer import LONGEST
from distlora.tasks.reading.plain_text import repeating_decimals

#: A number in another base than ten, `4210_5`, which the library reads without its base.
_WITH_BASE = re.compile(r"\d\s*_")
_IN_LATEX = str.maketrans(
    {
        **dict.fromkeys("−–", "-"),
        "×": "\\times ",
        "÷": "\\div ",
        "√": "\\sqrt ",
        "∞": "\\infty ",
        "∪": "\\cup ",
        "∅": "\\emptyset ",
        **dict.fromkeys("≤⩽≦", "\\le "),
        **dict.fromkeys("≥⩾≧", "\\ge "),
        "≠": "\\ne ",
    }
)


def equivalent(text: str, expected: str) -> bool:
    """Whether a text gives the expected expression. False if that is not found out within a few seconds of
    processor time (`equivalence_worker.SECONDS`). Raises UserError if the library cannot be used.

    A list (`1,2`) is the set of its elements, in any order. A pair or an interval (`(1,2)`) is neither, as in
    the grader of MATH (arXiv 2103.03874); math-verify alone lets a list pass for it.
    """
    text, expected = _as_latex(text), _as_latex(expected)
    if not text or not expected or max(len(text), len(expected)) > LONGEST:
        return False
    if {_shape(text), _shape(expected)} == {"pair", "list"}:
        return False
    if _WITH_BASE.search(text) or _WITH_BASE.search(expected):
        return re.sub(r"[\s{}]", "", text) == re.sub(r"[\s{}]", "", expected)
    try:
        return _compare(text, expected)
    except _Unanswered:
        return False


class _Unanswered(Exception):
    """The process ended over a comparison: its time or its memory was not enough."""


@lru_cache(maxsize=4096)
def _compare(text: str, expected: str) -> bool:
    """Raises _Unanswered, which the cache does not keep."""
    return _WORKER.ask(json.dumps([text, expected]))


def _as_latex(text: str) -> str:
    """The expression without the signs around it; several of them with commas between."""
    text = re.sub(r"(?<!\\)\$|\\[()\[\]]|\*\*|[\n\r`]", " ", repeating_decimals(text)).translate(_IN_LATEX)
    text = re.sub(r"\\varnothing(?![a-zA-Z])|\\\{\s*\\\}", r"\\emptyset ", text)
    text = re.sub(r"\\([lg])t(?![a-zA-Z])", lambda found: "<" if found[1] == "l" else ">", text)
    text = re.sub(r",?\s+(?:and|or)\s+|,?\s*\\text\s*\{\s*(?:and|or)\s*\}", ", ", text)
    text = re.sub(r"(\\[dtc]?frac)\s*(\\(?!sqrt|frac|text)[A-Za-z]+)", r"\1{\2}", text)
    return " ".join(text.split()).rstrip(".;, ")


def _shape(text: str) -> str:
    """ "pair" of `(1,2)` and `[1,2)`, "list" of `1,2` and `\\{1,2\\}`, "" of all else."""
    text = re.sub(r"\\(?:left|right)(?![a-zA-Z])|\s", "", text).replace("{,}", "").replace("\\!", "")
    depth, commas, whole = 0, set(), len(text) > 1
    for place, sign in enumerate(text):
        depth += (sign in "([{") - (sign in ")]}")
        whole &= depth > 0 or place == len(text) - 1 or text[:2] == "\\{" and place == 0
        if sign == ",":
            commas.add(depth)
    if whole and 1 in commas:
        return "pair" if text[0] in "([" else "list" if text.startswith("\\{") else ""
    return "list" if 0 in commas and not re.search(r"[=<>]|\\(?:in|le|ge|ne|cup)", text) else ""


class _Worker:
    """The process, and what keeps two threads from speaking to it at once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._owner: int | None = None

    def ask(self, line: str) -> bool:
        """The process's answer to a line. Raises _Unanswered if it ended over it."""
        with self._lock:
            process = self._running()
            try:
                process.stdin.write(line + "\n")
                process.stdin.flush()
                answer = process.stdout.readline()
            except BrokenPipeError:
                answer = ""
            if not answer:
                self._end()
                raise _Unanswered
            return answer == "1\n"

    def _running(self) -> subprocess.Popen[str]:
        if self._process is None or self._owner != os.getpid():
            # Of a session of its own, so that a signal to all processes of a run does not reach it. It ends
            # with its input.
            self._process = subprocess.Popen(
                [sys.executable, "-P", equivalence_worker.__file__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                encoding="utf-8",
                start_new_session=True,
            )
            self._owner = os.getpid()
            atexit.register(self._end)
            if self._process.stdout.readline().strip() != equivalence_worker.READY:
                self._end()
                raise UserError(
                    "mathematical answers cannot be judged: math-verify does not load, "
                    f"install it with {sys.executable} -m pip install math-verify"
                )
        return self._process

    def _end(self) -> None:
        """Ends the process, unless it belongs to the process that this one was forked from."""
        process, self._process = self._process, None
        if process is None or self._owner != os.getpid():
            return
        atexit.unregister(self._end)
        process.kill()
        for stream in (process.stdin, process.stdout):
            try:
                stream.close()
            except BrokenPipeError:
                pass
        process.wait()


_WORKER = _Worker()
