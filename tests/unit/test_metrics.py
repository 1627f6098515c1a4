"""The metrics against their definitions, worked out in another way."""

import numpy as np
import pytest
import torch

from distlora.tasks.metrics import METRICS, accuracy, f1, matthews


def draws(count=20):
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        expected = torch.randint(0, 2, (37,), generator=generator)
        flip = torch.rand(37, generator=generator) < 0.3
        yield torch.where(flip, 1 - expected, expected), expected


def test_accuracy():
    assert accuracy(torch.tensor([0, 1, 2, 1]), torch.tensor([0, 1, 1, 1])) == 0.75


def test_matthews_is_the_correlation_of_the_two_columns():
    for predicted, expected in draws():
        assert matthews(predicted, expected) == pytest.approx(np.corrcoef(predicted, expected)[0, 1])
        assert matthews(1 - predicted, expected) == pytest.approx(-matthews(predicted, expected))
    assert matthews(torch.tensor([1, 1, 1]), torch.tensor([0, 1, 1])) == 0


def test_f1_is_the_harmonic_mean_of_precision_and_recall_of_label_1():
    for predicted, expected in draws():
        right = ((predicted == 1) & (expected == 1)).sum() / 1.0
        precision, recall = right / (predicted == 1).sum(), right / (expected == 1).sum()
        assert f1(predicted, expected) == pytest.approx(float(2 / (1 / precision + 1 / recall)))
    assert f1(torch.tensor([0, 0]), torch.tensor([0, 0])) == 0
    assert f1(torch.tensor([0, 1]), torch.tensor([1, 0])) == 0


def test_every_metric_is_found_by_its_name():
    assert set(METRICS) == {"accuracy", "f1", "matthews"}
