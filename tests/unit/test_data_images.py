"""Image data: official files, archives, folders and tables of every kind, batches, and what bad data gets."""

import io
import pickle
from types import SimpleNamespace

import datasets
import numpy as np
import pyarrow
import pytest
import torch
from PIL import Image
from pyarrow import parquet

from distlora.data import ImageRows, collate_images, image_labels, load_images
from distlora.data.image_files import splits_of
from distlora.errors import UserError
from distlora.tasks import TASKS, ImageTask
from tests.tiny_images import drawn, write_folders, write_mnist, write_npz


def section(path, task="images", **more):
    settings = {"fields": None, "template": None, "labels": None, "max_length": 40, "split": "train"}
    return SimpleNamespace(task=task, path=str(path), **(settings | more))


def pixels(images):
    """Raw bytes, channels first."""
    return torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in images]).float()


def read(path, split="train", **more):
    """(images as arrays in RGB, labels) of a split."""
    samples = load_images(section(path, **more), split).samples
    arrays = [np.array(sample.rows.image(sample.position)) for sample in samples]
    return arrays, [sample.label for sample in samples]


def png(array):
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, "png")
    return stream.getvalue()


# ---------------------------------------------------------------------- formats


def test_mnist(tmp_path):
    train, labels = write_mnist(tmp_path, "train", 12)
    test, _ = write_mnist(tmp_path, "t10k", 5)
    found, numbers = read(tmp_path, "train[10:]+test", task="mnist")
    assert numbers == [*labels[10:], *range(5)]
    expected = np.concatenate([train[10:], test])
    assert all((image == grey[..., None]).all() for image, grey in zip(found, expected)), "grey becomes RGB"
    file = tmp_path / "t10k-images-idx3-ubyte.gz"
    file.with_name("t10k-images.idx3-ubyte").write_bytes(file.read_bytes())
    assert len(read(tmp_path, "test", task="mnist")[0]) == 5, "one of two copies is read"


def test_cifar(tmp_path):
    images, labels = drawn(6)
    planes = images.transpose(0, 3, 1, 2).reshape(6, -1)
    tens = np.concatenate([labels[:, None].astype(np.uint8), planes], 1)
    (tmp_path / "data_batch_1.bin").write_bytes(tens[:4].tobytes())
    (tmp_path / "data_batch_2.bin").write_bytes(tens[4:].tobytes())
    (tmp_path / "test_batch.bin").write_bytes(tens[:1].tobytes())
    found, numbers = read(tmp_path, task="cifar10")
    assert np.array_equal(found, images) and numbers == labels.tolist()
    assert len(read(tmp_path, "test", task="cifar10")[0]) == 1


def test_cifar100(tmp_path):
    images, labels = drawn(6)
    planes = images.transpose(0, 3, 1, 2).reshape(6, -1)
    table = np.concatenate([np.full((6, 1), 19, np.uint8), labels[:, None].astype(np.uint8) * 11, planes], 1)
    (tmp_path / "train.bin").write_bytes(table.tobytes())
    found, numbers = read(tmp_path, task="cifar100")
    assert np.array_equal(found, images) and numbers == [11 * label for label in labels]
    coarse = section(tmp_path, task="cifar100", fields={"label": "coarse_label"})
    assert [sample.label for sample in load_images(coarse, "train").samples] == [19] * 6


def test_stl10(tmp_path):
    images, labels = drawn(3, (96, 96, 3))
    (tmp_path / "train_X.bin").write_bytes(images.transpose(0, 3, 2, 1).tobytes())
    (tmp_path / "train_y.bin").write_bytes((labels + 1).astype(np.uint8).tobytes())
    (tmp_path / "unlabeled_X.bin").write_bytes(images[:1].transpose(0, 3, 2, 1).tobytes())
    found, numbers = read(tmp_path, task="stl10")
    assert np.array_equal(found, images) and numbers == labels.tolist()
    with pytest.raises(UserError, match="no row of .* has a label"):
        read(tmp_path, "unlabeled", task="stl10")


@pytest.mark.parametrize("names", [("images", "labels"), ("x", "y")])
@pytest.mark.parametrize("shape", [(8, 8, 3), (8, 8), (8, 8, 1)])
def test_npz(tmp_path, names, shape):
    images, labels = drawn(4, shape)
    np.savez_compressed(tmp_path / "test.npz", **dict(zip(names, (images, labels[:, None]))), more=[1.5])
    found, numbers = read(tmp_path, "test", task="cifar10")
    expected = np.broadcast_to(images.reshape(4, 8, 8, -1), (4, 8, 8, 3))
    assert np.array_equal(found, expected) and numbers == [0, 1, 2, 3]
    assert read(tmp_path / "test.npz", "train[1:2]", task="cifar10")[1] == [1], "one file is the split train"


def test_folders_name_the_labels(tmp_path):
    write_folders(tmp_path / "train", {"cat": 2, "ape": 3})
    write_folders(tmp_path / "val", {"cat": 1})
    (tmp_path / "train" / "cat" / "notes.txt").write_text("not an image, and not called one")
    chosen = section(tmp_path)
    assert image_labels(chosen) == ("ape", "cat")
    assert read(tmp_path)[1] == [0, 0, 0, 1, 1]
    assert read(tmp_path, "validation")[1] == [1]
    assert image_labels(section(tmp_path, labels=["cat", "ape", "dog"])) == ("cat", "ape", "dog")
    assert read(tmp_path, labels=["cat", "ape", "dog"])[1] == [1, 1, 1, 0, 0]
    write_folders(tmp_path / "flat", {"x": 1, "train": 1})
    assert image_labels(section(tmp_path / "flat")) == ("train", "x"), "a class, since images lie in it"


def test_parquet_and_hub_rows_are_decoded_when_they_are_needed(tmp_path, monkeypatch):
    images, labels = drawn(3, (8, 8, 3))
    rows = [{"bytes": png(image), "path": None} for image in images]
    parquet.write_table(pyarrow.table({"img": rows, "label": labels.tolist()}), tmp_path / "train.parquet")
    found, numbers = read(tmp_path, task="cifar10")
    assert np.array_equal(found, images) and numbers == [0, 1, 2]
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=list("abc"))})
    hub = datasets.Dataset.from_dict({"img": rows, "label": [2, 1, -1]}, features)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: hub)
    monkeypatch.setattr(datasets.Image, "decode_example", lambda *_: pytest.fail("decoded"))
    found, numbers = read("some/data", task="cifar10")
    assert np.array_equal(found, images[:2]) and numbers == [2, 1], "without the row that has no label"


def test_images_become_upright_and_rgb(tmp_path):
    write_folders(tmp_path, {"a": 1, "b": 1})
    turned = Image.new("RGB", (8, 4))
    exif = turned.getexif()
    exif[0x0112] = 6  # to be turned by 90°
    turned.save(tmp_path / "a" / "0.png", exif=exif)
    Image.new("P", (5, 5), 3).save(tmp_path / "a" / "1.gif")
    Image.new("LA", (5, 5)).save(tmp_path / "b" / "1.png")
    assert [image.shape for image in read(tmp_path)[0]] == [(8, 4, 3), (5, 5, 3), (12, 12, 3), (5, 5, 3)]


def test_image_tasks_have_their_labels():
    sizes = {name: len(task.labels) for name, task in TASKS.items() if isinstance(task, ImageTask)}
    assert sizes == {"cifar10": 10, "cifar100": 100, "stl10": 10, "mnist": 10, "images": 0}
    assert all(len(set(TASKS[name].labels)) == count for name, count in sizes.items())


# ---------------------------------------------------------------------- batches


def test_a_batch_holds_its_samples_and_an_empty_one_has_no_target(tmp_path):
    write_npz(tmp_path / "train.npz", 5)
    samples = load_images(section(tmp_path, "cifar10"), "train").samples
    batch = collate_images(samples[1:3], pixels, "cpu", torch.bfloat16)
    assert batch["labels"].tolist() == [1, 2] and batch["pixel_values"].dtype is torch.bfloat16
    assert torch.equal(batch["pixel_values"].float().byte(), pixels(
        [sample.rows.image(sample.position) for sample in samples[1:3]]
    ).bfloat16().float().byte())  # fmt: skip
    empty = collate_images([], pixels, "cpu", torch.float32)
    assert empty["labels"].tolist() == [-100] and empty["pixel_values"].shape[0] == 1


def test_samples_keep_bytes(tmp_path):
    write_npz(tmp_path / "train.npz", 50)
    rows = ImageRows(section(tmp_path, "cifar10"), "train").rows
    assert {row["image"].dtype for row in rows} == {np.dtype("uint8")}
    assert len({id(row["image"].base) for row in rows}) == 1, "views of one array"


# ---------------------------------------------------------------------- mistakes


def test_pickles_are_never_loaded(tmp_path):
    (tmp_path / "data_batch_1").write_bytes(pickle.dumps({b"data": 1}))
    with pytest.raises(UserError, match="is a pickle, .* take the binary version"):
        read(tmp_path, task="cifar10")
    np.savez(tmp_path / "train.npz", images=np.array([{}]), labels=np.array([1]))
    with pytest.raises(UserError, match="cannot be read as a NumPy archive .*pickle"):
        read(tmp_path, task="cifar10")


def _npz(folder, **arrays):
    np.savez(folder / "train.npz", **arrays)


def _cut(folder):
    write_mnist(folder, "train", 3)
    file = folder / "train-images-idx3-ubyte.gz"
    file.write_bytes(file.read_bytes()[:-30])


def _short(folder):
    write_mnist(folder, "train", 3)
    header = bytes([0, 0, 8, 3, 0, 0, 0, 3, 0, 0, 0, 28, 0, 0, 0, 28])
    (folder / "train-images-idx3-ubyte").write_bytes(header + b"7")
    (folder / "train-images-idx3-ubyte.gz").unlink()


def _no_image(folder):
    write_folders(folder, {"a": 1, "b": 1})
    (folder / "b" / "9.png").write_text("hello")


def _deep(folder):
    write_folders(folder, {"a": 1, "b": 1})
    Image.fromarray(np.zeros((4, 4), np.uint16)).save(folder / "b" / "9.png")


def _table(folder, **columns):
    parquet.write_table(pyarrow.table(columns), folder / "train.parquet")


IMAGES, NUMBERS = drawn(2, (4, 4, 3))
#: What is in the folder, the task or settings, and what the sentence says.
MISTAKES = {
    "truncated gzip": (_cut, {"task": "mnist"}, "images-idx3-ubyte.gz is damaged"),
    "truncated idx": (_short, {"task": "mnist"}, "has 17 bytes, and its header promises 2368"),
    "no labels": (
        lambda folder: (write_mnist(folder, "train", 2), (folder / "train-labels-idx1-ubyte.gz").unlink()),
        {"task": "mnist"}, "has no train-labels-idx1-ubyte beside it",
    ),
    "no idx": (
        lambda folder: (write_mnist(folder, "train", 2),
                        (folder / "train-labels-idx1-ubyte").write_bytes(b"hello, world")),
        {"task": "mnist"}, "is no idx file",
    ),
    "missing split": (
        lambda folder: write_npz(folder / "tarin.npz", 2), {"task": "cifar10"},
        "has no split 'train', did you mean tarin?",
    ),
    "cut cifar": (
        lambda folder: (folder / "train.bin").write_bytes(b"x" * 4000), {"task": "cifar100"},
        "has 4000 bytes, which are no whole records of 3074",
    ),
    "npz without keys": (
        lambda folder: _npz(folder, a=IMAGES, b=NUMBERS), {"task": "cifar10"}, "has the arrays a, b, wanted",
    ),
    "npz of floats": (
        lambda folder: _npz(folder, x=IMAGES / 255, y=NUMBERS), {"task": "cifar10"}, "x of .* is float64",
    ),
    "npz of planes": (
        lambda folder: _npz(folder, x=IMAGES.transpose(0, 3, 1, 2), y=NUMBERS), {"task": "cifar10"},
        r"of shape \(2, 3, 4, 4\), wanted",
    ),
    "npz of probabilities": (
        lambda folder: _npz(folder, x=IMAGES, y=np.eye(2)), {"task": "cifar10"}, "y of .* wanted a list",
    ),
    "npz of other length": (
        lambda folder: _npz(folder, x=IMAGES, y=np.arange(3)), {"task": "cifar10"}, "2 images and 3 labels",
    ),
    "no npz": (
        lambda folder: (folder / "train.npz").write_text("x"), {"task": "cifar10"}, "as a NumPy archive",
    ),
    "label out of range": (
        lambda folder: _npz(folder, x=IMAGES, y=np.array([3, 10])), {"task": "cifar10"},
        "row 1 of .* has the label 10, which is none of airplane",
    ),
    "wrong column": (
        lambda folder: _table(folder, picture=[b"x"], label=[1]), {"task": "cifar10"},
        "image of the task cifar10: .* has no column 'image'",
    ),
    "text for an image": (
        lambda folder: _table(folder, image=["a cat"], label=[1]), {"task": "cifar10"},
        "the image in row 0 of .* cannot be read .*a str and no image",
    ),
    "bytes of no image": (
        lambda folder: _table(folder, image=[b"abc"], label=[1]), {"task": "cifar10"}, "row 0 .*it is none",
    ),
    "file that is no image": (_no_image, {}, r"the image in .*9\.png cannot be read .it is none"),
    "16 bits": (_deep, {}, r"9\.png cannot be read .*more than 8 bits"),
    "class without images": (
        lambda folder: (write_folders(folder, {"a": 1}), (folder / "b").mkdir()), {}, "b holds no image",
    ),
    "one class": (lambda folder: write_folders(folder, {"a": 1}), {}, "lie in the folder a, wanted one"),
    "unknown class": (
        lambda folder: write_folders(folder, {"a": 1, "b": 1}), {"labels": ["a", "c"]},
        "has the label 'b', which is none of a, c",
    ),
    "labels from nowhere": (
        lambda folder: write_npz(folder / "train.npz", 2), {}, "data.labels: the task images needs them",
    ),
    "template": (
        lambda folder: write_npz(folder / "train.npz", 2), {"task": "cifar10", "template": "{image}"},
        "shows images as they are",
    ),
    "role": (
        lambda folder: write_npz(folder / "train.npz", 2), {"task": "cifar10", "fields": {"text": "image"}},
        "unknown name 'text'; choose from image, label",
    ),
    "nothing": (lambda folder: None, {"task": "cifar10"}, "no file for split 'train'"),
    "empty slice": (
        lambda folder: write_npz(folder / "train.npz", 2), {"task": "cifar10", "split": "train[5:]"},
        "has no rows",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_sentence_that_names_its_place(tmp_path, name):
    prepare, settings, expected = MISTAKES[name]
    prepare(tmp_path)
    with pytest.raises(UserError, match=f"^[^\n]*{expected}[^\n]*$"):
        read(tmp_path, **settings)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("train.bin", "is one of several files"),
        ("train-images-idx3-ubyte.gz", "is one of several files"),
        ("cifar-10-binary.tar.gz", "is packed; unpack it"),
    ],
)
def test_a_file_that_is_not_the_data_set_is_refused(tmp_path, name, expected):
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(UserError, match=expected):
        splits_of(tmp_path / name)


def test_a_damaged_image_behind_a_good_header_is_named_when_it_is_needed(tmp_path):
    images, labels = drawn(2, (64, 64, 3))
    rows = [{"bytes": png(images[0]), "path": None}, {"bytes": png(images[1])[:2000], "path": None}]
    _table(tmp_path, image=rows, label=labels.tolist())
    samples = load_images(section(tmp_path, "cifar10"), "train").samples
    with pytest.raises(UserError, match="the image in row 1 of .* cannot be read"):
        collate_images(samples, pixels, "cpu", torch.float32)
