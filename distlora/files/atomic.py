"""Files and directories that survive a crash: they are flushed to the disk, and replaced as a whole."""

import contextlib
import ctypes
import errno
import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

#: Of `renameat2`, see its manual page: the two names change their places in one step.
_HERE, _EXCHANGE = -100, 2
#: What systems say on which it does not exist, or file systems that cannot do it.
_CANNOT_EXCHANGE = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EPERM)


def write_json(path: Path, value: Any) -> str:
    """Writes a JSON file and flushes it to the disk. Returns the SHA-256 of its bytes."""
    data = (json.dumps(value, indent=1) + "\n").encode()
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return hashlib.sha256(data).hexdigest()


def write_text(path: Path, text: str, writer: str = "") -> None:
    """Replaces a file. A crash leaves the old content or the new one, never a part; so does an error, which
    leaves no other file either.

    writer: different for every process, if several may write the same file at once.
    """
    draft = path.with_name(f".{path.name}{writer and '.' + writer}.partial")
    try:
        with draft.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    except BaseException:
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)
        raise


def append_text(path: Path, text: str) -> None:
    """Adds to the end of a file: the whole text, or after an error nothing of it."""
    with open(path, "ab", buffering=0) as file:
        before, data = file.seek(0, os.SEEK_END), text.encode()
        try:
            while data:
                data = data[file.write(data) :]
        except OSError:
            with contextlib.suppress(OSError):
                file.truncate(before)
            raise


def sha256_of(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def flush_directory(path: Path) -> None:
    """Flushes a directory, so that created, renamed and removed names in it survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def flush_tree(folder: Path) -> None:
    """Flushes all files of a folder, and the folders in it, so that it can take its place."""
    for place, _, names in os.walk(folder):
        for name in names:
            if not os.path.islink(os.path.join(place, name)):
                flush_directory(Path(place, name))  # a file is flushed in the same way
        flush_directory(Path(place))


# ---------------------------------------------------------------------- replacing a directory


def put_in_place(draft: Path, final: Path, aside: Path) -> None:
    """Gives a directory that is complete and flushed the name `final`; one that has it already is removed.

    A crash at any moment leaves the old one or the new one there, whole. Where the file system cannot
    exchange two names in one step, it may be that `final` is missing and the old one is at `aside`:
    `bring_back` puts it right. All three are in the same folder. After an error the old one is in its place.
    """
    if not _is_there(final):
        os.rename(draft, final)
    elif not _exchange(draft, final):
        remove(aside)
        os.rename(final, aside)
        try:
            os.rename(draft, final)
        except BaseException:
            os.rename(aside, final)
            raise
    flush_directory(final.parent)
    for old in (draft, aside):
        remove(old)


def remove(path: Path) -> None:
    """Removes a file, a link or a whole directory, as far as that can be done."""
    if path.is_symlink() or path.is_file():
        with contextlib.suppress(OSError):
            path.unlink()
    shutil.rmtree(path, ignore_errors=True)


def bring_back(final: Path, aside: Path) -> None:
    """Gives a directory its name back where a crash came between two renames of `put_in_place`."""
    if _is_there(aside) and not _is_there(final):
        os.rename(aside, final)
        flush_directory(final.parent)


def _is_there(path: Path) -> bool:
    """Also where it is a link to nothing."""
    return os.path.lexists(path)


def _exchange(one: Path, other: Path) -> bool:
    """Whether the two have changed their names. Raises OSError for what is no matter of being able to."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):  # no Linux, or an old C library
        return False
    if rename(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in _CANNOT_EXCHANGE:
        return False
    raise OSError(code, os.strerror(code), str(other))
