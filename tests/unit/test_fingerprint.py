"""Whether samples are those of before: what a fingerprint sees, and what a run directory remembers of it."""

import json
import logging
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from distlora.data import LabelledSample, Sample, fingerprint_of
from distlora.data.images import ImageSample
from distlora.errors import UserError
from distlora.training.seen_data import SeenData, seen_by

RESPONSES = [Sample([1, 2, n], [-100, 2, n], [1], str(n)) for n in range(5)]
LABELS = [LabelledSample([1, n], None, n) for n in range(5)]
SCORES = [LabelledSample([1, n], [0, 1], n / 2) for n in range(5)]


def images(*contents):
    rows = SimpleNamespace(cells=contents, origin="x")
    return [ImageSample(rows, position, 3) for position in range(len(contents))]


@pytest.mark.parametrize("samples", [RESPONSES, LABELS, SCORES])
def test_a_fingerprint_sees_content_order_and_number(samples):
    first = fingerprint_of(samples)
    assert fingerprint_of(list(samples)) == first and first.count == 5
    turned = fingerprint_of(samples[::-1])
    assert turned.ordered != first.ordered and turned.unordered == first.unordered
    for others in (samples[:-1], [*samples, samples[0]], [*samples[:-1], samples[0]], []):
        other = fingerprint_of(others)
        assert other.ordered != first.ordered and other.unordered != first.unordered


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (Sample([1, 2], [-100, 2], [1]), Sample([1, 2], [-100, -100], [1])),
        (Sample([1, 2], [-100, 2], [1]), Sample([1, 2], [-100, 2], [1], "2")),
        (LabelledSample([1, 2], [0, 0], 1), LabelledSample([1, 2], [0, 1], 1)),
        (LabelledSample([1, 2], None, 1), LabelledSample([1, 2], None, 1.5)),
        (LabelledSample([1, 2**40], None, 1), LabelledSample([1, 2**41], None, 1)),
        (images(np.zeros((2, 2), np.uint8))[0], images(np.ones((2, 2), np.uint8))[0]),
        (images(b"x" * 5000)[0], images(b"x" * 5001)[0]),
        (images(b"x" * 5000)[0], images({"bytes": b"x" * 4999 + b"y", "path": None})[0]),
    ],
)
def test_every_part_of_a_sample_counts(first, second):
    assert fingerprint_of([first]).unordered != fingerprint_of([second]).unordered


def test_an_image_file_is_known_by_its_name_and_size(tmp_path):
    (tmp_path / "a.png").write_bytes(b"x")
    first = fingerprint_of(images(tmp_path / "a.png"))
    assert fingerprint_of(images(tmp_path / "a.png")) == first
    (tmp_path / "a.png").write_bytes(b"xy")
    assert fingerprint_of(images(tmp_path / "a.png")) != first


# ---------------------------------------------------------------------- what a run directory remembers


def seen(training=RESPONSES, evaluation=None, eval_split="test"):
    def part(split, samples):
        return {"split": split, **vars(fingerprint_of(samples))}

    parts = {"training": part("train", training)}
    return SeenData(parts | ({"evaluation": part(eval_split, evaluation)} if evaluation else {}))


@pytest.mark.parametrize(
    ("now", "said"),
    [
        (seen(RESPONSES[:-1], LABELS), "training samples (split train) have changed (5 before, 4 here)"),
        (seen(RESPONSES[::-1], LABELS), "training samples (split train) are in another order than before"),
        (seen(RESPONSES, LABELS[1:]), "evaluation samples (split test) have changed (5 before, 4 here)"),
        (seen(LABELS, LABELS), "training samples (split train) have changed (5 before, 5 here)"),
    ],
)
def test_changed_data_is_refused_unless_it_is_allowed_and_then_remembered(
    tmp_path, caplog, monkeypatch, now, said
):
    seen(RESPONSES, LABELS).write(tmp_path)
    with pytest.raises(UserError) as caught:
        now.compare(tmp_path, allow_changes=False)
    assert said in str(caught.value) and "--allow-changed-data" in str(caught.value)
    monkeypatch.setattr(logging.getLogger("distlora"), "propagate", True)
    with caplog.at_level(logging.WARNING, "distlora"):
        now.compare(tmp_path, allow_changes=True)
    assert said in caplog.text
    now.write(tmp_path)
    now.compare(tmp_path, allow_changes=False)


@pytest.mark.parametrize(
    "now", [seen(), seen(RESPONSES, LABELS), seen(RESPONSES, LABELS[1:], eval_split="other")]
)
def test_equal_data_another_evaluation_split_and_older_runs_go_on(tmp_path, now):
    now.compare(tmp_path, allow_changes=False)  # nothing is remembered
    seen(RESPONSES, LABELS).write(tmp_path)
    now.compare(tmp_path, allow_changes=False)


@pytest.mark.parametrize("content", ["", "[]", "{", '{"training": 1}', '{"training": {"split": "train"}}'])
def test_a_damaged_file_is_one_sentence(tmp_path: Path, content):
    (tmp_path / "data.json").write_text(content)
    with pytest.raises(UserError, match="data.json is damaged; remove it"):
        seen().compare(tmp_path, allow_changes=False)
    seen().write(tmp_path)
    assert json.loads((tmp_path / "data.json").read_text())["training"]["count"] == 5


class _Rank1:
    """The second of two ranks, of which the first has these samples."""

    rank = 1

    def __init__(self, first):
        self.first = first

    def share(self, value):
        return self.first

    def agree(self, error):
        if error is not None:
            raise error


def test_ranks_that_read_different_rows_are_refused():
    recipe = SimpleNamespace(data=SimpleNamespace(split="train", eval_split="test"))
    of_set = SimpleNamespace(name="", objective=SimpleNamespace(recipe=recipe), samples=LABELS)
    data = SimpleNamespace(training=RESPONSES, evaluated=[of_set])
    same = seen(RESPONSES, LABELS)
    assert seen_by(_Rank1(same.parts), recipe, data) == same
    for other, name in ((seen(RESPONSES[1:], LABELS), "training"), (seen(RESPONSES, SCORES), "evaluation")):
        with pytest.raises(UserError, match=f"the {name} samples of rank 1 are others than those of rank 0"):
            seen_by(_Rank1(other.parts), recipe, data)
