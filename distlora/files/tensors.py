"""Tensors on disk: safetensors files, which are written one tensor at a time, flushed, and split where they
would become too large.
"""

import hashlib
import json
import math
import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from distlora.errors import UserError
from distlora.files.atomic import write_json
from distlora.files.json_files import read_json
from distlora.files.places import is_plain_name
from distlora.files.tensor_headers import Header, StoredTensor, read_header

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
        self._put(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        self._written += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._file:
            if kind is None:
                if self._written < len(self.order):
                    raise ValueError(f"{self.order[self._written]} was not written")
                self._file.flush()
                os.fsync(self._file.fileno())

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()

    def _put(self, data: bytes | memoryview) -> None:
        self._file.write(data)
        self._digest.update(data)


def _header(plan: Plan, order: list[str], metadata: dict[str, str]) -> bytes:
    """The start of the file: eight bytes of length, then JSON, padded with spaces to a multiple of eight."""
    header: dict[str, dict[str, Any]] = {"__metadata__": dict(metadata)}
    offset = 0
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
    parts, weight_map = [], dict[str, str]()
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

    Only those that are asked for are read, from files whose headers were checked before.
    """

    def __init__(self, directory: Path, group: str, files: Collection[str] | None = None):
        """files: names of those that may be read, such as the files of a manifest; None for all that
        are there.

        Raises UserError if neither exists, and OSError or safetensors' error for unreadable files.
        """
        self.directory, self._known = directory, files
        self._headers: dict[str, Header] = {}
        self._open: dict[str, Any] = {}
        single, index = f"{group}.safetensors", f"{group}.safetensors.index.json"
        #: Whether an index says where the tensors are.
        self.indexed = not self._is_there(single) and self._is_there(index)
        if self.indexed:
            self._file_of = self._read_index(index)
        elif self._is_there(single):
            self._file_of = dict.fromkeys(self._header(single).tensors, single)
        else:
            raise UserError(f"{directory} has no {single}")

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
        return self._stored(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """Raises safetensors' error for a dtype that is not read here."""
        dtype = self._stored(name).dtype
        if dtype not in _DTYPES:
            raise SafetensorError(f"{self._file_of[name]}: tensor {name} is of the dtype {dtype}")
        return _DTYPES[dtype]

    def read(self, name: str) -> Tensor:
        self.dtype(name)
        tensor: Tensor = self._handle(self._file_of[name]).get_tensor(name)
        return tensor

    def metadata(self, file: str) -> dict[str, str]:
        return self._header(file).metadata

    def check(self) -> None:
        """Looks at the headers of all files. Raises OSError, and safetensors' error for one that is damaged
        or lacks a tensor."""
        for name in self._file_of:
            self._stored(name)

    def _is_there(self, file: str) -> bool:
        return file in self._known if self._known is not None else (self.directory / file).exists()

    def _read_index(self, name: str) -> dict[str, str]:
        try:
            content = read_json(self.directory / name)
        except ValueError as error:
            raise SafetensorError(f"{name}: {error}") from None
        found = content.get("weight_map") if isinstance(content, dict) else None
        if not isinstance(found, dict) or not found:
            raise SafetensorError(f"{name}: weight_map does not name the file of each tensor")
        for file in found.values():
            plain = isinstance(file, str) and is_plain_name(file) and file.endswith(".safetensors")
            if not plain or (self._known is not None and file not in self._known):
                raise SafetensorError(f"{name}: {str(file)[:80]} is none of the files that belong to it")
        return found

    def _stored(self, name: str) -> StoredTensor:
        if name not in self._file_of:
            raise UserError(f"{self.directory}: tensor {name} is missing")
        file = self._file_of[name]
        found = self._header(file).tensors.get(name)
        if found is None:
            raise SafetensorError(f"{file}: tensor {name}, which the index puts there, is missing")
        return found

    def _header(self, file: str) -> Header:
        if file not in self._headers:
            self._headers[file] = read_header(self.directory / file)
        return self._headers[file]

    def _handle(self, file: str) -> Any:
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
