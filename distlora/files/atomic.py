"""Files that survive a crash: they are flushed to the disk, and replaced as a whole."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any


def write_json(path: Path, value: Any) -> str:
    """Writes a JSON file and flushes it to the disk. Returns the SHA-256 of its bytes."""
    data = (json.dumps(value, indent=1) + "\n").encode()
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return hashlib.sha256(data).hexdigest()


def write_text(path: Path, text: str, writer: str = "") -> None:
    """Replaces a file. A crash leaves the old content or the new one, never a part.

    writer: different for every process, if several may write the same file at once.
    """
    draft = path.with_name(f".{path.name}{writer and '.' + writer}.partial")
    with draft.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(draft, path)


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
