"""The learning rate of a run that asks for one: `train.lr: search`.

From the initialised state a few rates are tried, spread evenly on a logarithmic scale, then two finer ones
around the best. Each makes the same few optimizer steps, at that constant rate, on the same samples; the loss
on other training samples decides. Afterwards everything is as it was before, to the bit.
"""

import json
import logging
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from distlora.engine import boundary
from distlora.engine.coordination import on_main
from distlora.engine.protocol import Engine
from distlora.errors import Preempted, TrainingError
from distlora.files.atomic import write_text
from distlora.files.json_files import checked, read_json
from distlora.initialisation.probe import modes_kept
from distlora.models.targets import Batch
from distlora.progress import phase
from distlora.recipe.sections import RateSearchSection
from distlora.training.run_directory import RATE_SEARCH
from distlora.training.step import LossSum, accumulate, evaluation_loss
from distlora.training.writing import Writing

#: Of the least loss's distance from the loss without a step: what a smaller rate may lack of it and still be
#: chosen. Few steps make large rates look good, which a long run pays for.
MARGIN = 0.05
#: Losses that differ by less than this share are equal: rounding in bfloat16 and the order of sums over ranks
#: stay below it.
NOISE = 1e-3

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RateSearch:
    """rate: the one that was chosen. loss_before: of the samples that decide, without a step. tried: (rate,
    loss after its steps), by rate; infinite where the steps diverged.
    """

    rate: float
    loss_before: float
    tried: list[tuple[float, float]]
    seconds: float

    def scalars(self) -> dict[str, float]:
        """For the metrics of a run, under `lr_search/`."""
        return {
            "lr_search/rate": self.rate, "lr_search/loss_before": self.loss_before,
            "lr_search/loss": dict(self.tried)[self.rate], "lr_search/seconds": self.seconds,
        }  # fmt: skip


@dataclass(frozen=True)
class _Stored:
    """Of the file, what is used. A loss that was infinite is None there."""

    rate: float
    loss_before: float
    tried: list[tuple[float, float | None]]
    seconds: float


def search_rate(
    engine: Engine,
    settings: RateSearchSection,
    steps: Sequence[Sequence[Batch]],
    held_back: Sequence[Batch],
    loss_sum: LossSum,
) -> RateSearch:
    """Tries rates from the present state, before the first step, and leaves that state as it is. Collective.

    steps, held_back: this rank's batches, see `RunSamples.trial`. Errors: Preempted; TrainingError where
    every rate diverges.
    """
    began, tried = time.perf_counter(), dict[float, float]()
    with (
        modes_kept(engine.module),
        engine.rehearsal() as take_back,
        phase("searching for the learning rate", "rates", settings.rates + 2) as search,
    ):
        engine.train_mode(True)
        before = _agreed(engine, evaluation_loss(engine, held_back, loss_sum))
        if not math.isfinite(before):
            raise TrainingError("train.lr=search: the loss is not finite before the first step, at no rate")

        def attempt(rate: float) -> None:
            take_back()
            tried[rate] = _loss_after(engine, rate, steps, held_back, loss_sum)
            search.advance()
            log.info("learning rate %.3g: loss %.4f after %d steps", rate, tried[rate], len(steps))

        for rate in spread(settings):
            attempt(rate)
        if math.isfinite(min(tried.values())):
            for rate in finer(settings, choose(tried, before)):
                attempt(rate)
    chosen = choose(tried, before)  # an error leaves the state as it was, too
    if tried[chosen] >= before:
        log.warning(
            "no learning rate from %.3g to %.3g lowered the loss (%.4f) within %d steps; see train.lr_search",
            min(tried), max(tried), before, len(steps),
        )  # fmt: skip
    return RateSearch(chosen, before, sorted(tried.items()), time.perf_counter() - began)


def bad_rows(
    engine: Engine, rows: Iterable[tuple[int | None, Batch]], loss_sum: LossSum
) -> tuple[list[int], int]:
    """The numbers of the rows whose loss is not finite in the present state, and how many rows there are.
    Collective; equal on all ranks. rows: this rank's, each a batch of its own, see `RunSamples.rows`."""
    found, count = list[int](), 0
    engine.train_mode(False)
    for number, batch in rows:
        with torch.no_grad():
            loss, _ = engine.run(loss_sum, batch)
        if number is not None:
            count += 1
            found += [] if math.isfinite(float(loss)) else [number]
    engine.train_mode(True)
    gathered = engine.comm.gather(found)
    return sorted(number for own in gathered for number in own), int(engine.comm.sum(count)[0])


def told_of_rows(found: Sequence[int], count: int, split: str) -> str:
    """What `bad_rows` means for the user. split: of the training data."""
    if not found:
        return f"each of the {count} rows of {split} that it reads has a finite loss before the first step"
    if len(found) == count:
        return (
            f"the loss of all {count} rows of {split} that it reads is not finite: look at the model's dtype"
        )
    shown = ", ".join(map(str, found[:5])) + (f" and {len(found) - 5} others" if len(found) > 5 else "")
    verb = "row {} is" if len(found) == 1 else "rows {} are"
    return (
        f"in {split}, counted from 0, {verb.format(shown)} to blame, whose loss is not finite before the "
        "first step: correct the data, or choose another split"
    )


def _loss_after(
    engine: Engine,
    rate: float,
    steps: Sequence[Sequence[Batch]],
    held_back: Sequence[Batch],
    loss_sum: LossSum,
) -> float:
    """The loss of the samples that were held back, the same on all ranks; infinite where a step diverges."""
    engine.set_rate(rate)
    if not all(_step(engine, batches, loss_sum) for batches in steps):
        return math.inf
    return _agreed(engine, evaluation_loss(engine, held_back, loss_sum))


def _step(engine: Engine, batches: Sequence[Batch], loss_sum: LossSum) -> bool:
    """One optimizer step, without what a run remembers of its steps; whether it is one that may go on."""
    try:
        accumulate(engine, batches, loss_sum)
    except TrainingError:
        engine.step()  # lets go of the gradients
        return False
    if not math.isfinite(engine.gradient_norm()):  # before a method solves equations with it
        engine.step()
        return False
    boundary.before_step(engine)
    info = engine.step()
    boundary.after_step(engine)
    return not info.skipped


def _agreed(engine: Engine, loss: float) -> float:
    """Rank 0's loss, so that all choose alike; infinite instead of NaN."""
    loss = engine.comm.share(loss if math.isfinite(loss) else None)
    return math.inf if loss is None else loss


# ---------------------------------------------------------------------- which rates, and which of them


def spread(settings: RateSearchSection) -> list[float]:
    """From the lowest to the highest, each the same multiple of the one before; three digits."""
    ratio, last = settings.highest / settings.lowest, settings.rates - 1
    return [_three_digits(settings.lowest * ratio ** (i / last)) for i in range(settings.rates)]


def finer(settings: RateSearchSection, best: float) -> list[float]:
    """Half a multiple below and above the best one, within the bounds."""
    half = (settings.highest / settings.lowest) ** (0.5 / (settings.rates - 1))
    found = (_three_digits(best / half), _three_digits(best * half))
    return [rate for rate in found if settings.lowest <= rate <= settings.highest]


def _three_digits(rate: float) -> float:
    return float(f"{rate:.2e}")


def choose(tried: dict[float, float], before: float) -> float:
    """The smallest rate whose loss is as good as the least, but for MARGIN and NOISE. before: the loss
    without a step. Errors: TrainingError where no loss is finite.
    """
    least = min(tried.values())
    if not math.isfinite(least):
        raise TrainingError(
            f"train.lr=search: training diverges at every learning rate from {min(tried):.3g} to "
            f"{max(tried):.3g}; lower train.lr_search.lowest and highest"
        )
    enough = least + max(MARGIN * (before - least), NOISE * abs(least))
    return min(rate for rate, loss in tried.items() if loss <= enough)


# ---------------------------------------------------------------------- in the run directory


def find_rate(
    writing: Writing, run_dir: Path, identity: dict, search: Callable[[], RateSearch]
) -> RateSearch:
    """What an earlier start of the same run has found, or what `search` finds, which is then written down.
    identity: of the run. Collective. Raises UserError where another start has taken the directory over.
    """
    path = run_dir / RATE_SEARCH
    known = writing.comm.share(on_main(writing.comm, path, lambda: _read(path, identity)))
    if known is not None:
        log.info("learning rate %.3g, from %s", known["rate"], path)
        tried = [(rate, math.inf if loss is None else loss) for rate, loss in known["tried"]]
        return RateSearch(known["rate"], known["loss_before"], tried, known["seconds"])
    try:
        found = search()
    except Preempted:
        raise Preempted(
            "asked to stop during the search for the learning rate; the same command begins anew"
        ) from None
    writing.on_main(path, lambda: write_text(path, _as_text(found, identity)))
    log.info("learning rate %.3g, found in %.1f s: see %s", found.rate, found.seconds, path)
    return found


def _as_text(found: RateSearch, identity: dict) -> str:
    tried = [(rate, loss if math.isfinite(loss) else None) for rate, loss in found.tried]
    return json.dumps(asdict(found) | {"tried": tried, "run": identity}, indent=1) + "\n"


def _read(path: Path, identity: dict) -> dict | None:
    """The file's content; None without one, and for one that is damaged or of another run."""
    try:
        content = read_json(path)
        if not isinstance(content, dict) or content.get("run") != identity:
            return None
        found = checked(_Stored, content)
    except FileNotFoundError:
        return None
    except ValueError as error:
        log.warning("%s is damaged (%s): the learning rate is searched again", path, error)
        return None
    if not (math.isfinite(found.rate) and found.rate > 0 and found.rate in dict(found.tried)):
        log.warning("%s is damaged (its rate was not tried): the learning rate is searched again", path)
        return None
    return content
