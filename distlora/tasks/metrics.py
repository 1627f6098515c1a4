"""How good predicted labels are: functions of (predicted, expected), two int64 tensors (n,) with n ≥ 1."""

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


METRICS = {metric.__name__: metric for metric in (accuracy, f1, matthews)}
