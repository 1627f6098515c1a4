"""Arrays of NumPy archives, after their headers have been compared with what the archive holds."""

import math
import zipfile
from collections.abc import Collection
from pathlib import Path
from typing import BinaryIO

import numpy as np

from distlora.data.readers.packed import most_bytes, too_large
from distlora.errors import UserError
from distlora.sentences import first_line

_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


def read_npz(file: Path, wanted: Collection[str]) -> dict[str, np.ndarray]:
    """The wanted arrays by their names, and an empty array for each other name.

    Nothing is loaded that could execute code, or that is larger than the archive says. Errors: UserError.
    """
    try:
        _check(file, wanted)
        with np.load(file, allow_pickle=False) as archive:
            return {name: archive[name] if name in wanted else np.empty(0) for name in archive.files}
    except UserError:
        raise
    except MemoryError:
        raise UserError(f"data.path: {file} needs more memory than there is; take a part of it") from None
    except Exception as error:  # damage shows in exceptions of zipfile, zlib, ast and NumPy
        raise UserError(
            f"data.path: {file} cannot be read as a NumPy archive ({first_line(error)}); check the file"
        ) from None


def _check(file: Path, wanted: Collection[str]) -> None:
    """Raises ValueError for a header that promises more than there is, and for what is no archive."""
    whole = 0
    with zipfile.ZipFile(file) as archive:
        for member in archive.infolist():
            if member.filename.removesuffix(".npy") in wanted:
                whole += member.file_size
                with archive.open(member) as stream:
                    promised = _bytes_of(stream)
                if promised > member.file_size:
                    raise ValueError(
                        f"{member.filename} has {member.file_size} bytes, its header promises {promised}"
                    )
    if whole > most_bytes(file):
        raise too_large(file)


def _bytes_of(stream: BinaryIO) -> int:
    """What the header of an array promises; 0 for objects, which are not loaded at all."""
    version = np.lib.format.read_magic(stream)
    if version not in _HEADERS:
        raise ValueError(f"an array has a header of version {version[0]}")
    shape, _, dtype = _HEADERS[version](stream)
    if min(shape, default=0) < 0:
        raise ValueError(f"an array has the shape {shape}")
    return 0 if dtype.hasobject else math.prod(shape) * max(1, dtype.itemsize)
