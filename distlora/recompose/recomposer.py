"""Recomposition of all layers: components are fused into the frozen weight, and new ones take their places.

Between two recompositions a rank keeps what belongs to its own parts of the factors (scores, initial values),
or to the layers that it owns (the reserve, in host memory). A recomposition sends factors, and no part of W.
"""

import functools
import logging
import time
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from distlora.adapter.attach import Attached
from distlora.adapter.layer import AdapterLinear
from distlora.engine.ledger import Ledger
from distlora.engine.owners import assign_owners, broadcast_pair
from distlora.engine.protocol import Engine
from distlora.initialisation.factors import initialise
from distlora.initialisation.probe import Probe
from distlora.maths.importance import low_half_share
from distlora.maths.low_rank import LowRank
from distlora.maths.recomposition_schedule import AdaptiveSchedule
from distlora.methods import Factors, recomposing
from distlora.progress import each
from distlora.recompose import stored
from distlora.recompose.ages import Ages
from distlora.recompose.initial_values import InitialValuesInLedger, InitialValuesInStart
from distlora.recompose.refill import from_gradients
from distlora.recompose.report import (
    Carried,
    Change,
    LayerRecomposition,
    RecompositionReport,
    as_told,
    complete,
    measure,
)
from distlora.recompose.reserve import Reserve
from distlora.recompose.scores import Scores
from distlora.recompose.stacks import Chosen, fused, matrices_of, numbered, rows_of, single_factors

log = logging.getLogger(__name__)

USED_UP = "the reserve of unused singular directions is used up: no further recomposition"


class Recomposer:
    """Follows the importance of components through training, and replaces them when the method's schedule
    says so.

    steps: of the whole run. reserves: of the layers that this rank owns, as `initialise` reported them.
    probe: the samples of the j-th new probe, where the method needs one. rate: the learning rate of step 0,
    1, …. Does nothing for a method that does not recompose. All calls are collective.
    """

    def __init__(
        self,
        engine: Engine,
        attached: Attached,
        seed: int,
        steps: int,
        reserves: dict[str, LowRank] | None = None,
        probe: Callable[[int], Probe] | None = None,
        rate: Callable[[int], float] = lambda step: 1.0,
    ):
        self._engine, self._attached, self._comm = engine, attached, engine.comm
        self._layers, self._method = attached.layers, recomposing(attached.method)
        self._seed, self._probe, self._rate = seed, probe, rate
        self._owners = assign_owners(self._layers, attached.method, engine.comm.world_size)
        self._reserve = Reserve(self._comm, self._layers, self._owners, engine.dtype, reserves or {})
        #: Recompositions made, and optimizer steps done. The optimizer's own count does not serve: a rank
        #: without a part of any tensor lacks it.
        self._made, self._done = 0, 0
        #: No further replacement, whatever the schedule says. Young components are still looked after.
        self._ended = False
        self._scores: Scores | None = None
        if not self.active:
            return
        self._schedule = self._method.recomposition_schedule(steps)
        elements = self._method.element_scores()
        if elements is not None:
            self._scores = Scores(engine, self._layers, self._method, elements)
        self._ages = Ages(engine, self._layers, self._method)
        anew = self._method.refill_from() == "restart"
        kind = InitialValuesInStart if anew else InitialValuesInLedger
        self._initial_values = kind(engine, attached, self._owners)
        self._initial_values.start()

    @property
    def active(self) -> bool:
        """Whether components are replaced in this run, or young ones looked after."""
        return self._method is not None and bool(self._layers)

    @property
    def follows_loss(self) -> bool:
        """Whether the loss decides when components are replaced."""
        return self.active and isinstance(self._schedule, AdaptiveSchedule)

    @property
    def _following(self) -> bool:
        """Whether scores of elements are still needed, for a recomposition that may come."""
        return self._scores is not None and not self._ended and not self._schedule.finished(self._done)

    @property
    def _ledger(self) -> Ledger:
        return self._engine.ledger

    def reserve_bytes(self) -> int:
        """Host memory of the reserve on the rank that holds most of it."""
        return self._reserve.bytes_at_most()

    def beside_bytes(self) -> int:
        """Memory that every rank needs for fused components beside the weights."""
        pairs = [layer.beside for layer in self._layers.values() if layer.beside is not None]
        return sum(pair.left.nbytes + pair.right.nbytes for pair in pairs)

    # ------------------------------------------------------------------ before every optimizer step

    @torch.no_grad()
    def on_gradient(self) -> None:
        """After the last backward pass, before the step: scores see the averaged gradient, and young
        components get second moments of their own age.
        """
        if not self.active:
            return
        step = self._done + 1
        young = self._ages.young(step)
        clip = self._engine.clip_factor() if young else 1.0
        for name, layer in self._layers.items():
            if not self._following and name not in young:
                continue
            for factor, part in self._engine.parts(layer, gradients=True).items():
                if part.gradient is None:
                    continue
                if self._following:
                    self._scores.update(name, factor, part)
                if name in young:
                    self._ages.correct(layer, factor, part, step, clip)

    # ------------------------------------------------------------------ after every optimizer step

    @torch.no_grad()
    def after_step(self, done: int, loss: float) -> RecompositionReport | None:
        """done: finished steps. loss: of the last one, the same on all ranks. Returns what was decided, if
        anything was.
        """
        if not self.active:
            return None
        followed, self._done = self._following, done
        if self._ended:
            return None
        scores = functools.cache(lambda: self._scores.table())
        decision = self._schedule.after_step(done, loss, lambda: _mean_low_share(scores()))
        if decision is None:
            return None
        verdict = "recomposition" if decision.recompose else "no recomposition"
        log.info("step %d: %s: %s", done, verdict, decision.reason)
        importance = scores() if followed else None
        names = [name for layer in self._layers.values() for name in layer.matrix_names]
        report = RecompositionReport(done, decision.recompose, decision.reason, importance, names)
        if decision.recompose:
            self._recompose(report)
        return report

    def _recompose(self, report: RecompositionReport) -> None:
        began = time.perf_counter()
        if self._method.refill_from() == "restart":
            self._start_anew(report)
        else:
            self._replace(report)
        if self.beside_bytes():
            report.scalars["beside_bytes"] = float(self.beside_bytes())
        if self._following:
            self._scores.start()
        elif self._scores is not None:
            self._scores.drop()
        if report.recomposed:
            report.scalars["seconds"] = time.perf_counter() - began

    # ------------------------------------------------------------------ some components

    def _replace(self, report: RecompositionReport) -> None:
        """Fuses the chosen components of every layer, and puts new ones in their places."""
        scores = None if report.scores is None else rows_of(self._layers, report.scores)
        chosen = {name: self._choose(layer, scores and scores[name]) for name, layer in self._layers.items()}
        from_reserve = self._method.refill_from() == "reserve"
        if from_reserve and any(self._reserve.left(name) < len(own[0]) for name, own in chosen.items()):
            log.info(USED_UP)
            self._ended = True
            report.recomposed, report.reason = False, USED_UP
            return
        self._made += 1
        fresh = {} if from_reserve else self._from_gradients(chosen)
        carried = Carried()
        for name, layer in each(self._layers.items(), "recomposing", "layers", len(self._layers)):
            own = self._reserve.take(name, len(chosen[name][0])) if from_reserve else fresh.pop(name, None)
            new = broadcast_pair(self._comm, layer.whole_shape, self._owners[name], own)
            self._carry_out(layer, chosen[name], new, carried)
            report.layers[name] = seen = LayerRecomposition(
                as_told(layer, chosen[name]), reserve_left=self._reserve.left(name)
            )
            sizes = self._method.scaling * new.left.norm(dim=-2) * new.right.norm(dim=-1)
            seen.sigma = sizes.flatten().tolist()
            if scores is not None:
                seen.low_half_share = _mean_low_share(scores[name])
        self._measure(report, carried)

    def _choose(self, layer: AdapterLinear, scores: Tensor | None) -> Chosen:
        """scores: (matrices, r), if there are any."""
        rows = [None] * matrices_of(layer) if scores is None else scores
        return [self._method.choose(row) for row in rows]

    def _from_gradients(self, chosen: dict[str, Chosen]) -> dict[str, LowRank]:
        data, seed = self._probe(self._made), f"{self._seed}.{self._made}"
        return from_gradients(self._engine, self._attached, self._owners, chosen, data, seed)

    # ------------------------------------------------------------------ the whole adapter

    def _start_anew(self, report: RecompositionReport) -> None:
        """Fuses the whole adapter, which then starts anew from the present gradients."""
        probe = self._probe(self._made + 1)  # before anything changes: it may be refused
        self._made += 1
        carried = Carried()
        for name, layer in each(self._layers.items(), "recomposing", "layers", len(self._layers)):
            # Every rank computes the (out, r) product s·B·R for itself, in out·r² multiplications. Its own
            # rows of left @ right cost out·in·r/world. The broadcast of an owner would have to wait for the
            # same product and then send it.
            chosen = self._choose(layer, None)
            self._carry_out(layer, chosen, None, carried)
            report.layers[name] = LayerRecomposition(as_told(layer, chosen))
        self._measure(report, carried)
        with torch.enable_grad():
            init = initialise(
                self._engine, self._attached, self._seed, self._rate(report.step), probe, self._made,
                keep_function=self._method.keeps_function_at_restart(),
            )  # fmt: skip
        self._initial_values.start()
        report.scalars |= {f"init/{key}": value for key, value in init.scalars.items()}

    # ------------------------------------------------------------------ both

    def _read(self, layer: AdapterLinear) -> tuple[Factors, Factors]:
        """All factors, whole: as the optimizer has them, and as the forward pass uses them, in float32."""
        factors = self._engine.read(layer)
        return factors, self._as_used(factors)

    def _as_used(self, factors: Factors) -> Factors:
        return {name: factor.to(self._engine.dtype).float() for name, factor in factors.items()}

    def _carry_out(self, layer: AdapterLinear, chosen: Chosen, new: LowRank | None, carried: Carried) -> None:
        """Changes factors, weight, moments and ledger of one layer. new: what takes the places of the chosen
        components, as for `fused`.
        """
        factors, used = self._read(layer)
        after, update = fused(layer, self._method, factors, used, chosen, new)
        name, begun = layer.name, self._initial_values.negated(layer, chosen, used)
        self._engine.write(layer, after)
        rounding, beside = (
            self._method.update_rounding(),
            self._method.fuses_beside(layer.packing is not None),
        )
        carried.errors[name] = self._ledger.apply(self._engine, layer, self._made, rounding, update, beside)
        self._ages.replace(layer, numbered(chosen, self._method.rank), self._done)
        self._initial_values.put(layer, chosen)
        if self._owners[name] == self._comm.rank:
            live = map(self._method.delta, single_factors(layer, self._as_used(after)))
            carried.live[name] = [_on_host(pair) for pair in live]
            carried.begun[name] = [[_on_host(pair) for pair in pairs] for pairs in begun]

    def _measure(self, report: RecompositionReport, carried: Carried) -> None:
        """Completes the report. The owner of each layer computes its numbers, after all layers were changed,
        so that owners do not wait for each other, and no rank waits for one that failed.
        """
        failure = None
        try:
            for name, live in carried.live.items():
                pairs = zip(*(pair.single() for pair in self._ledger.pairs(name)))
                matrices = [
                    Change(own[-1], begun, [now, *own])
                    for own, begun, now in zip(pairs, carried.begun[name], live)
                ]
                measure(report.layers[name], matrices, self._comm.device)
        except Exception as error:
            failure = error
        self._comm.agree(failure)
        complete(self._comm, report, carried.errors)

    # ------------------------------------------------------------------ to a checkpoint and back

    def state(self) -> dict[str, Any] | None:
        """What is the same on all ranks, as JSON; None for a method that does not recompose. The keys are
        those of the files on disk.
        """
        if not self.active:
            return None
        return {
            "swaps": self._made, "done": self._done, "ended": self._ended, "born": self._ages.state(),
            "origin": self._initial_values.state(), "reserves": self._reserve.state(),
            "switching": self._schedule.state(),
        }  # fmt: skip

    def tensors(self) -> Iterator[tuple[str, Tensor | None]]:
        """Scores where they are followed, initial values, and the unused part of the reserve, on rank 0's
        CPU. Collective.
        """
        if self.active:
            yield from chain(
                self._scores.tensors() if self._following else (),
                self._initial_values.tensors(),
                self._reserve.tensors(),
            )

    def problem_with(self, state: dict[str, Any], ledger: dict[str, list[dict[str, Any]]]) -> str | None:
        """What of a stored state does not fit this run; None if all does. ledger: the entries by layer."""
        try:
            stored.restored(self._schedule, state["switching"])
        except ValueError as error:
            return f"switching: {error}"
        return stored.problem_with(state, self._layers, self._method, ledger)

    def wanted(self, state: dict[str, Any]) -> dict[str, tuple[int, ...]]:
        """The shapes of the tensors that `restore` reads, by name. state: one that fits."""
        schedule = stored.restored(self._schedule, state["switching"])
        follows = self._scores is not None and not state["ended"] and not schedule.finished(state["done"])
        return stored.wanted(state, self._layers, self._method, follows)

    def restore(self, state: dict[str, Any], read: Callable[[str], Tensor | None]) -> None:
        """Continues from what `state` and `tensors` gave, at any stage and world size. Collective. read: the
        tensor of a name, on rank 0; collective.
        """
        self._made, self._done, self._ended = state["swaps"], state["done"], state["ended"]
        self._ages.restore(state["born"])
        self._schedule.restore(state["switching"])
        if self._following:
            self._scores.restore(read)
        self._initial_values.restore(state["origin"], read)
        self._reserve.restore(state["reserves"], read)


def _on_host(pair: LowRank) -> LowRank:
    return LowRank(pair.left.cpu(), pair.right.cpu())


def _mean_low_share(scores: Tensor) -> float:
    return sum(low_half_share(row) for row in scores) / len(scores)
