"""What is known of the user's run, in the form that initialisation and recomposition want."""

from collections.abc import Callable, Iterable
from typing import Any

from distlora.api.adapted import Adapted
from distlora.engine.comm import Comm
from distlora.engine.protocol import Engine
from distlora.errors import UserError
from distlora.initialisation.factors import InitReport
from distlora.initialisation.probe import Loss, Probe
from distlora.methods import NeedsProbe, recomposing
from distlora.recompose.recomposer import Recomposer

#: What `initialise` and `load` take as the samples of a probe: a `Probe`, the batches of this rank, or a
#: function that gives either for the j-th probe (0: at the start, j: at the j-th recomposition).
ProbeSource = Probe | Iterable[Any] | Callable[[int], Probe | Iterable[Any]]
#: The learning rate of the first step, or a function from a step (0, 1, …) to its rate.
Rate = float | Callable[[int], float]


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
        self._probe, self._loss, self._steps, self._rate = probe, loss, steps, first_rate

    def probe(self, number: int) -> Probe:
        """Of the start, or of the j-th recomposition."""
        if self._probe is None:
            raise UserError(
                f"method {self._adapted.method.name} makes factors of gradients: give probe=batches and loss="
            )
        source = self._probe(number) if callable(self._probe) else self._probe
        if isinstance(source, Probe):
            return source
        return _probe_of_batches(source, self._loss, self._engine.comm)

    def rate(self, step: int) -> float:
        """Of a step, counted from 0; 0 where nothing depends on it."""
        method, rate = self._adapted.method, self._rate
        settings = method.probe_settings() if isinstance(method, NeedsProbe) else None
        if rate is None and settings is not None and settings.eta == "schedule":
            raise UserError("eta is schedule, the learning rate of the first step: give first_rate=…")
        return rate(step) if callable(rate) else rate or 0.0

    def recomposer(self, report: InitReport | None) -> Recomposer:
        method, steps = self._adapted.method, self._steps
        if steps is None and recomposing(method) is not None:
            raise UserError(
                f"method {method.name} recomposes at intervals of the run: give steps=, its length"
            )
        reserves = None if report is None else report.reserves
        attached = self._adapted.attached
        return Recomposer(self._engine, attached, self._seed, steps or 0, reserves, self.probe, self.rate)


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
