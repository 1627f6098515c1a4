"""Images: single files of every format, and files of many."""

import gzip
import io
from pathlib import Path

import numpy as np
from hypothesis import strategies as st
from PIL import Image

from distlora.data import load_images
from tests.fuzz.damage import damaged, written
from tests.fuzz.data import section
from tests.fuzz.rule import Loader

_PIXELS = (np.arange(8 * 8 * 3) % 251).astype(np.uint8).reshape(8, 8, 3)
FORMATS = ("png", "jpeg", "gif", "bmp", "tiff", "webp", "ppm", "tga", "ico")


def _image(kind: str) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(_PIXELS).save(stream, kind)
    return stream.getvalue()


def _npz(compress: bool) -> bytes:
    stream = io.BytesIO()
    save = np.savez_compressed if compress else np.savez
    save(stream, images=np.stack([_PIXELS] * 2), labels=np.array([0, 1]))
    return stream.getvalue()


IDX_IMAGES = bytes([0, 0, 8, 3, 0, 0, 0, 2, 0, 0, 0, 4, 0, 0, 0, 4]) + bytes(range(32))
IDX_LABELS = bytes([0, 0, 8, 1, 0, 0, 0, 2]) + bytes([1, 2])


def _all(task: str, path: Path, **more) -> None:
    for sample in load_images(section(task, path, **more), "train").samples:
        sample.rows.image(sample.position)


def _in_folders(given: tuple[bytes, str], folder: Path) -> None:
    content, kind = given
    written(folder, content, f"train/a/1.{kind}")
    written(folder, _image("png"), "train/b/1.png")
    _all("images", folder)


def _archive(content: bytes, folder: Path) -> None:
    _all("images", written(folder, content, "train.npz"), labels=["a", "b"])


def _idx(given: tuple[bytes, bytes, bool], folder: Path) -> None:
    images, labels, packed = given
    pack, end = (gzip.compress, ".gz") if packed else (bytes, "")
    written(folder, pack(images), f"train-images-idx3-ubyte{end}")
    written(folder, pack(labels), f"train-labels-idx1-ubyte{end}")
    _all("mnist", folder)


def _records(content: bytes, folder: Path) -> None:
    written(folder, content, "data_batch_1.bin")
    _all("cifar10", folder)


_BY_KIND = st.sampled_from(FORMATS).flatmap(lambda kind: st.tuples(damaged([_image(kind)]), st.just(kind)))
LOADERS = (
    Loader("images", _BY_KIND, _in_folders, share=1.5),
    Loader("NumPy archives", damaged([_npz(False), _npz(True)], [b"<u8", b"|O", b"(9999999999,)"]), _archive),
    Loader("idx files", st.tuples(damaged([IDX_IMAGES]), damaged([IDX_LABELS], most=2), st.booleans()), _idx),
    Loader("CIFAR's files", damaged([bytes(3073), bytes(2 * 3073)], most=2), _records, share=0.3),
)
