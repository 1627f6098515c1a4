"""Directories that are filled under a temporary name, and get their own name when they are complete."""

import contextlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from distlora.errors import UserError
from distlora.files.atomic import bring_back, flush_tree, put_in_place, remove


@contextmanager
def new_directory(out: Path, may_hold: Iterable[str] = ()) -> Iterator[Path]:
    """A directory to fill, which becomes `out` if nothing is raised meanwhile.

    may_hold: names of files of an earlier export, which are replaced. Raises UserError if `out` holds others.
    """
    bring_back_earlier(out)
    refuse_others(out, may_hold)
    draft = out.with_name(f".{out.name}.partial")
    remove(draft)
    made = [place for place in draft.parents if not place.exists()]
    draft.mkdir(parents=True)
    try:
        yield draft
        flush_tree(draft)
        put_in_place(draft, out, _earlier(out))
    finally:
        remove(draft)
        with contextlib.suppress(OSError):  # the first that holds something ends it
            for place in made:
                place.rmdir()


def refuse_others(out: Path, may_hold: Iterable[str] = ()) -> None:
    """UserError where `out` is there and holds something else than `may_hold`. Reads only."""
    if not out.exists():
        return
    others = sorted({path.name for path in out.iterdir()} - set(may_hold)) if out.is_dir() else [out.name]
    if others:
        holds = f"holds {others[0]}" if out.is_dir() else "is a file"
        raise UserError(
            f"{out} is not an empty directory ({holds}); name another one, or move away what it holds"
        )


def bring_back_earlier(out: Path) -> None:
    """Puts right what a crash may have left of a replacement, where this can be done. See `put_in_place`."""
    with contextlib.suppress(OSError):  # a place that can only be read
        bring_back(out, _earlier(out))


def _earlier(out: Path) -> Path:
    return out.with_name(f".{out.name}.earlier")
