"""The header of a safetensors file, checked before anything is allocated by it.

A file begins with eight bytes of length; then comes JSON: dtype, shape and place of every tensor; then the
numbers, without gaps. (https://huggingface.co/docs/safetensors)
"""

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from distlora.files.json_files import parse_json

#: Bytes of a header at most, as in safetensors' own reader.
LARGEST_HEADER = 100_000_000
#: Bits of a number, by the format's names of dtypes.
BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64,
    "F64": 64, "C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip
_METADATA = "__metadata__"
#: How the small file begins that stands for a large one in a repository of git.
_GIT_LFS = b"version "
_LENGTH_BYTES = 8
#: No file holds a tensor with a longer side, or with more of them.
_LONGEST, _MOST_SIDES = 1 << 48, 32


@dataclass(frozen=True)
class StoredTensor:
    """dtype: the format's name of it. begin, end: bytes within the numbers."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class Header:
    """The tensors of a file by name, and what else it says of itself."""

    tensors: dict[str, StoredTensor]
    metadata: dict[str, str]


def read_header(path: Path) -> Header:
    """The header of a file whose tensors all lie in it, one behind the other.

    Raises OSError, and SafetensorError with the file's name for everything else.
    """
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        try:
            length = _length(file.read(_LENGTH_BYTES), size)
            return _parsed(file.read(length), size - _LENGTH_BYTES - length)
        except ValueError as error:
            raise SafetensorError(f"{path.name}: {error}") from None


def _length(start: bytes, size: int) -> int:
    if len(start) < _LENGTH_BYTES:
        raise ValueError(f"header too small: the file has {size} bytes")
    if start == _GIT_LFS:
        raise ValueError("it is a pointer of Git LFS and not the file itself")
    length, room = int.from_bytes(start, "little"), size - _LENGTH_BYTES
    if length > min(room, LARGEST_HEADER):
        raise ValueError(f"its header would have {length} bytes, and the file has {room} more")
    return length


def _parsed(text: bytes, size: int) -> Header:
    """size: bytes of the numbers. Raises ValueError."""
    if not text.startswith(b"{"):
        raise ValueError("its header is no JSON object")
    content = parse_json(text)
    metadata = content.pop(_METADATA, {}) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("its metadata are not texts by name")
    tensors = {name: _tensor(name, entry) for name, entry in content.items()}
    _check_places(tensors, size)
    return Header(tensors, metadata)


def _tensor(name: str, entry: Any) -> StoredTensor:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"tensor {name[:80]} is not described by dtype, shape and data_offsets")
    dtype, shape, place = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise ValueError(f"tensor {name[:80]} has the unknown dtype {str(dtype)[:40]}")
    if not _are_counts(shape):
        raise ValueError(f"tensor {name[:80]} has the shape {str(shape)[:60]}")
    if not _are_counts(place) or len(place) != 2:
        raise ValueError(f"tensor {name[:80]} has the place {str(place)[:60]}")
    bits = math.prod(shape) * BITS[dtype]
    if bits % 8 or place[1] - place[0] != bits // 8:
        raise ValueError(f"tensor {name[:80]} has another size than its shape {str(shape)[:60]} says")
    return StoredTensor(dtype, tuple(shape), *place)


def _are_counts(values: Any) -> bool:
    if not isinstance(values, list) or len(values) > _MOST_SIDES:
        return False
    return all(type(value) is int and 0 <= value < _LONGEST for value in values)


def _check_places(tensors: dict[str, StoredTensor], size: int) -> None:
    """Raises ValueError unless the tensors fill the numbers, without gaps and overlaps."""
    end, before = 0, "the header"
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        if tensor.begin != end:
            kind = "overlaps" if tensor.begin < end else "leaves a gap behind"
            raise ValueError(f"tensor {name[:80]} {kind} {before[:80]}")
        end, before = tensor.end, name
    if end != size:
        raise ValueError(f"its tensors have {end} bytes, and the file holds {size}")
