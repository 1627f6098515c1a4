"""How good predictions are: functions of (predicted, expected), two tensors (n,) with n ≥ 1, int64 for labels
and floating-point for scores.
"""

import torch
from torch import Tensor


def accuracy(predicted: Tensor, expected: Tensor) -> float:
    """The share (0 … 1) of the right labels."""
    return float((predicted == expected).double().mean())


def f1(predicted: Tensor, expected: Tensor) -> float:
    """The harmonic mean (0 … 1) of precision and recall of label 1.

    It is 0 if label 1 is neither predicted nor expected.
    """
    right = int(((predicted == 1) & (expected == 1)).sum())
    named = int((predicted == 1).sum()) + int((expected == 1).sum())
    return 2 * right / named if named else 0.0


def matthews(predicted: Tensor, expected: Tensor) -> float:
    """The Matthews correlation (-1 … 1) of label 1 against the others.

    It is 0 if all predicted labels, or all expected ones, are on the same side.
    """
    predicted_one, expected_one, count = predicted == 1, expected == 1, len(expected)
    both = int((predicted_one & expected_one).sum())
    first, second = int(predicted_one.sum()), int(expected_one.sum())
    spread = first * (count - first) * second * (count - second)
    return (both * count - first * second) / spread**0.5 if spread else 0.0


def pearson(predicted: Tensor, expected: Tensor) -> float:
    """The linear correlation (-1 … 1) of scores. It is 0 if all predicted scores, or all expected ones, are
    equal.
    """
    first, second = (scores.double() - scores.double().mean() for scores in (predicted, expected))
    if any(bool((scores == scores[0]).all()) for scores in (predicted, expected)):
        return 0.0
    return float((first @ second / (first.norm() * second.norm())).clamp(-1, 1))


def spearman(predicted: Tensor, expected: Tensor) -> float:
    """The correlation (-1 … 1) of the ranks of scores; equal scores have the mean of their ranks."""
    return pearson(_ranks(predicted), _ranks(expected))


def _ranks(scores: Tensor) -> Tensor:
    """(n,) float64: the ranks from 1 on, of equal scores the mean."""
    _, groups, sizes = torch.unique(scores, return_inverse=True, return_counts=True)
    last = sizes.cumsum(0).double()
    means: Tensor = last - (sizes.double() - 1) / 2
    return means[groups]


METRICS = {metric.__name__: metric for metric in (accuracy, f1, matthews, pearson, spearman)}
