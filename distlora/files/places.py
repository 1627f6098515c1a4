"""Where names that a file gives may lead."""

from pathlib import Path


def is_plain_name(name: str) -> bool:
    """Whether a name is that of a file in a folder, and leads to no other folder."""
    return Path(name).name == name and name not in ("", ".", "..") and "\0" not in name


def leads_out_of(path: Path, *folders: Path) -> bool:
    """Whether a path, its links followed, is in none of these folders. Raises OSError for a circle."""
    try:
        place = path.resolve(strict=True)
    except FileNotFoundError:
        place = path.resolve()
    except RuntimeError:
        raise OSError(40, "Too many levels of symbolic links", str(path)) from None
    return not any(place.is_relative_to(folder.resolve()) for folder in folders)
