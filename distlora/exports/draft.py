"""Directories that are filled under a temporary name, and get their own name when they are complete."""

import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from distlora.errors import UserError


@contextmanager
def new_directory(out: Path, may_hold: Iterable[str] = ()) -> Iterator[Path]:
    """A directory to fill, which becomes `out` if nothing is raised meanwhile.

    may_hold: names of files of an earlier export, which are replaced. Raises UserError if `out` holds others.
    """
    if out.exists() and not (out.is_dir() and {path.name for path in out.iterdir()} <= set(may_hold)):
        raise UserError(f"{out} is not an empty directory; name another one or remove it")
    draft = out.with_name(f".{out.name}.partial")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    try:
        yield draft
        _swap(draft, out)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _swap(draft: Path, out: Path) -> None:
    """Gives the draft its name. What had the name before is removed only when that is done."""
    if not out.exists():
        os.rename(draft, out)
        return
    earlier = out.with_name(f".{out.name}.earlier")
    shutil.rmtree(earlier, ignore_errors=True)
    os.rename(out, earlier)
    try:
        os.rename(draft, out)
    except OSError:
        os.rename(earlier, out)
        raise
    shutil.rmtree(earlier, ignore_errors=True)
