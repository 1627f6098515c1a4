"""The metrics against their definitions, worked out in another way."""

import numpy as np
import pytest
import torch

from distlora.tasks.metrics import METRICS, accuracy, f1, matthews, pearson, spearman


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


def scores(*values):
    return torch.tensor(values, dtype=torch.float32)


def test_pearson_is_the_linear_correlation():
    # By hand: deviations (-2, -1, 0, 3) and (-1, 0, -1, 2), so 8 / sqrt(14 * 6).
    assert pearson(scores(1, 2, 3, 6), scores(1, 2, 1, 4)) == pytest.approx(8 / 84**0.5)
    assert pearson(scores(1, 2, 3), scores(10, 20, 30)) == pytest.approx(1)
    assert pearson(scores(1, 2, 3), scores(3, 2, 1)) == pytest.approx(-1)
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        first, second = torch.randn(2, 50, generator=generator)
        assert pearson(first, second) == pytest.approx(np.corrcoef(first, second)[0, 1], abs=1e-6)
        assert pearson(first * 1e-4 + 3, second) == pytest.approx(pearson(first, second), abs=1e-2)


def test_spearman_is_that_of_ranks_and_equal_scores_share_theirs():
    # Ranks (1, 2.5, 2.5, 4) and (2, 3, 1, 4): deviations (-1.5, 0, 0, 1.5) and (-.5, .5, -1.5, 1.5),
    # so 3 / sqrt(4.5 * 5).
    assert spearman(scores(0.1, 2, 2, 9), scores(3, 4, 1, 5)) == pytest.approx(3 / 22.5**0.5)
    assert spearman(scores(1, 2, 3, 4), scores(1, 10, 100, 1000)) == pytest.approx(1)
    # Ranks (1, 2, 3, 4, 5) and (5, 6, 7, 8, 7) with its two sevens at 3.5: the textbook's 0.8207826817.
    assert spearman(scores(1, 2, 3, 4, 5), scores(5, 6, 7, 8, 7)) == pytest.approx(0.8207826816681233)


@pytest.mark.parametrize("metric", [pearson, spearman])
def test_equal_scores_correlate_with_nothing(metric):
    assert metric(scores(2, 2, 2), scores(1, 2, 3)) == metric(scores(1, 2, 3), scores(0.1, 0.1, 0.1)) == 0
    assert metric(scores(1), scores(1)) == 0


def test_every_metric_is_found_by_its_name():
    assert set(METRICS) == {"accuracy", "f1", "matthews", "pearson", "spearman"}
