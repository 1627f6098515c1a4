"""Images with a label: rows from any source made into samples and batches.

Samples hold no pixels. An image is opened, made RGB and prepared for the model when a batch needs it, so that
a data set takes no more memory than its files.
"""

import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from distlora.data import examples, labelled, sources
from distlora.data.encode import Encoded
from distlora.data.image_files import class_names, read_split, splits_of
from distlora.data.labelled import LabelledRows, label_names
from distlora.data.sources import Row
from distlora.errors import UserError
from distlora.files.problems import file_errors_explained
from distlora.files.user_paths import user_path
from distlora.models.targets import IGNORE
from distlora.progress import each
from distlora.sentences import first_line
from distlora.tasks import get_task

#: Pillow's formats that are opened. Others are read by programs beside it, such as Ghostscript.
_FORMATS = (
    "AVIF", "BMP", "DIB", "GIF", "ICO", "JPEG", "JPEG2000", "MPO", "PCX", "PNG", "PPM", "SGI", "TGA", "TIFF",
    "WEBP",
)  # fmt: skip

#: Bytes at either end of an image's file that a fingerprint looks at.
_ENDS = 512


class DataSection(labelled.DataSection, Protocol):
    """What this file reads of a recipe's `data:` section, beside what all tasks with labels have."""

    split: str


def image_labels(section: DataSection) -> tuple[str, ...]:
    """The names of the labels, in the order of their numbers: the task's, the recipe's, or those of the
    folders in which the images of the training split lie, sorted.

    Raises UserError if nothing says them, or they are said wrongly.
    """
    if get_task(section.task).labels or section.labels is not None:
        return label_names(section)
    path = section.path and user_path(section.path, "data.path")
    parts = sources.parse_split(section.split)
    with file_errors_explained(f"data.path: {path}"):
        names = class_names(path, (part.name for part in parts)) if path else None
    if names is None:
        raise UserError(
            f"data.labels: the task {section.task} needs them where the images do not lie in folders of "
            "their classes, list the names, as in [cat, dog]"
        )
    if len(names) < 2:
        raise UserError(
            f"data.path: all images of {section.path} lie in the folder {names[0]}, "
            "wanted one folder for each of at least two classes"
        )
    return names


class ImageRows(LabelledRows):
    """The rows of a split in order, each as the number of its label or None; and their images.

    To make one checks the section against the columns.
    """

    roles = ("image", "label")
    names_of = staticmethod(image_labels)

    def __init__(self, section: DataSection, split: str):
        super().__init__(section, split)
        self.column = self._columns["image"]
        self.cells = _Cells(self.rows, self.column)

    def read(self, section: DataSection, split: str) -> Sequence[Row]:
        path = section.path and user_path(section.path, "data.path")
        with file_errors_explained(f"data.path: {path}"):
            found = splits_of(path) if path else None
        if found is None:
            return examples.load_rows(section, split)
        rows = sources.select(sources.parse_split(split), partial(read_split, found, path=path))
        if not rows:
            raise UserError(f"data: {examples.origin(section, split)} has no rows, choose another split")
        return rows

    def __iter__(self) -> Iterator[int | None]:
        """Looks into every image as far as its header, so that a file that is none shows before training."""
        for position, row in enumerate(self.rows):
            with self._explained(row, position), _opened(row[self.column]) as image:
                _check_depth(image)
            yield self._label(row, position)

    def image(self, position: int) -> Image.Image:
        """The image of a row, upright and in RGB. Raises UserError if it is damaged."""
        row = self.rows[position]
        with self._explained(row, position), _opened(row[self.column]) as image:
            return ImageOps.exif_transpose(image).convert("RGB")

    @contextmanager
    def _explained(self, row: Row, position: int) -> Iterator[None]:
        value = row.get(self.column)
        where = str(value) if isinstance(value, Path) else f"row {position} of {self.origin}"
        try:
            yield
        except UserError:
            raise
        except Exception as error:  # damage shows in any of Pillow's exceptions, and in many of Python's
            unknown = isinstance(error, UnidentifiedImageError)
            what = "it is none" if unknown else first_line(error) or type(error).__name__
            raise UserError(f"data: the image in {where} cannot be read ({what}), replace it") from None


class _Cells:
    """The cells of one column by their row; bytes of the hub as views of the file that holds them."""

    def __init__(self, rows: Sequence[Row], column: str):
        self._rows, self._column = rows, column
        if hasattr(rows, "column_names"):
            self._rows, self._column = rows.select_columns(column).with_format("arrow"), None

    def __getitem__(self, position: int) -> Any:
        row = self._rows[position]
        if self._column is not None:
            return row[self._column]
        cell = row.column(0)[0]
        if hasattr(cell, "as_buffer"):
            return cell.as_buffer()
        if not hasattr(cell, "keys") or not {"bytes", "path"} <= set(cell):
            return cell.as_py()
        return {"bytes": cell["bytes"].as_buffer(), "path": cell["path"].as_py()}


def _opened(value: Any) -> Image.Image:
    """A row's image as far as its header: of an array, a file, or the bytes of a file."""
    if isinstance(value, np.ndarray):
        return Image.fromarray(value)
    if isinstance(value, dict) and {"bytes", "path"} & set(value):
        value = value.get("bytes") or Path(value.get("path") or "")
    if isinstance(value, bytes):
        value = io.BytesIO(value)
    if isinstance(value, io.BytesIO | Path):
        Image.init()
        return Image.open(value, formats=[name for name in _FORMATS if name in Image.OPEN])
    found = "no value" if value is None else f"a {type(value).__name__}"
    raise ValueError(f"{found} and no image")


def _seen(value: Any) -> list:
    """What a fingerprint compares: the pixels of an array; of a file its name and size; of the bytes of one
    their number and both ends, so that of the hub's rows only these are read.
    """
    if isinstance(value, np.ndarray):
        return [value.tobytes()]
    if isinstance(value, dict):
        value = value.get("bytes") or Path(value.get("path") or "")
    if not isinstance(value, Path):
        return [len(value), bytes(value[:_ENDS]), bytes(value[-_ENDS:])]
    return [value.name, value.stat().st_size]


def _check_depth(image: Image.Image) -> None:
    if image.mode.startswith(("I", "F")):
        raise ValueError(f"its mode {image.mode} has more than 8 bits, convert it")


@dataclass(frozen=True)
class ImageSample:
    """An image, by its place, and the number of its label."""

    rows: ImageRows
    position: int
    label: int

    def identity(self) -> list:
        """What tells it from others, for JSON: its place and its label. The pixels would take a second
        reading.
        """
        return [self.rows.origin, self.position, self.label]

    def content(self) -> list:
        """What a fingerprint is made of: the label, and as much of the image as needs no decoding."""
        return [self.label, *_seen(self.rows.cells[self.position])]


def load_images(section: DataSection, split: str) -> Encoded:
    """The samples of a split expression of a recipe's data section; rows without a label are dropped.

    Raises UserError for everything that is wrong with the section, its files or its rows, except images whose
    header is right and whose content is damaged; these show when they are needed.
    """
    rows = ImageRows(section, split)
    encoded = Encoded([], truncated=None, dropped=0, why_dropped="they have no label")
    for position, label in enumerate(each(rows, "looking at images", "images", len(rows))):
        if label is None:
            encoded.dropped += 1
        else:
            encoded.samples.append(ImageSample(rows, position, label))
    if not encoded.samples:
        raise UserError(f"data: no row of {rows.origin} has a label, choose another split")
    return encoded


def blank_images() -> list[Image.Image]:
    """Images of different sizes and shapes, for what is known without data."""
    return [Image.new("RGB", size) for size in ((32, 32), (60, 40), (40, 300))]


def collate_images(
    samples: Sequence[ImageSample],
    pixels: Callable[[list[Image.Image]], Tensor],
    device: torch.device | str,
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    """`pixel_values`, (batch, channels, height, width) in `dtype`, and `labels`, int64 (batch,).

    pixels: from images in RGB to float32 of that shape. No samples give one black image without a label, for
    a pass of weight zero.
    """
    images = [sample.rows.image(sample.position) for sample in samples] or blank_images()[:1]
    labels = [sample.label for sample in samples] or [IGNORE]
    return {
        "pixel_values": pixels(images).to(device, dtype),
        "labels": torch.tensor(labels, dtype=torch.int64, device=device),
    }
