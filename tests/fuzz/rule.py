"""The rule for one loader and one example."""

import contextlib
import os
import re
import resource
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypothesis.strategies import SearchStrategy

from distlora.errors import UserError

#: Seconds of the processor for one example, and bytes beyond what the process has at its beginning.
SECONDS, MEMORY = 5.0, 1 << 30
#: Characters of a sentence.
LONGEST = 2000
#: How Python complains of a value where another kind is meant.
_PYTHON = re.compile(
    r"object has no attribute|unsupported operand|is not (iterable|subscriptable|callable)"
    r"|argument after \*\*|not all arguments converted|object cannot be interpreted"
    r"|not supported between instances"
)


@dataclass(frozen=True)
class Loader:
    """Something that reads. read: gets an example and an empty folder; what it returns does not matter.
    share: of the examples, beside the other loaders. refuses: whether it refuses anything; what is read at
    every start and only tells of others, such as a lease, counts as absent when it is damaged."""

    name: str
    examples: SearchStrategy[Any]
    read: Callable[[Any, Path], Any]
    share: float = 1.0
    refuses: bool = True


def outcome(loader: Loader, example: Any) -> str | None:
    """The sentence that refuses an example; None if it was read. AssertionError where the rule is broken."""
    with _folder() as folder, _limited_memory():
        begun = time.process_time()
        try:
            loader.read(example, folder)
            sentence = None
        except UserError as error:
            sentence = str(error).replace(f"{folder}{os.sep}", "")
        spent = time.process_time() - begun
    assert spent < SECONDS, f"{loader.name} took {spent:.1f} s"
    if sentence is not None:
        problem = problem_with(sentence)
        assert problem is None, f"{loader.name} says {sentence!r}, which {problem}"
    return sentence


def problem_with(sentence: str) -> str | None:
    """Why a text is no sentence for a user; None if it is one."""
    if not sentence.strip():
        return "is empty"
    if not sentence.isprintable():
        return "has characters that no terminal shows, or several lines"
    if len(sentence) > LONGEST:
        return f"has {len(sentence)} characters"
    if _PYTHON.search(sentence):
        return "tells of Python's inside"
    if "Traceback" in sentence or sentence[-1] in " ,;:":
        return "is no whole sentence"
    return None


@contextlib.contextmanager
def _folder() -> Iterator[Path]:
    """An empty folder, which is the current one."""
    before = os.getcwd()
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    os.chdir(folder)
    try:
        yield folder
    finally:
        os.chdir(before)
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _limited_memory() -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (_data_in_use() + MEMORY, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def _data_in_use() -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("VmData:")[2].split()[0])
