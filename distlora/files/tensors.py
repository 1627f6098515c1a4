"""Tensors on disk: safetensors files, which are written one tensor at a time, flushed, and split where they
would become too large.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from distlora.errors import UserError
from distlora.files.atomic import write_json

#: Dtype and shape of tensors, by name.
Plan = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]

_DTYPE_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.int64: "I64", torch.int32: "I32",
    torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
_DTYPES = {name: dtype for dtype, name in _DTYPE_NAMES.items()}


class TensorWriter:
    """Writes one safetensors file tensor by tensor, so that only one of them must be in memory.

    safetensors' own writer needs all tensors of a file at once. plan: dtype and shape of every tensor. The
    tensors must be written in `order`. After the `with` block the file is on the disk, and `sha256` is its
    checksum.
    """

    def __init__(self, path: Path, plan: Plan, metadata: Mapping[str, str] | None = None):
        # Wide dtypes come first, because the offset of a tensor must be a multiple of its element's size.
        self.order = sorted(plan, key=lambda name: -plan[name][0].itemsize)
        self._plan, self._written = plan, 0
        self._digest = hashlib.sha256()
        self._file = open(path, "wb")
        self._put(_header(plan, self.order, {"format": "pt"} | dict(metadata or {})))

    def __enter__(self) -> "TensorWriter":
        return self

    def write(self, name: str, tensor: Tensor) -> None:
        """Writes the next tensor. Raises ValueError if it is not the next one, or not as planned."""
        if self._written == len(self.order) or name != self.order[self._written]:
            raise ValueError(f"{name} is not the next tensor of the plan")
        if (tensor.dtype, tuple(tensor.shape)) != self._plan[name]:
            raise ValueError(
                f"{name} is {tensor.dtype} {tuple(tensor.shape)} and not {self._plan[name]} as planned"
            )
        self._put(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        self._written += 1

    def __exit__(self, kind, error, trace) -> None:
        with self._file:
            if kind is None:
                if self._written < len(self.order):
                    raise ValueError(f"{self.order[self._written]} was not written")
                self._file.flush()
                os.fsync(self._file.fileno())

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()

    def _put(self, data) -> None:
        self._file.write(data)
        self._digest.update(data)


def _header(plan: Plan, order: list[str], metadata: dict[str, str]) -> bytes:
    """The start of the file: eight bytes of length, then JSON, padded with spaces to a multiple of eight."""
    header, offset = {"__metadata__": metadata}, 0
    for name in order:
        dtype, shape = plan[name]
        end = offset + dtype.itemsize * math.prod(shape)
        header[name] = {"dtype": _DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write_split(
    directory: Path, group: str, tensors: Iterable[tuple[str, Tensor]], limit: int
) -> dict[str, str]:
    """Writes `GROUP.safetensors`, or several `GROUP-00001-of-0000n.safetensors` and an index.

    limit: bytes of the tensors of one file, and so in memory. A larger tensor gets a file of its own. Returns
    {file name: SHA-256}.
    """
    parts, weight_map = [], {}
    for number, batch in enumerate(_batches(tensors, limit), 1):
        path = directory / f"{group}-{number:05}.safetensors"
        parts.append((path, list(batch), _write_file(path, batch)))
        batch.clear()
    digests = {}
    for number, (path, names, digest) in enumerate(parts, 1):
        final = (
            f"{group}.safetensors"
            if len(parts) == 1
            else f"{group}-{number:05}-of-{len(parts):05}.safetensors"
        )
        os.rename(path, directory / final)
        digests[final] = digest
        weight_map |= dict.fromkeys(names, final)
    if len(parts) > 1:
        index = f"{group}.safetensors.index.json"
        digests[index] = write_json(directory / index, {"weight_map": weight_map})
    return digests


def _batches(tensors: Iterable[tuple[str, Tensor]], limit: int) -> Iterator[dict[str, Tensor]]:
    """Yields tensors in a dict of at most `limit` bytes. It is always the same dict: the caller clears it."""
    batch: dict[str, Tensor] = {}
    for name, tensor in tensors:
        if batch and sum(other.nbytes for other in batch.values()) + tensor.nbytes > limit:
            yield batch
        batch[name] = tensor
    yield batch


def _write_file(path: Path, tensors: Mapping[str, Tensor]) -> str:
    with TensorWriter(
        path, {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    ) as writer:
        for name in writer.order:
            writer.write(name, tensors[name])
    return writer.sha256


class TensorFiles:
    """Tensors by name, from `GROUP.safetensors` or from several such files with an index.

    Only those that are asked for are read.
    """

    def __init__(self, directory: Path, group: str):
        """Raises UserError if neither exists, and OSError or safetensors' error for unreadable files."""
        self.directory, self._open = directory, {}
        single, index = directory / f"{group}.safetensors", directory / f"{group}.safetensors.index.json"
        if index.exists():
            self._file_of: dict[str, str] = json.loads(index.read_bytes())["weight_map"]
        elif single.exists():
            self._file_of = dict.fromkeys(self._handle(single.name).keys(), single.name)
        else:
            raise UserError(f"{directory} has no {single.name}")

    @property
    def names(self) -> list[str]:
        return list(self._file_of)

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def files(self) -> dict[str, list[str]]:
        """The names of the tensors in each file."""
        files: dict[str, list[str]] = {}
        for name, file in self._file_of.items():
            files.setdefault(file, []).append(name)
        return files

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        return _DTYPES[self._slice(name).get_dtype()]

    def read(self, name: str) -> Tensor:
        return self._handle(self._file_of[name]).get_tensor(name)

    def metadata(self, file: str) -> dict[str, str]:
        return self._handle(file).metadata() or {}

    def _slice(self, name: str):
        return self._handle(self._file_of[name]).get_slice(name)

    def _handle(self, file: str):
        if file not in self._open:
            path = self.directory / file
            path.open("rb").close()  # safetensors says of all that it cannot open that it is not there
            self._open[file] = safe_open(path, framework="pt")
        return self._open[file]


def stored_name(files: TensorFiles, name: str, renamed: Mapping[str, str] | None = None) -> str:
    """The parameter's name in the pretrained files.

    A model with a head puts a prefix before the names of its base model. Files of the base model lack it.
    renamed: the names of those that have another one in the files, by that in the model.
    """
    if renamed and name not in files and name in renamed:
        return renamed[name]
    inner = name.partition(".")[2]
    return inner if name not in files and inner in files else name
