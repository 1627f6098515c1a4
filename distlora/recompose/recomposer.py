"""Recomposition: at intervals, components of the adapter are fused into the frozen weight, and new ones take
their places.

What is kept on a rank between two swaps belongs to its own parts of the factors (`scores`, `origins`) or to
the layers that it owns (`reserve`, on the host). A swap sends factors, and never a part of W.
"""

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from distlora.adapter.attach import Attached
from distlora.adapter.layer import AdapterLinear
from distlora.engine.ledger import Ledger
from distlora.engine.owners import assign_owners, broadcast_pair
from distlora.engine.protocol import Engine, Part
from distlora.initialise.factors import initialise
from distlora.initialise.probe import Probe
from distlora.maths.importance import component_of, low_half_share
from distlora.maths.low_rank import LowRank
from distlora.maths.moments import AGE_LIMIT, own_age
from distlora.methods import Factors, Recomposition
from distlora.recompose.initial_values import OriginsInLedger, OriginsInStart
from distlora.recompose.refill import from_gradients
from distlora.recompose.report import LayerSwap, SwapReport, complete, measure
from distlora.recompose.reserve import Reserve
from distlora.recompose.scores import Scores

log = logging.getLogger(__name__)

#: An optimizer step that no component can have been put in place after.
NEVER = -1
#: The moment that a new component starts without; the second ones get the bias correction of their own age
#: instead.
FORGOTTEN = ("exp_avg", "momentum_buffer")
USED_UP = "the reserve of unused singular directions is used up: no further recomposition"


@dataclass
class _Carried:
    """What is remembered of a swap until its numbers are computed.

    errors: of every layer, this rank's share of the squared rounding error. live, begun: of the layers that
    this rank owns, what the factors add to W now, and what the replaced components were when they were put in
    place, negated; in host memory.
    """

    errors: dict[str, float] = field(default_factory=dict)
    live: dict[str, LowRank] = field(default_factory=dict)
    begun: dict[str, list[LowRank]] = field(default_factory=dict)


class Recomposer:
    """Follows the importance of components through training, and replaces them when the method's schedule
    says so.

    steps: of the whole run. reserves: of the layers that this rank owns, as `initialise` reported them.
    probe: the samples of the j-th new probe, where the method needs one. rate: the learning rate of step 0,
    1, …. Without a schedule it does nothing. All calls are collective.
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
        self._method, self._layers = attached.method, attached.layers
        self._seed, self._probe, self._rate = seed, probe, rate
        self._owners = assign_owners(self._layers, self._method, engine.comm.world_size)
        self._switching = self._method.switching(steps) if self._layers else None
        elements = self._method.element_scores() if self._switching else None
        self._scores = Scores(engine, self._layers, elements) if elements else None
        self._reserve = Reserve(self._comm, self._layers, self._owners, engine.dtype, reserves or {})
        #: Swaps made, and optimizer steps. Not the optimizer's own count, which a rank without a part of any
        #: tensor lacks.
        self._swaps, self._done = 0, 0
        #: No further replacement, whatever the schedule says; young components are still looked after.
        self._ended = False
        #: The optimizer step after which each component of every layer was put in place.
        self._born = {name: [NEVER] * self._method.rank for name in self._layers}
        origins = OriginsInStart if self._method.refill_from() == "restart" else OriginsInLedger
        self._origins = origins(engine, attached, self._owners)
        if self.active:
            self._origins.start()

    @property
    def active(self) -> bool:
        """Whether components may still be replaced, or young ones still need looking after."""
        return self._switching is not None

    @property
    def _following(self) -> bool:
        """Whether scores of elements are still needed, for a swap that may come."""
        return self._scores is not None and not self._ended and not self._switching.finished(self._done)

    @property
    def _ledger(self) -> Ledger:
        return self._engine.ledger

    def reserve_bytes(self) -> int:
        """Host memory of the reserve on the rank that holds most of it."""
        return self._reserve.bytes_at_most()

    def beside_bytes(self) -> int:
        """What every rank holds of fused components that stand beside the weights."""
        pairs = [layer.beside for layer in self._layers.values() if layer.beside is not None]
        return sum(pair.left.nbytes + pair.right.nbytes for pair in pairs)

    # ------------------------------------------------------------------ before every optimizer step

    @torch.no_grad()
    def on_gradient(self) -> None:
        """After the last backward, before the step: scores see the averaged gradient, and young components
        get second moments of their own age."""
        if not self.active:
            return
        step = self._done + 1
        young = {
            name
            for name, born in self._born.items()
            if any(b != NEVER and step - b <= AGE_LIMIT for b in born)
        }
        if "exp_avg_sq" not in self._engine.optimizer.moments():
            young = set()
        clip = self._engine.clip_factor() if young else 1.0
        for name, layer in self._layers.items():
            if not self._following and name not in young:
                continue
            for factor, part in self._engine.parts(layer, gradients=True).items():
                if part.gradient is None:
                    continue
                if self._following:
                    self._scores.update(name, factor, part)
                if name in young and "exp_avg_sq" in part.moments:
                    ages = self._ages(name, step)[_component(factor, part, layer)]
                    beta2 = self._engine.optimizer.betas[1]
                    own_age(part.moments["exp_avg_sq"], part.gradient * clip, ages, step, beta2)

    def _ages(self, name: str, step: int) -> Tensor:
        """(r,) int64: the how manieth step of each component the optimizer step `step` is; 0 for those of the
        start.
        """
        ages = [0 if born == NEVER else step - born for born in self._born[name]]
        return torch.tensor(ages, device=self._comm.device)

    # ------------------------------------------------------------------ after every optimizer step

    @torch.no_grad()
    def after_step(self, done: int, loss: float) -> SwapReport | None:
        """done: finished steps. loss: of the last one, the same on all ranks. Returns what was decided, if
        anything was.
        """
        followed, self._done = self._following, done
        if not self.active or self._ended:
            return None
        table: list[Tensor] = []

        def scores() -> Tensor:
            if not table:
                table.append(self._scores.table())
            return table[0]

        decision = self._switching.after_step(done, loss, lambda: _mean_low_share(scores()))
        if decision is None:
            return None
        log.info(
            "step %d: %s: %s", done, "recomposition" if decision.swap else "no recomposition", decision.reason
        )
        report = SwapReport(
            done, decision.swap, decision.reason, scores() if followed else None, list(self._layers)
        )
        if decision.swap:
            self._swap(report)
        return report

    def _swap(self, report: SwapReport) -> None:
        began = time.perf_counter()
        if self._method.refill_from() == "restart":
            self._restart(report)
        else:
            self._replace(report)
        if self.beside_bytes():
            report.scalars["beside_bytes"] = float(self.beside_bytes())
        if self._following:
            self._scores.start()
        elif self._scores is not None:
            self._scores.drop()
        if report.swapped:
            report.scalars["seconds"] = time.perf_counter() - began

    # ------------------------------------------------------------------ some components

    def _replace(self, report: SwapReport) -> None:
        """The chosen components of every layer are fused and refilled."""
        scores = [None] * len(self._layers) if report.scores is None else report.scores
        chosen = {name: self._method.choose(row) for name, row in zip(self._layers, scores)}
        from_reserve = self._method.refill_from() == "reserve"
        if from_reserve and any(
            self._reserve.left(name) < len(components) for name, components in chosen.items()
        ):
            log.info(USED_UP)
            self._ended = True
            report.swapped, report.reason = False, USED_UP
            return
        self._swaps += 1
        fresh = {} if from_reserve else self._from_gradients(chosen)
        carried = _Carried()
        for name, layer in self._layers.items():
            own = self._reserve.take(name, len(chosen[name])) if from_reserve else fresh.pop(name, None)
            new = broadcast_pair(self._comm, layer.shape, self._owners[name], own)
            factors, used = self._read(layer)
            self._carry_out(layer, self._method.fuse(factors, used, chosen[name], new), used, carried)
            report.layers[name] = seen = LayerSwap(chosen[name], reserve_left=self._reserve.left(name))
            seen.sigma = [
                self._method.scaling * float(b.norm() * a.norm()) for b, a in zip(new.left.T, new.right)
            ]
            if report.scores is not None:
                seen.low_half_share = low_half_share(report.scores[len(report.layers) - 1])
        self._measure(report, carried)

    def _from_gradients(self, chosen: dict[str, tuple[int, ...]]) -> dict[str, LowRank]:
        data, seed = self._probe(self._swaps), f"{self._seed}.{self._swaps}"
        return from_gradients(self._engine, self._attached, self._owners, chosen, data, seed)

    # ------------------------------------------------------------------ the whole adapter

    def _restart(self, report: SwapReport) -> None:
        """All of the adapter is fused, and it starts anew from the present gradients."""
        self._swaps += 1
        carried = _Carried()
        for name, layer in self._layers.items():
            factors, used = self._read(layer)
            # Every rank forms the (out, r) product s·B·R for itself: out·r² multiplications. Its own rows of
            # left @ right cost out·in·r/world, and an owner's broadcast would have to wait for the product
            # and then send it.
            answer = self._method.fuse(factors, used, self._method.choose(None), None)
            self._carry_out(layer, answer, used, carried)
            report.layers[name] = LayerSwap(answer.replaced)
        self._measure(report, carried)
        with torch.enable_grad():
            init = initialise(
                self._engine, self._attached, self._seed, self._rate(report.step), self._probe(self._swaps), self._swaps,
                keep_function=self._method.keeps_function_at_restart(),
            )  # fmt: skip
        self._origins.start()
        report.scalars |= {f"init/{key}": value for key, value in init.scalars.items()}

    # ------------------------------------------------------------------ both

    def _read(self, layer: AdapterLinear) -> tuple[Factors, Factors]:
        """All factors whole: the optimizer's, and in float32 what the forward pass uses."""
        factors = self._engine.read(layer)
        return factors, self._as_used(factors)

    def _as_used(self, factors: Factors) -> Factors:
        return {name: factor.to(self._engine.dtype).float() for name, factor in factors.items()}

    def _carry_out(
        self, layer: AdapterLinear, answer: Recomposition, used: Factors, carried: _Carried
    ) -> None:
        """Factors, weight, moments and ledger of one layer. used: the factors before."""
        name, begun = layer.name, self._origins.negated(layer, answer.replaced, used)
        self._engine.write(layer, answer.factors)
        rounding, beside = (
            self._method.update_rounding(),
            self._method.fuses_beside(layer.packing is not None),
        )
        carried.errors[name] = self._ledger.apply(
            self._engine, layer, self._swaps, rounding, answer.base_update, beside
        )
        replaced = torch.zeros(self._method.rank, dtype=torch.bool, device=self._comm.device)
        replaced[list(answer.replaced)] = True
        for factor, part in self._engine.parts(layer).items():
            mask = replaced[_component(factor, part, layer)]
            for key in FORGOTTEN:
                if key in part.moments:
                    part.moments[key][mask.to(part.moments[key].device)] = 0.0
        for component in answer.replaced:
            self._born[name][component] = self._done
        self._origins.put(layer, answer)
        if self._owners[name] == self._comm.rank:
            carried.live[name] = _on_host(self._method.delta(self._as_used(answer.factors)))
            carried.begun[name] = [_on_host(pair) for pair in begun]

    def _measure(self, report: SwapReport, carried: _Carried) -> None:
        """What there is to tell of every layer, computed by its owner: apart from the swap itself, so that
        owners do not wait for each other, and none for one that failed."""
        failure = None
        try:
            for name, live in carried.live.items():
                seen, pairs = report.layers[name], list(self._ledger.pairs(name))
                measure(seen, pairs[-1], carried.begun[name], [live, *pairs], self._comm.device)
        except Exception as error:
            failure = error
        self._comm.agree(failure)
        complete(self._comm, report, carried.errors)

    # ------------------------------------------------------------------ to a checkpoint and back

    def state(self) -> dict[str, Any] | None:
        """What is the same on all ranks, as JSON; None for a method that never replaces components."""
        if not self.active:
            return None
        return {
            "swaps": self._swaps, "done": self._done, "born": self._born, "origin": self._origins.state(),
            "reserves": self._reserve.state(), "ended": self._ended, "switching": self._switching.state(),
        }  # fmt: skip

    def tensors(self) -> Iterator[tuple[str, Tensor | None]]:
        """Scores where they are followed, starts, and what is unused of the reserve, on rank 0's CPU.
        Collective.
        """
        if self.active:
            yield from chain(
                self._scores.tensors() if self._following else (),
                self._origins.tensors(),
                self._reserve.tensors(),
            )

    def restore(self, state: dict[str, Any], read: Callable[[str], Tensor | None]) -> None:
        """Goes on from what `state` and `tensors` gave, at any stage and world size. Collective. read: the
        tensor of a name, on rank 0; collective."""
        self._swaps, self._done, self._born, self._ended = (
            state["swaps"],
            state["done"],
            state["born"],
            state["ended"],
        )
        self._switching.restore(state["switching"])
        if self._following:
            self._scores.restore(read)
        self._origins.restore(state["origin"], read)
        self._reserve.restore(state["reserves"], read)


def _on_host(pair: LowRank) -> LowRank:
    return LowRank(pair.left.cpu(), pair.right.cpu())


def _component(factor: str, part: Part, layer: AdapterLinear) -> Tensor:
    """(n,) int64: the component that each element of a part belongs to. A core belongs to all, which are
    replaced together.
    """
    if factor == "R":
        return torch.zeros(part.master.numel(), dtype=torch.int64, device=part.master.device)
    shape = layer.method.shapes(*layer.shape)[factor]
    return component_of(factor, part.start, part.master.numel(), shape, part.master.device)


def _mean_low_share(scores: Tensor) -> float:
    return sum(low_half_share(row) for row in scores) / len(scores)
