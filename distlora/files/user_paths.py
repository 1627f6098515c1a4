"""Paths as users write them: with `~`, and perhaps such as no file can have."""

import os
from pathlib import Path

from distlora.errors import UserError
from distlora.files.problems import sentence_on

#: Of longer paths, messages show the beginning.
_SHOWN = 100


def expanded(path: str | os.PathLike[str]) -> Path:
    """The path with the home in the place of `~` or `~user`; as it is, where nobody has that name."""
    return Path(os.path.expanduser(path))


def user_path(path: str, where: str) -> Path:
    """The same of a path that may lead to nothing. Raises UserError if that cannot even be asked: a name is
    too long, a folder above may not be searched, it holds what no name can. where: what asks for it, such as
    data.path."""
    found = expanded(path)
    try:
        os.stat(found)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:
        raise UserError(
            f"{where}: {sentence_on(OSError(error.errno, error.strerror), _shown(found))}"
        ) from None
    except ValueError:  # a NUL, or half of a character
        raise UserError(f"{where}: no file can have the name {_shown(found)}") from None
    return found


def is_file(path: Path) -> bool:
    """Whether a file is there; False for a path that cannot even be asked for."""
    try:
        return path.is_file()
    except OSError:
        return False


def _shown(path: Path) -> str:
    text = str(path)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"
