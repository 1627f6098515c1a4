"""Learning-rate schedules, under the names of `transformers.get_scheduler`: the rate of every step, from
numbers alone.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

ScheduleName = Literal[
    "cosine", "linear", "constant", "constant_with_warmup", "cosine_with_restarts", "cosine_with_min_lr",
    "cosine_warmup_with_min_lr", "polynomial", "inverse_sqrt", "warmup_stable_decay",
]  # fmt: skip
#: Of a part of a run, from rate 1 to rate 0.
Curve = Literal["linear", "cosine", "1-sqrt"]

NAMES = get_args(ScheduleName)
#: Those whose first warm-up step has a rate above zero, unless they are told otherwise.
_FROM_FIRST_SHARE = ("cosine", "linear", "constant")
#: Where a polynomial ends unless it is told otherwise: transformers' `lr_end`.
_POLYNOMIAL_END = 1e-7
#: Steps by which inverse_sqrt decays without a warm-up that says it.
_TIMESCALE = 10_000
#: A schedule's settings beside `warmup_from_zero`, which all have.
SETTINGS: dict[str, tuple[str, ...]] = {
    "cosine": ("cycles",),
    "linear": (),
    "constant": (),
    "constant_with_warmup": (),
    "cosine_with_restarts": ("cycles",),
    "cosine_with_min_lr": ("cycles", "min_ratio"),
    "cosine_warmup_with_min_lr": ("cycles", "min_ratio", "first_ratio"),
    "polynomial": ("min_ratio", "power"),
    "inverse_sqrt": ("timescale",),
    "warmup_stable_decay": ("cycles", "min_ratio", "decay_ratio", "decay", "warmup"),
}


@dataclass(frozen=True)
class Schedule:
    """Learning rate by step: a warm-up, then what the name says.

    peak: the rate after warm-up. steps: length of the run. warmup_ratio: share of the steps that warm up,
    rounded up. The other fields have the meaning of transformers' keyword arguments, with lengths as shares
    of the steps and least rates as shares of the peak; None: transformers' default. cycles: `num_cycles`,
    waves of a cosine, or restarts. min_ratio: the least rate. decay_ratio: the last part of the run, in which
    warmup_stable_decay decays, rounded up. decay, warmup: that one's curves. power: of polynomial. timescale:
    steps of inverse_sqrt; None: the warm-up's. first_ratio: first rate of cosine_warmup_with_min_lr.
    warmup_from_zero: whether the first warm-up step has rate 0, as in transformers, or else peak / warm-up
    steps; None: only under the names that are not cosine, linear and constant. With True every rate is
    transformers'.
    """

    kind: ScheduleName
    peak: float
    steps: int
    warmup_ratio: float = 0.0
    cycles: float | None = None
    min_ratio: float | None = None
    decay_ratio: float = 0.1
    decay: Curve = "cosine"
    warmup: Curve = "linear"
    power: float = 1.0
    timescale: int | None = None
    first_ratio: float | None = None
    warmup_from_zero: bool | None = None

    @property
    def warmup_steps(self) -> int:
        return math.ceil(self.warmup_ratio * self.steps)

    @property
    def decay_steps(self) -> int:
        """Of warmup_stable_decay."""
        return min(math.ceil(self.decay_ratio * self.steps), self.steps - self.warmup_steps)

    def rate(self, step: int) -> float:
        """Rate of the optimizer step `step`, 0 … steps−1."""
        return self.peak * (self._warming_up(step) if step < self.warmup_steps else self._after(step))

    # ------------------------------------------------------------------ as shares of the peak

    def _warming_up(self, step: int) -> float:
        if self.kind == "cosine_warmup_with_min_lr":
            return self._from_first_ratio(step)
        from_zero = self.warmup_from_zero
        if from_zero is None:
            from_zero = self.kind not in _FROM_FIRST_SHARE
        done = (step if from_zero else step + 1) / self.warmup_steps
        if self.kind != "warmup_stable_decay":
            return done
        least = self.min_ratio or 0.0
        return least + (1 - least) * _CURVES[self.warmup](1 - done)

    def _from_first_ratio(self, step: int) -> float:
        if self.first_ratio is None:
            return (step + 1) / self.warmup_steps
        return self.first_ratio + (1 - self.first_ratio) * step / max(1, self.warmup_steps - 1)

    def _after(self, step: int) -> float:
        return _AFTER[self.kind](self, step - self.warmup_steps, self.steps - self.warmup_steps)

    def _inverse_sqrt(self, done: int, left: int) -> float:
        timescale = self.timescale or self.warmup_steps or _TIMESCALE
        return 1 / math.sqrt((done + timescale) / timescale)

    def _wave(self, share: float) -> float:
        """Of a cosine that has gone through this share of its way, between the least rate and 1."""
        least, cycles = self.min_ratio or 0.0, 0.5 if self.cycles is None else self.cycles
        wave = 0.5 * (1 + math.cos(math.pi * cycles * 2 * share))
        return max(0.0, least + (1 - least) * wave)

    def _restarts(self, done: int, left: int) -> float:
        cycles = 1.0 if self.cycles is None else self.cycles
        return 0.5 * (1 + math.cos(math.pi * ((cycles * done / left) % 1.0)))

    def _polynomial(self, done: int, left: int) -> float:
        least = _POLYNOMIAL_END / self.peak if self.min_ratio is None else self.min_ratio
        least = min(least, 1.0)
        return (1 - least) * (1 - done / left) ** self.power + least

    def _stable_then_decay(self, done: int, left: int) -> float:
        decayed = done - (left - self.decay_steps)
        if decayed < 0:
            return 1.0
        share, least = decayed / self.decay_steps, self.min_ratio or 0.0
        if self.decay == "cosine":
            return self._wave(share)
        return least + (1 - least) * _CURVES[self.decay](share)


#: From 1 to 0 while the share goes from 0 to 1.
_CURVES: dict[str, Callable[[float], float]] = {
    "linear": lambda share: 1 - share,
    "cosine": lambda share: 0.5 * (1 + math.cos(math.pi * share)),
    "1-sqrt": lambda share: 1 - math.sqrt(share),
}
#: By name: from (schedule, steps after the warm-up, how many there are of them) to the share of the peak.
_AFTER: dict[str, Callable[[Schedule, int, int], float]] = {
    "cosine": lambda schedule, done, left: schedule._wave(done / left),
    "linear": lambda schedule, done, left: 1 - done / left,
    "constant": lambda schedule, done, left: 1.0,
    "constant_with_warmup": lambda schedule, done, left: 1.0,
    "cosine_with_restarts": Schedule._restarts,
    "cosine_with_min_lr": lambda schedule, done, left: schedule._wave(done / left),
    "cosine_warmup_with_min_lr": lambda schedule, done, left: schedule._wave((done + 1) / left),
    "polynomial": Schedule._polynomial,
    "inverse_sqrt": Schedule._inverse_sqrt,
    "warmup_stable_decay": Schedule._stable_then_decay,
}
