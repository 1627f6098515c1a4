"""Small images with labels, as arrays of bytes and in the formats of official files."""

import gzip
from pathlib import Path

import numpy as np
from PIL import Image


def drawn(count: int, shape: tuple[int, ...] = (32, 32, 3), seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Random images, uint8 (count, *shape), and labels 0, 1, 2, … 9, 0, …; an image is brighter for a higher
    label.
    """
    labels = np.arange(count) % 10
    noise = np.random.default_rng(seed).integers(0, 100, (count, *shape))
    return (noise + 15 * labels.reshape(-1, *[1] * len(shape))).astype(np.uint8), labels


def write_npz(file: Path, count: int, **more) -> None:
    images, labels = drawn(count, **more)
    np.savez(file, images=images, labels=labels)


def write_mnist(folder: Path, split: str, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The two official files of a split, `train` or `t10k`, packed; what is in them."""
    images, labels = drawn(count, (28, 28))
    for name, array in (("images-idx3", images), ("labels-idx1", labels.astype(np.uint8))):
        header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
        (folder / f"{split}-{name}-ubyte.gz").write_bytes(gzip.compress(header + array.tobytes()))
    return images, labels


def write_folders(folder: Path, names: dict[str, int], size: int = 12) -> None:
    """Folders of classes with so many images each, PNG and JPEG in turn."""
    for place, (name, count) in enumerate(names.items()):
        (folder / name).mkdir(parents=True)
        for number in range(count):
            colour = (40 * place, 20 * number, 100)
            Image.new("RGB", (size, size), colour).save(
                folder / name / f"{number}.{('png', 'jpg')[number % 2]}"
            )
