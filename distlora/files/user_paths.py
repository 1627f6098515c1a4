"""Paths as users write them: with `~`, and perhaps such as no file can have."""

import os
from pathlib import Path

from distlora.errors import UserError
from distlora.files.problems import sentence_on

#: Of longer paths, messages show the beginning.
_SHOWN = 100


def expanded(path: str | os.PathLike) -> Path:
    """The path with the home in the place of `~` or `~user`; as it is, where nobody has that name."""
    return Path(os.path.expanduser(path))


def user_path(path: str, where: str) -> Path:
    """The same of a path that may lead to nothing. Raises UserError if that cannot even be asked: a name is
    too long, a folder above may not be searched. where: what asks for it, such as data.path."""
    found = expanded(path)
    try:
        found.exists()
    except OSError as error:
        text = str(found)
        shown = text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"
        raise UserError(f"{where}: {sentence_on(OSError(error.errno, error.strerror), shown)}") from None
    return found
