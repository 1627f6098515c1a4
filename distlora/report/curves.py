"""Curves of the losses as points, apart from how they are drawn: smoothed, and the mean over seeds."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from distlora.report.compare import Setting
from distlora.report.runs import RunRecord

TRAINING, EVALUATION = "train/loss", "eval/loss"
#: The part of a run over which its curve is smoothed by default.
PART = 1 / 30


@dataclass(frozen=True)
class Curve:
    """One setting. x, mean: (n,), the smoothed mean over seeds, of finished runs if there are any. raw: (x,
    y) of every seed as measured, with NaN for what was not finite. marks: x of the recompositions.
    """

    label: str
    x: np.ndarray
    mean: np.ndarray
    raw: tuple[tuple[np.ndarray, np.ndarray], ...]
    marks: tuple[float, ...] = ()


def curves(settings: Sequence[Setting], tag: str, smooth: int | None, by_samples: bool) -> list[Curve]:
    """The curves of a tag, one for every setting that has it.

    smooth: steps that are averaged; None: a thirtieth of the run; 1: none. by_samples: x counts samples and
    not steps, for runs whose global batches differ.
    """
    found = (_curve(setting, tag, smooth, by_samples) for setting in settings)
    return [curve for curve in found if curve is not None]


def _curve(setting: Setting, tag: str, smooth: int | None, by_samples: bool) -> Curve | None:
    factor = setting.runs[0].batch if by_samples else 1
    raw = [_points(run, tag) for run in setting.runs]
    finished = [points for run, points in zip(setting.runs, raw) if run.steps and run.reached >= run.steps]
    # The mean is over the same seeds at every step: where one is missing, it would jump.
    seeds = [(x, y) for x, y in finished or raw if len(x)]
    if not seeds:
        return None
    steps = sorted(set.intersection(*(set(x.tolist()) for x, _ in seeds)))
    width = smooth or max(1, round(PART * len(steps)))
    smoothed = [smooth_values(y[np.isin(x, steps)], width) for x, y in seeds]
    mean = np.mean(smoothed, axis=0) if steps else np.empty(0)
    marks = sorted({step * factor for run in setting.runs for step in run.swaps})
    scaled = tuple((x * factor, y) for x, y in raw)
    return Curve(setting.label, np.array(steps) * factor, mean, scaled, tuple(marks))


def _points(run: RunRecord, tag: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values, NaN for what is not finite."""
    steps, values = run.curve(tag)
    y = np.array(values, float)
    return np.array(steps, int), np.where(np.isfinite(y), y, np.nan)


def smooth_values(values: np.ndarray, width: int) -> np.ndarray:
    """The mean of the `width` values around each one, fewer at the ends so that it stays in their middle.

    values: (n,) float64; a NaN counts in no mean and stays NaN.
    """
    known = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(known, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(known)])
    places = np.arange(len(values))
    half = np.minimum(width // 2, np.minimum(places, len(values) - 1 - places))
    low, high = places - half, places + half + 1
    number = counts[high] - counts[low]
    means = (sums[high] - sums[low]) / np.maximum(number, 1)
    return np.where(known, means, np.nan)


def limits(found: Sequence[Curve]) -> tuple[float, float] | None:
    """Of the y axis: all of the smoothed curves, and of the raw ones all but the rare peaks. None without a
    finite value.
    """
    smooth = np.concatenate([curve.mean for curve in found] or [np.empty(0)])
    raw = np.concatenate([y for curve in found for _, y in curve.raw] or [np.empty(0)])
    smooth, raw = smooth[np.isfinite(smooth)], raw[np.isfinite(raw)]
    if not len(raw):
        return None
    ends = [*np.percentile(raw, [0.5, 99.5]), *([smooth.min(), smooth.max()] if len(smooth) else [])]
    low, high = min(ends), max(ends)
    room = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    return low - room, high + room


def panels(found: Sequence[Setting], most: int) -> list[tuple[str, list[Setting]]]:
    """Settings in parts of at most `most` for a panel each, with a title: all in one, or else by method."""
    if len(found) <= most:
        return [("", list(found))]
    parts = []
    for method in dict.fromkeys(setting.method for setting in found):
        members = [setting for setting in found if setting.method == method]
        count = math.ceil(len(members) / most)
        size = math.ceil(len(members) / count)
        for number in range(count):
            title = method if count == 1 else f"{method} ({number + 1} of {count})"
            parts.append((title, members[number * size : (number + 1) * size]))
    return parts
