"""What file systems and files say when something is wrong with them, in sentences for the user."""

import contextlib
import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from distlora.errors import UserError

#: What the user can do about an error that comes from the disk or from the path that was given.
_REMEDIES = {
    errno.ENOSPC: "make room there",
    errno.EDQUOT: "make room there, or have the quota raised",
    errno.EFBIG: "raise the limit on the size of files (ulimit -f)",
    errno.EROFS: "make it writable, or name another place",
    errno.EIO: "check the disk",
    errno.ENAMETOOLONG: "give a shorter name",
    errno.ELOOP: "remove the links that lead in a circle",
    errno.ENOTDIR: "name a place below directories alone",
    errno.EISDIR: "name a file",
}
#: There is no room for more, though what is there can still be replaced or removed.
FULL = (errno.ENOSPC, errno.EDQUOT)


def is_of_the_disk(error: OSError) -> bool:
    """Whether it comes from the state of the file system or from a path, and not from a mistake in the
    program."""
    return error.errno in _REMEDIES


def sentence_on(error: OSError, what: object = None) -> str:
    """What is wrong and, where that is known, what to do. what: that was read or written; by default the
    file that the error names."""
    named = error.filename if isinstance(error.filename, str | os.PathLike) else None
    place = what if what is not None else named or "a file"
    other = f" ({named})" if named is not None and str(named) != str(place) else ""
    remedy = _REMEDIES.get(error.errno or 0)
    return f"{place}: {error.strerror or error}{other}" + (f"; {remedy}" if remedy else "")


@contextmanager
def file_errors_explained(what: object) -> Iterator[None]:
    """Turns a failing disk or file into one sentence."""
    try:
        yield
    except OSError as error:
        raise UserError(sentence_on(error, what)) from error
    except SafetensorError as error:
        raise UserError(f"{what}: a safetensors file is damaged ({error})") from error


class WriteErrors:
    """The first error of what one rank writes while a run goes on, such as metrics and logs.

    Such an error must not end this rank alone, where the others would wait for it: it is kept until all ranks
    agree on it.
    """

    def __init__(self) -> None:
        self.first: UserError | None = None

    @contextmanager
    def kept(self, what: object) -> Iterator[None]:
        """A context whose file errors are kept and not raised."""
        try:
            with file_errors_explained(what):
                yield
        except UserError as error:
            self.first = self.first or error


# ---------------------------------------------------------------------- what cannot be read


def dangling_link(path: Path) -> str | None:
    """Names the link on the way to `path` that leads to nothing; None without such a link."""
    for place in (path, *path.parents):
        with contextlib.suppress(OSError):
            if place.is_symlink() and not place.exists():
                return f"{place} is a link to {os.readlink(place)}, which is not there"
    return None


def why_unreadable(path: Path) -> str | None:
    """Why a file cannot be opened: a link without a target, no permission, a failing disk. None if it can, or
    if nothing of that name is there."""
    try:
        # Of a pipe nothing can be read, and opening it would wait for a writer.
        os.close(os.open(path, os.O_RDONLY | os.O_NONBLOCK))
    except FileNotFoundError:
        return dangling_link(path)
    except OSError as error:
        return sentence_on(error, path)
    return None


def first_unreadable(folder: Path) -> str | None:
    """The same for the files of a folder: the first that cannot be opened."""
    try:
        paths = sorted(folder.iterdir())
    except OSError as error:
        return dangling_link(folder) or sentence_on(error, folder)
    return next(filter(None, map(why_unreadable, paths)), None)
