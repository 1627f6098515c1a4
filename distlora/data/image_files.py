"""Images in local files: the official files of MNIST, CIFAR and STL-10, NumPy archives, and class folders.

Every split is read into rows with an `image`, which is an array of bytes or the path of an image file, and a
label. Arrays stay bytes, and files are opened when a batch needs them. Nothing that could execute code is
read: no pickle, which CIFAR's "python version" is.
"""

import math
import re
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from distlora.data.readers import Row, is_read
from distlora.data.readers.npz_arrays import read_npz
from distlora.data.readers.packed import opened_bytes
from distlora.errors import UserError
from distlora.sentences import nearest

Splits = dict[str, Callable[[], list[Row]]]

#: Folders that are splits and not classes.
SPLIT_NAMES = ("train", "test", "validation", "val", "valid", "dev")
#: Names that a split may have in local files, by its name on the hub.
_OTHER_NAMES = {"validation": ("val", "valid", "dev")}
#: Names of the images and of the labels in a NumPy archive.
_ARRAYS = (("images", "labels"), ("x", "y"))
_IDX = re.compile(r"(?P<split>train|test|t10k)-images[-.]idx3-ubyte(\.gz)?")
_CIFAR_SHAPE, _STL_SHAPE = (3, 32, 32), (3, 96, 96)
#: The first bytes of a pickle of any protocol that a binary file may have.
_PICKLE = b"\x80"


def splits_of(path: Path) -> Splits | None:
    """What reads each split of a folder or file of images; None for other files, such as tables.

    Raises UserError for files that hold images in a form that is not read.
    """
    if path.is_file():
        return _splits_of_file(path)
    if not path.is_dir():
        return None
    found = _array_splits(path)
    if found:
        return found
    _refuse_pickles(path)
    return _folder_splits(path)


def _array_splits(path: Path) -> Splits:
    """Those of a folder whose files hold many images each."""
    return _idx_splits(path) or _cifar_splits(path) or _stl_splits(path) or _npz_splits(path)


def read_split(splits: Splits, split: str, path: Path) -> list[Row]:
    """The rows of one split. Raises UserError for one that is not there, and for what is wrong with it."""
    name = next((name for name in (split, *_OTHER_NAMES.get(split, ())) if name in splits), None)
    if name is None:
        raise UserError(
            f"data: {path} has no split {split!r}{nearest(split, splits) or ''} (it has {', '.join(splits)})"
        )
    return splits[name]()


def class_names(path: Path, splits: Iterable[str]) -> tuple[str, ...] | None:
    """The names of the folders of these splits, sorted; None if the images lie in no folders."""
    found = _folder_splits(path) if path.is_dir() and not _array_splits(path) else None
    if found is None:
        return None
    rows = (row for split in dict.fromkeys(splits) for row in read_split(found, split, path))
    return tuple(sorted({row["label"] for row in rows}))


def _splits_of_file(path: Path) -> Splits | None:
    if path.suffix == ".npz":
        return {"train": partial(_read_npz, path)}
    if path.suffix == ".bin" or _IDX.fullmatch(path.name) or "labels-idx1" in path.name:
        raise UserError(f"data.path: {path} is one of several files of a data set; name their folder")
    if path.suffix in (".tar", ".tgz", ".zip") or path.name.endswith(".tar.gz"):
        raise UserError(f"data.path: {path} is packed; unpack it and name the folder")
    return None


def _bytes(file: Path) -> bytes:
    """The content of a file, unpacked if it is gzip."""
    try:
        with opened_bytes(file) as stream:
            return stream.read()
    except MemoryError:
        raise UserError(f"data.path: {file} needs more memory than there is; take a part of it") from None


# ---------------------------------------------------------------------- MNIST


def _idx_splits(path: Path) -> Splits:
    found: Splits = {}
    for file in sorted(path.iterdir()):
        match = _IDX.fullmatch(file.name)
        if match:
            split = "train" if match["split"] == "train" else "test"
            found.setdefault(split, partial(_read_idx_pair, file))
    return found


def _read_idx_pair(images_file: Path) -> list[Row]:
    name = re.sub(r"\.gz$", "", images_file.name)
    name = name.replace("images", "labels").replace("idx3", "idx1")
    places = [images_file.with_name(name), images_file.with_name(f"{name}.gz")]
    labels_file = next((file for file in places if file.exists()), None)
    if labels_file is None:
        raise UserError(f"data.path: {images_file} has no {name} beside it, fetch that too")
    images, labels = _read_idx(images_file, 3), _read_idx(labels_file, 1)
    return _rows(images, {"label": labels}, f"{images_file} and {labels_file.name}")


def _read_idx(file: Path, dimensions: int) -> np.ndarray:
    """An array of bytes in the format of MNIST's page: magic number, sizes, content."""
    data, start = _bytes(file), 4 + 4 * dimensions
    if len(data) < start or data[:4] != bytes([0, 0, 8, dimensions]):
        raise UserError(
            f"data.path: {file} is no idx file of bytes in {dimensions} dimensions, fetch it again"
        )
    shape = tuple(np.frombuffer(data, ">u4", dimensions, 4).tolist())
    if len(data) != start + math.prod(shape):
        raise UserError(
            f"data.path: {file} has {len(data)} bytes, and its header promises {start + math.prod(shape)}, "
            "fetch it again"
        )
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)


# ---------------------------------------------------------------------- CIFAR and STL-10


def _cifar_splits(path: Path) -> Splits:
    """The binary version: CIFAR-10 in batches with one label a row, CIFAR-100 with a coarse and a fine
    one.
    """
    batches = sorted(path.glob("data_batch_*.bin"))
    tens = {"train": batches, "test": [path / "test_batch.bin"]}
    hundreds = {"train": [path / "train.bin"], "test": [path / "test.bin"]}
    found: Splits = {}
    for files_of, columns in ((tens, ["label"]), (hundreds, ["coarse_label", "fine_label"])):
        for split, files in files_of.items():
            if files and all(file.is_file() for file in files):
                found.setdefault(split, partial(_read_cifar, files, columns))
    return found


def _read_cifar(files: list[Path], columns: list[str]) -> list[Row]:
    rows = []
    for file in files:
        table = _records(file, len(columns) + math.prod(_CIFAR_SHAPE))
        images = table[:, len(columns) :].reshape(-1, *_CIFAR_SHAPE).transpose(0, 2, 3, 1)
        rows += _rows(images, {name: table[:, place] for place, name in enumerate(columns)}, str(file))
    return rows


def _stl_splits(path: Path) -> Splits:
    names = ("train", "test", "unlabeled")
    return {name: partial(_read_stl, path, name) for name in names if (path / f"{name}_X.bin").is_file()}


def _read_stl(path: Path, split: str) -> list[Row]:
    """Images whose columns follow each other, and labels from 1 on. The unlabeled ones get no label."""
    table = _records(path / f"{split}_X.bin", math.prod(_STL_SHAPE))
    images = table.reshape(-1, *_STL_SHAPE).transpose(0, 3, 2, 1)
    if split == "unlabeled":
        labels = np.full(len(images), -1)
    else:
        labels = np.frombuffer(_bytes(path / f"{split}_y.bin"), np.uint8).astype(np.int64) - 1
    return _rows(images, {"label": labels}, str(path / f"{split}_X.bin"))


def _records(file: Path, size: int) -> np.ndarray:
    """(records, size) bytes."""
    data = _bytes(file)
    if not data or len(data) % size:
        raise UserError(
            f"data.path: {file} has {len(data)} bytes, which are no whole records of {size}, fetch it again"
        )
    return np.frombuffer(data, np.uint8).reshape(-1, size)


def _refuse_pickles(path: Path) -> None:
    for name in ("data_batch_1", "train"):
        file = path / name
        if file.is_file():
            with file.open("rb") as stream:
                if stream.read(1) == _PICKLE:
                    raise UserError(
                        f"data.path: {file} is a pickle, which can execute code and is never loaded; "
                        "take the binary version of the data set"
                    )


# ---------------------------------------------------------------------- NumPy archives


def _npz_splits(path: Path) -> Splits:
    return {file.stem: partial(_read_npz, file) for file in sorted(path.glob("*.npz"))}


def _read_npz(file: Path) -> list[Row]:
    """Bytes (n, height, width) or (n, height, width, channels), and n labels."""
    arrays = read_npz(file, {name for pair in _ARRAYS for name in pair})
    names = next((pair for pair in _ARRAYS if set(pair) <= set(arrays)), None)
    if names is None:
        have = ", ".join(arrays) or "none"
        raise UserError(f"data.path: {file} has the arrays {have}, wanted images and labels, or x and y")
    images, labels = (arrays[name] for name in names)
    if images.ndim == 4 and images.shape[-1] == 1:
        images = images[..., 0]
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or (images.ndim == 4 and images.shape[-1] != 3):
        raise UserError(
            f"data.path: {names[0]} of {file} is {images.dtype} of shape {images.shape}, "
            "wanted uint8 of (n, height, width) or (n, height, width, 3)"
        )
    if labels.dtype.kind not in "iuU" or labels.shape[:1] != (labels.size,):
        raise UserError(
            f"data.path: {names[1]} of {file} is {labels.dtype} of shape {labels.shape}, "
            "wanted a list of whole numbers or names"
        )
    return _rows(images, {"label": labels.reshape(-1)}, str(file))


def _rows(images: np.ndarray, labels: dict[str, np.ndarray], origin: str) -> list[Row]:
    """One row an image, which stays a view of the array."""
    for values in labels.values():
        if len(values) != len(images):
            raise UserError(
                f"data.path: {origin} have {len(images)} images and {len(values)} labels, fetch them again"
            )
    columns = [values.tolist() for values in labels.values()]
    return [{"image": image} | dict(zip(labels, row)) for image, *row in zip(images, *columns)]


# ---------------------------------------------------------------------- folders


def _folder_splits(path: Path) -> Splits | None:
    """path/class/image, which is the split train, or path/split/class/image. Tables go before folders."""
    folders = _folders(path)
    if not folders or any(map(is_read, path.iterdir())):
        return None
    if any(folder.name in SPLIT_NAMES and _folders(folder) for folder in folders):
        return {folder.name: partial(_read_classes, folder) for folder in folders if _folders(folder)}
    return {"train": partial(_read_classes, path)}


def _folders(path: Path) -> list[Path]:
    return sorted(entry for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _read_classes(path: Path) -> list[Row]:
    rows, endings = [], set(Image.registered_extensions())
    for folder in _folders(path):
        files = [file for file in sorted(folder.iterdir()) if file.suffix.lower() in endings]
        table = next(filter(is_read, sorted(folder.iterdir())), None)
        if not files and table is not None:
            raise UserError(f"data.path: {folder} holds {table.name}; name that folder in data.path")
        if not files:
            raise UserError(
                f"data.path: {folder} holds no image; images lie in folders of their classes, "
                "as in train/cat/1.png or cat/1.png"
            )
        rows += [{"image": file, "label": folder.name} for file in files]
    return rows
