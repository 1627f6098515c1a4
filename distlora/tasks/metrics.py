"""How good predicted labels are: pure functions of (predicted, expected), int64 tensors of equal length that
is not 0.
"""

from torch import Tensor


def accuracy(predicted: Tensor, expected: Tensor) -> float:
    """Share (0 … 1) of the right ones."""
    return float((predicted == expected).double().mean())


def f1(predicted: Tensor, expected: Tensor) -> float:
    """Harmonic mean (0 … 1) of precision and recall of label 1; 0 where it is neither predicted nor expected."""
    right = int(((predicted == 1) & (expected == 1)).sum())
    named = int((predicted == 1).sum()) + int((expected == 1).sum())
    return 2 * right / named if named else 0.0


def matthews(predicted: Tensor, expected: Tensor) -> float:
    """Matthews correlation (-1 … 1) of label 1 against the others; 0 where all are predicted, or expected, to
    be alike.
    """
    found, there, count = predicted == 1, expected == 1, len(expected)
    both, first, second = int((found & there).sum()), int(found.sum()), int(there.sum())
    spread = first * (count - first) * second * (count - second)
    return (both * count - first * second) / spread**0.5 if spread else 0.0


METRICS = {metric.__name__: metric for metric in (accuracy, f1, matthews)}
