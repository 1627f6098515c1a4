"""A small disk that can be filled: a file system in memory, where the machine lets us mount one."""

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

_SIZE = 192 << 20
_BALLAST = "ballast"


class Disk:
    """can_fill: whether it is a disk of its own, rather than a folder of the machine's."""

    def __init__(self, folder: Path, can_fill: bool):
        self.folder, self.can_fill = folder, can_fill

    def fill(self, left: int) -> None:
        """Leaves room for so many KiB at most."""
        free = os.statvfs(self.folder).f_bavail * os.statvfs(self.folder).f_frsize
        with (self.folder / _BALLAST).open("wb") as file, contextlib.suppress(OSError):
            os.posix_fallocate(file.fileno(), 0, max(1, free - 1024 * left))

    def empty(self) -> None:
        (self.folder / _BALLAST).unlink(missing_ok=True)


@contextlib.contextmanager
def mounted(folder: Path) -> Iterator[Disk]:
    """The disk at a folder, which is made."""
    folder.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={_SIZE}", "tmpfs", str(folder)]
    can_fill = subprocess.run(mount, capture_output=True).returncode == 0
    try:
        yield Disk(folder, can_fill)
    finally:
        if can_fill:
            subprocess.run(["umount", "--lazy", str(folder)], capture_output=True)
