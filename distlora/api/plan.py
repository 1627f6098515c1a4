"""What is known of the user's run, in the form that initialisation and recomposition want."""

from collections.abc import Callable, Iterable
from typing import Any

from distlora.api.adapted import Adapted
from distlora.engine.comm import Comm
from distlora.engine.protocol import Engine
from distlora.errors import UserError
from distlora.initialisation.factors import InitReport
from distlora.initialisation.probe import Loss, Probe
from distlora.methods import HoldsPretrained, probe_of, recomposing
from distlora.recompose.recomposer import Recomposer

#: What `initialise` and `load` take as the samples of a probe: a `Probe`, the batches of this rank, or a
#: function that gives either for the j-th probe (0: at the start, j: at the j-th recomposition).
ProbeSource = Probe | Iterable[Any] | Callable[[int], Probe | Iterable[Any]]
#: The learning rate of the first step, or a function from a step (0, 1, …) to its rate.
Rate = float | Callable[[int], float]
#: Steps within which a warm-up leaves the rate 0.
WARM_UP = 1000


class Plan:
    """See the module. probe, loss, steps, first_rate, seed: as `initialise` is given them."""

    def __init__(
        self,
        adapted: Adapted,
        engine: Engine,
        probe: ProbeSource | None,
        loss: Loss | None,
        steps: int | None,
        first_rate: Rate | None,
        seed: int,
    ):
        self._adapted, self._engine, self._seed = adapted, engine, seed
        plain = probe is None or callable(probe) or isinstance(probe, Probe)
        self._probe = probe if plain else list(probe)  # batches are wanted again at every recomposition
        self._loss, self._steps, self._rate = loss, steps, first_rate

    def check(self) -> None:
        """Raises UserError for all that can be known to be wrong before anything is written."""
        method, steps = self._adapted.method, self._steps
        recomposes = recomposing(method)
        if recomposes is not None:
            if steps is None:
                raise UserError(
                    f"method {method.name} recomposes at intervals of the run: give steps=, its length"
                )
            problem = recomposes.problem_with_length(steps)
            if problem:
                raise UserError(problem)
        if probe_of(method) is not None or (recomposes is not None and recomposes.refill_probe() is not None):
            self._check_probe()
            self.rate(0)
        decay = self._engine.optimizer.weight_decay
        if decay and isinstance(method, HoldsPretrained) and not method.decay_pretrained:
            raise UserError(
                f"what {method.name} trains begins as a part of the pretrained weight, which the optimizer's "
                f"weight_decay={decay:g} would shrink: set that to 0, or decay_pretrained=True",
                agreed=True,
            )

    def _check_probe(self) -> None:
        if self._probe is None:
            raise UserError(
                f"method {self._adapted.method.name} makes factors of gradients: give probe=batches and loss="
            )
        if isinstance(self._probe, list) and self._loss is None:
            raise UserError("the probe has no loss: give loss=, from (model, batch) to the batch's mean loss")

    def probe(self, number: int) -> Probe:
        """Of the start, or of the j-th recomposition."""
        self._check_probe()
        source = self._probe(number) if callable(self._probe) else self._probe
        if isinstance(source, Probe):
            return source
        return _probe_of_batches(source, self._loss, self._engine.comm)

    def rate(self, step: int) -> float:
        """Of the first step from `step` on, counted from 0, whose rate is not zero; 0 where nobody asks."""
        settings, rate = probe_of(self._adapted.method), self._rate
        asked = settings is not None and settings.eta == "schedule"
        if rate is None and asked:
            raise UserError("eta is schedule, the learning rate of the first step: give first_rate=…")
        rates = (rate(later) for later in range(step, step + WARM_UP)) if callable(rate) else (rate or 0.0,)
        found = next((value for value in rates if value > 0), 0.0)
        if asked and not found:
            raise UserError("eta is schedule, and first_rate is 0: give the first rate that is not")
        return found

    def recomposer(self, report: InitReport | None) -> Recomposer:
        reserves = None if report is None else report.reserves
        attached, steps = self._adapted.attached, self._steps or 0
        return Recomposer(self._engine, attached, self._seed, steps, reserves, self.probe, self.rate)


def _probe_of_batches(batches: Iterable[Any], loss: Loss | None, comm: Comm) -> Probe:
    """Of this rank's batches, each with a mean loss of its own, which all count alike."""
    if loss is None:
        raise UserError("the probe has no loss: give loss=, from (model, batch) to the batch's mean loss")
    kept = list(batches)
    counts = comm.gather(len(kept))
    if len(set(counts)) > 1 or not kept:
        found = ", ".join(map(str, counts))
        raise UserError(
            f"the ranks have {found} batches for the probe: bring equally many, at least one", agreed=True
        )
    return Probe(lambda: iter(kept), lambda: iter(kept), sum(counts), loss)
