"""Fingerprints of images of the hub: those of the same files elsewhere, made without reading whole rows."""

import io
import tracemalloc
from types import SimpleNamespace

import datasets
import numpy as np
import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet

from distlora.data import fingerprint_of, load_images


def png(side, seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "png", compress_level=0)
    return {"bytes": stream.getvalue(), "path": None}


def samples_of(path, split="train"):
    return load_images(
        SimpleNamespace(
            task="cifar10", path=path, split=split, fields=None, template=None, labels=None, max_length=9
        ),
        split,
    ).samples


@pytest.fixture
def hub(monkeypatch):
    def holding(images, encoded=True):
        kind = (
            datasets.Image()
            if encoded
            else {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
        )
        features = datasets.Features(
            {"img": kind, "label": datasets.Value("int64"), "more": datasets.Value("binary")}
        )
        cells = {"img": images, "label": list(range(len(images))), "more": [b"x"] * len(images)}
        rows = datasets.Dataset.from_dict(cells, features)
        monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: rows)

    return holding


@pytest.mark.parametrize("encoded", [True, False])
def test_images_of_the_hub_and_of_a_file_have_one_fingerprint(hub, tmp_path, encoded):
    images = [png(8, seed) for seed in range(4)]
    hub(images, encoded)
    parquet.write_table(pyarrow.table({"img": images, "label": list(range(4))}), tmp_path / "train.parquet")
    for split in ("train", "train[1:3]", "train[2:]+train[:1]"):
        assert fingerprint_of(samples_of("org/name", split)) == fingerprint_of(
            samples_of(str(tmp_path), split)
        )
    before = fingerprint_of(samples_of("org/name"))
    hub([*images[:3], png(8, 9)], encoded)
    assert fingerprint_of(samples_of("org/name")).unordered != before.unordered


def test_image_files_of_the_hub_are_known_by_name_and_size(hub, tmp_path):
    (tmp_path / "a.png").write_bytes(png(8, 0)["bytes"])
    hub([{"bytes": None, "path": str(tmp_path / "a.png")}])
    assert samples_of("org/name")[0].content() == [0, "a.png", (tmp_path / "a.png").stat().st_size]


def test_only_the_ends_of_images_of_the_hub_are_read(hub):
    hub([png(1000, 0)])
    samples = samples_of("org/name")
    fingerprint_of(samples)
    tracemalloc.start()
    try:
        fingerprint_of(samples)
        assert tracemalloc.get_traced_memory()[1] < 500_000, "the image has three million bytes"
    finally:
        tracemalloc.stop()
