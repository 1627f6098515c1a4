"""When components are replaced: plain arithmetic on steps and losses, deterministic, with a state in JSON.

A recomposition comes *after* an optimizer step; `done` counts the steps finished by then. Equal arguments
give equal decisions, so all ranks decide alike without asking each other.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from pydantic import TypeAdapter, ValidationError


@dataclass(frozen=True)
class Decision:
    """recompose: replace components now. reason: why, or why not, with the numbers; one line for the log."""

    recompose: bool
    reason: str


class RecompositionSchedule(Protocol):
    """When components are replaced in one run."""

    def after_step(self, done: int, loss: float, low_share: Callable[[], float]) -> Decision | None:
        """Called once after every step. None where nothing had to be decided.

        done: steps finished. loss: of the last step, the same on all ranks. low_share: answers the share of
        the total importance that the lower half of the components carries, 0 … 0.5. It is collective, so the
        other arguments and the state alone decide whether it is called.
        """

    def finished(self, done: int) -> bool:
        """Whether no recomposition can come after a later step than `done`. Then nothing needs to be measured
        for one.
        """

    def state(self) -> dict[str, Any]:
        """What a resumed run needs to continue with the same decisions, as JSON."""

    def restore(self, state: dict[str, Any]) -> None:
        """Takes back what `state` gave. Raises ValueError for what is no such state."""


# ---------------------------------------------------------------------- at steps that are known in advance


def fixed_steps(total: int, count: int) -> tuple[int, ...]:
    """`count` recompositions spread over a run of `total` steps: the j-th after step ⌊j·total/(count+1)⌋.

    Needs total ≥ count + 1. Then the steps are distinct, none is 0, and none is the last.
    """
    return tuple(j * total // (count + 1) for j in range(1, count + 1))


def every_steps(total: int, interval: int) -> tuple[int, ...]:
    """A recomposition after every `interval` steps of a run of `total` steps, never after the last one."""
    return tuple(range(interval, total, interval))


class FixedSchedule:
    """Recompositions after the given steps (ascending). most: their number at most; the first one that is
    left out is reported.
    """

    def __init__(self, steps: tuple[int, ...], most: int | None = None):
        self.steps, self.most = steps, len(steps) if most is None else min(most, len(steps))

    def after_step(self, done: int, loss: float, low_share: Callable[[], float]) -> Decision | None:
        if done not in self.steps:
            return None
        number = self.steps.index(done) + 1
        if number <= self.most:
            return Decision(True, f"recomposition {number} of {self.most}")
        return Decision(False, _all_made(self.most)) if number == self.most + 1 else None

    def finished(self, done: int) -> bool:
        return self.most == 0 or done >= self.steps[self.most - 1]

    def state(self) -> dict[str, Any]:
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Does nothing: the steps alone decide."""


# ---------------------------------------------------------------------- by what is measured


def freeze_start(total: int, freeze_fraction: float) -> int:
    """The step from which on nothing is replaced: the beginning of the last `freeze_fraction` of `total`
    steps, at most the last step.
    """
    return total - int(freeze_fraction * total + 1e-9)


@dataclass
class _Progress:
    """What an adaptive schedule remembers.

    The names are those of the state in a checkpoint. losses: of the last steps, at most two windows, none
    from before the last recomposition. next: no decision before so many steps. interval: steps between a
    recomposition and the next decision. swaps: recompositions made so far. judge: step at which the last one
    is judged, 0 for none. before: mean loss of the window before the last one. ended: no decision follows.
    """

    next: int
    interval: int
    losses: list[float] = field(default_factory=list)
    swaps: int = 0
    judge: int = 0
    before: float = 0.0
    ended: bool = False


_PROGRESS = TypeAdapter(_Progress)


class AdaptiveSchedule:
    """Recompositions when the loss has stopped improving and the lower half of the components hardly matters.

    total: steps of the run. most: recompositions at most. window: steps over which losses are averaged.
    improvement: the loss has stopped improving when the mean of the last window is no more than this share
    below the mean of the window before. share: replace components only while the lower half of them carries
    less than this of the total importance. freeze_fraction: nothing is replaced in this last share of the
    run, nor after its last step. interval: steps before the first decision, and from each recomposition to
    the next decision; at least two windows, so that a decision never compares losses from both sides of a
    recomposition.

    One window after a recomposition its effect is judged: if the mean loss is more than `improvement` above
    the mean before, the interval doubles. A decision against a recomposition is reconsidered after another
    window.
    """

    def __init__(
        self,
        total: int,
        most: int,
        window: int,
        improvement: float,
        share: float,
        freeze_fraction: float,
        interval: int = 0,
    ):
        self.total, self.most, self.window = total, most, window
        self.improvement, self.share = improvement, share
        self.freeze_from = freeze_start(total, freeze_fraction)
        interval = max(interval, 2 * window)
        self._now = _Progress(next=interval, interval=interval)

    def after_step(self, done: int, loss: float, low_share: Callable[[], float]) -> Decision | None:
        now = self._now
        if now.ended:
            return None
        now.losses = [*now.losses, loss][-2 * self.window :]
        if done >= self.freeze_from:
            now.ended = True
            return Decision(
                False,
                f"frozen: no recomposition from step {self.freeze_from} of {self.total} on; "
                f"{now.swaps} were made",
            )
        if now.judge:
            return self._judge(done) if done == now.judge else None
        if now.swaps >= self.most:
            now.ended = True
            return Decision(False, _all_made(self.most))
        return (
            self._decide(done, low_share) if done >= now.next and len(now.losses) == 2 * self.window else None
        )

    def finished(self, done: int) -> bool:
        return self._now.ended or self._now.swaps >= self.most

    def state(self) -> dict[str, Any]:
        return asdict(self._now)

    def restore(self, state: dict[str, Any]) -> None:
        try:
            self._now = _PROGRESS.validate_json(json.dumps(state), strict=True)
        except ValidationError:
            raise ValueError("this is no state of an adaptive schedule") from None

    def _decide(self, done: int, low_share: Callable[[], float]) -> Decision:
        now = self._now
        earlier, later = _mean(now.losses[: self.window]), _mean(now.losses[self.window :])
        losses = f"mean loss {earlier:.4g} → {later:.4g} over two windows of {self.window} steps"
        now.next = done + self.window
        if earlier - later > self.improvement * abs(earlier):
            return Decision(
                False, f"keep: {losses}, still improving by more than {self.improvement:.3g} of it"
            )
        carried = low_share()
        importance = f"the lower half carries {carried:.3g} of the importance"
        if carried >= self.share:
            return Decision(False, f"keep: {losses}, but {importance}, not below {self.share:.3g}")
        now.swaps += 1
        now.next, now.judge, now.before, now.losses = done + now.interval, done + self.window, later, []
        losses += f", improving by no more than {self.improvement:.3g} of it"
        return Decision(
            True,
            f"recomposition {now.swaps} of at most {self.most}: {losses}; "
            f"{importance}, below {self.share:.3g}",
        )

    def _judge(self, done: int) -> Decision:
        now = self._now
        after, done_at = _mean(now.losses), done - self.window
        losses = (
            f"mean loss {now.before:.4g} before the recomposition at step {done_at}, "
            f"{after:.4g} in the {self.window} steps after"
        )
        now.judge = 0
        if after <= now.before + self.improvement * abs(now.before):
            return Decision(False, f"recovered: {losses}; the interval stays {now.interval}")
        now.interval *= 2
        now.next = done_at + now.interval
        return Decision(False, f"back off: {losses}; the interval doubles to {now.interval}")


def _all_made(most: int) -> str:
    return f"ended: all {most} recompositions that target_rank allows were made"


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
