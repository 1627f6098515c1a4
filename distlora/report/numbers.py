"""Numbers as texts of a report, and means over seeds."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

ABSENT = "-"
#: Scores from 0 to 1 that are shown in per cent, by the whole name or its beginning.
SHARES = ("accuracy", "f1", "exact_match", "matthews", "pass@")
#: Beginnings and ends of scores of which less is better.
LESS_IS_BETTER = ("loss", "perplexity", "error")


@dataclass(frozen=True)
class Spread:
    """Values of equal runs with different seeds. deviation: with n − 1 in the denominator; None for n = 1."""

    mean: float
    deviation: float | None
    count: int


def spread(values: Iterable[float | None]) -> Spread | None:
    """Of the values that are known; None without any."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    if not all(map(math.isfinite, known)):
        return Spread(math.nan, None, len(known))
    return Spread(fmean(known), stdev(known) if len(known) > 1 else None, len(known))


def is_share(metric: str) -> bool:
    name = metric.lower()
    return name.startswith(SHARES) or name.endswith("accuracy")


def less_is_better(metric: str) -> bool:
    name = metric.lower()
    return name.startswith(LESS_IS_BETTER) or name.endswith(LESS_IS_BETTER)


def score_text(found: Spread | None, metric: str) -> str:
    """Mean ± standard deviation, in per cent for a share."""
    if found is None:
        return ABSENT
    factor, digits = (100, 1) if is_share(metric) else (1, digits_for(found.mean))
    text = f"{found.mean * factor:.{digits}f}"
    return text if found.deviation is None else f"{text} ± {found.deviation * factor:.{digits}f}"


def best(found: Sequence[Spread | None], metric: str) -> set[int]:
    """Places of the best mean, where at least two finite ones differ."""
    means = {place: item.mean for place, item in enumerate(found) if item and math.isfinite(item.mean)}
    if len(set(means.values())) < 2:
        return set()
    top = (min if less_is_better(metric) else max)(means.values())
    return {place for place, mean in means.items() if mean == top}


def digits_for(value: float, significant: int = 4) -> int:
    """Digits behind the point that show so many significant ones, at most 6."""
    if not value or not math.isfinite(value):
        return 2
    return min(6, max(0, significant - 1 - math.floor(math.log10(abs(value)))))


def number(value: float | None, significant: int = 3) -> str:
    """Such as 0.0123, 4.56 and 1,230."""
    if value is None:
        return ABSENT
    return f"{value:,.{digits_for(value, significant)}f}"


def mean_text(values: Iterable[float | None], significant: int = 3) -> str:
    found = spread(values)
    return number(found and found.mean, significant)


def count_text(values: Iterable[float | None]) -> str:
    """The same whole number of all runs, with thousands apart."""
    known = {round(value) for value in values if value is not None}
    return " / ".join(f"{value:,}" for value in sorted(known)) or ABSENT


def bytes_text(value: float | None) -> str:
    if value is None:
        return ABSENT
    return f"{value / 2**30:.2f} GiB" if value >= 2**30 else f"{value / 2**20:.1f} MiB"


def scaled(value: float | None) -> str:
    """With a unit prefix of three decades: 1.23 G, 45.6 M."""
    if value is None:
        return ABSENT
    for factor, unit in ((1e15, " P"), (1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if abs(value) >= factor:
            return f"{value / factor:.4g}{unit}"
    return f"{value:.4g}"
