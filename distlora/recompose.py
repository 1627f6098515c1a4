"""Recomposition: at intervals, components of the adapter are fused into the frozen weight, and new ones take their places.

What is kept on a rank between two swaps belongs to its own parts of the factors (scores of elements) or to the layers that it
owns (the reserve of new components, on the host). A swap sends factors, and never a part of W.
"""

import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from distlora.attach import Attached
from distlora.compose import ProbeData, assign_owners, broadcast_pair, initialise, layer_generator
from distlora.engine import Engine, Part
from distlora.importance import ScoreState, component_of, group_sums, low_half_share
from distlora.layer import AdapterLinear
from distlora.ledger import Ledger
from distlora.linalg import effective_rank, low_rank_norm, product_singular_values
from distlora.methods import Factors, LowRank, Recomposition
from distlora.methods.base import LayerInit
from distlora.moments import AGE_LIMIT, own_age
from distlora.probe import mean_gradients
from distlora.swapreport import LayerSwap, SwapReport, complete

log = logging.getLogger(__name__)

#: An optimizer step that no component can have been put in place after.
NEVER = -1
#: The moment that a new component starts without; the second ones get the bias correction of their own age instead.
FORGOTTEN = ("exp_avg", "momentum_buffer")
SCORE_KEYS = ("mean", "uncertainty")
USED_UP = "the reserve of unused singular directions is used up: no further recomposition"


class Recomposer:
    """Follows the importance of components through training, and replaces them when the method's schedule says so.

    steps: of the whole run. reserves: of the layers that this rank owns, as `initialise` reported them. probe: the samples of
    the j-th new probe, where the method needs one. rate: the learning rate of step 0, 1, ….
    Without a schedule it does nothing. All calls are collective.
    """

    def __init__(
        self,
        engine: Engine,
        attached: Attached,
        seed: int,
        steps: int,
        reserves: dict[str, LowRank] | None = None,
        probe: Callable[[int], ProbeData] | None = None,
        rate: Callable[[int], float] = lambda step: 1.0,
    ):
        self._engine, self._attached, self._comm = engine, attached, engine.comm
        self._method, self._layers = attached.method, attached.layers
        self._seed, self._probe, self._rate = seed, probe, rate
        self._owners = assign_owners(self._layers, self._method, engine.comm.world_size)
        self._switching = self._method.switching(steps) if self._layers else None
        self._elements = self._method.element_scores() if self._switching else None
        self._reserves = dict(reserves or {})
        #: Components of every layer's reserve, of which the first `_taken` are used.
        self._reserve_sizes = self._count_reserves()
        #: Swaps made, and optimizer steps. Not the optimizer's own count, which a rank without a part of any tensor lacks.
        self._swaps, self._done = 0, 0
        #: No further replacement, whatever the schedule says; young components are still looked after.
        self._ended = False
        rank = self._method.rank
        #: Of every layer: reserve components used; the optimizer step after which each component was put in place; and where
        #: the ledger has what it was then, as (entry, column).
        self._taken = dict.fromkeys(self._layers, 0)
        self._born = {name: [NEVER] * rank for name in self._layers}
        self._origin = {name: [(0, column) for column in range(rank)] for name in self._layers}
        self._scores: dict[str, dict[str, ScoreState]] = {}
        if self._elements:
            self._forget_scores()

    @property
    def active(self) -> bool:
        """Whether components may still be replaced, or young ones still need looking after."""
        return self._switching is not None

    @property
    def _following(self) -> bool:
        """Whether scores of elements are still needed, for a swap that may come."""
        return self._elements is not None and not self._ended and not self._switching.finished(self._done)

    def _count_reserves(self) -> dict[str, int]:
        counts = [self._reserves[name].right.shape[0] if name in self._reserves else 0 for name in self._layers]
        return dict(zip(self._layers, map(int, self._comm.sum(*counts)))) if counts else {}

    def reserve_bytes(self) -> int:
        """Host memory of the reserve on the rank that holds most of it."""
        own = sum(pair.left.nbytes + pair.right.nbytes for pair in self._reserves.values())
        return int(max(self._comm.all_gather(torch.tensor(own, device=self._comm.device))))

    # ------------------------------------------------------------------ before every optimizer step

    @torch.no_grad()
    def on_gradient(self) -> None:
        """After the last backward, before the step: scores see the averaged gradient, and young components get second moments
        of their own age."""
        if not self.active:
            return
        step = self._done + 1
        young = {name for name, born in self._born.items() if any(b != NEVER and step - b <= AGE_LIMIT for b in born)}
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
                    self._elements.update(self._scores[name][factor], part.master, part.gradient)
                if name in young and "exp_avg_sq" in part.moments:
                    ages = self._ages(name, step)[_component(factor, part, layer)]
                    beta2 = self._engine.optimizer.betas[1]
                    own_age(part.moments["exp_avg_sq"], part.gradient * clip, ages, step, beta2)

    def _ages(self, name: str, step: int) -> Tensor:
        """(r,) int64: the how manieth step of each component the optimizer step `step` is; 0 for those of the start."""
        ages = [0 if born == NEVER else step - born for born in self._born[name]]
        return torch.tensor(ages, device=self._comm.device)

    # ------------------------------------------------------------------ after every optimizer step

    @torch.no_grad()
    def after_step(self, done: int, loss: float) -> SwapReport | None:
        """done: finished steps. loss: of the last one, the same on all ranks. Returns what was decided, if anything was."""
        followed, self._done = self._following, done
        if not self.active or self._ended:
            return None
        table: list[Tensor] = []

        def scores() -> Tensor:
            if not table:
                table.append(self._group_scores())
            return table[0]

        decision = self._switching.after_step(done, loss, lambda: _mean_low_share(scores()))
        if decision is None:
            return None
        log.info("step %d: %s: %s", done, "recomposition" if decision.swap else "no recomposition", decision.reason)
        report = SwapReport(done, decision.swap, decision.reason, scores() if followed else None, list(self._layers))
        if decision.swap:
            self._swap(report)
        return report

    def _group_scores(self) -> Tensor:
        """(layers, r) float64 on the CPU, equal on all ranks: importance of every component; one collective."""
        table = torch.zeros(len(self._layers), self._method.rank, dtype=torch.float64, device=self._comm.device)
        for row, (name, layer) in zip(table, self._layers.items()):
            shapes = self._method.shapes(*layer.shape)
            for factor, part in self._engine.parts(layer).items():
                if part.counted:
                    scores = self._elements.scores(self._scores[name][factor])
                    row += group_sums(factor, scores, part.start, shapes[factor]).to(row.device)
        return self._comm.all_reduce(table).cpu()

    def _swap(self, report: SwapReport) -> None:
        if self._method.refill_from() == "restart":
            self._restart(report)
        else:
            self._replace(report)
        if self._following:
            self._forget_scores()
        else:
            self._scores.clear()

    # ------------------------------------------------------------------ some components

    def _replace(self, report: SwapReport) -> None:
        """The chosen components of every layer are fused and refilled."""
        scores = [None] * len(self._layers) if report.scores is None else report.scores
        chosen = {name: self._method.choose(row) for name, row in zip(self._layers, scores)}
        if not self._enough_reserve(chosen):
            report.swapped, report.reason = False, USED_UP
            return
        self._swaps += 1
        fresh = self._from_gradients(chosen) if self._method.refill_from() == "gradient" else self._from_reserves(chosen)
        errors = {}
        for name, layer in self._layers.items():
            new = broadcast_pair(self._comm, layer.shape, self._owners[name], fresh.pop(name, None))
            factors, used = self._read(layer)
            answer = self._method.fuse(factors, used, chosen[name], new)
            learned = self._learned_norm(name, used, chosen[name]) if self._owns(name) else 0.0
            errors[name] = self._carry_out(layer, answer, self._swaps)
            self._note_origin(name, answer)
            report.layers[name] = seen = self._seen(layer, answer)
            seen.learned_norm = learned
            seen.sigma = [self._method.scaling * float(b.norm() * a.norm()) for b, a in zip(new.left.T, new.right)]
            if report.scores is not None:
                seen.low_half_share = low_half_share(report.scores[len(report.layers) - 1])
        complete(self._comm, report, errors)

    def _enough_reserve(self, chosen: dict[str, tuple[int, ...]]) -> bool:
        """Whether every layer has components left; if not, recomposition ends here."""
        if self._method.refill_from() != "reserve":
            return True
        if all(self._reserve_left(name) >= len(components) for name, components in chosen.items()):
            return True
        log.info(USED_UP)
        self._ended = True
        return False

    def _reserve_left(self, name: str) -> int:
        return self._reserve_sizes[name] - self._taken[name]

    def _from_reserves(self, chosen: dict[str, tuple[int, ...]]) -> dict[str, LowRank]:
        """The next unused components of the layers that this rank owns."""
        fresh = {}
        for name, components in chosen.items():
            first = self._taken[name]
            self._taken[name] = last = first + len(components)
            if name in self._reserves:
                reserve = self._reserves[name]
                fresh[name] = LowRank(reserve.left[:, first:last], reserve.right[first:last])
        return fresh

    def _from_gradients(self, chosen: dict[str, tuple[int, ...]]) -> dict[str, LowRank]:
        """Leading directions of the present gradients of the layers that this rank owns, as large as what they replace."""
        magnitudes = {name: self._magnitude(self._layers[name], components) for name, components in chosen.items()}
        data, settings = self._probe(self._swaps), self._method.refill_probe()
        with torch.enable_grad():
            gradients = mean_gradients(
                self._engine, self._layers, self._owners, data.batches(), data.samples, data.loss, settings.sums, adapted=True
            )
        fresh, failure = {}, None
        try:
            for name, gradient in gradients.items():
                generator = layer_generator(f"{self._seed}.{self._swaps}", name)
                device, dtype = self._comm.device, self._engine.dtype
                layer = LayerInit(self._layers[name].shape, gradient.to(device), generator, dtype, device=device)
                fresh[name] = self._method.new_components(layer, magnitudes[name], len(chosen[name]))
        except Exception as error:  # the others wait: tell them before this rank leaves
            failure = error
        self._comm.agree(failure)
        return fresh

    def _magnitude(self, layer: AdapterLinear, components: tuple[int, ...]) -> float:
        """Mean norm of s·B_k·A_k over the components."""
        pair = self._method.delta(self._read(layer)[1])
        norms = pair.left.norm(dim=0) * pair.right.norm(dim=1)
        return float(norms[list(components)].mean())

    # ------------------------------------------------------------------ the whole adapter

    def _restart(self, report: SwapReport) -> None:
        """All of the adapter is fused, and it starts anew from the present gradients."""
        self._swaps += 1
        errors = {}
        for name, layer in self._layers.items():
            factors, used = self._read(layer)
            answer = self._method.fuse(factors, used, self._method.choose(None), None)
            errors[name] = self._carry_out(layer, answer, self._swaps)
            report.layers[name] = seen = self._seen(layer, answer)
            seen.learned_norm = seen.update_norm if self._owns(name) else 0.0
        with torch.enable_grad():
            init = initialise(
                self._engine, self._attached, self._seed, self._rate(report.step), self._probe(self._swaps), self._swaps,
                keep_function=self._method.keeps_function_at_restart(),
            )  # fmt: skip
        report.scalars |= {f"init/{key}": value for key, value in init.scalars.items()}
        complete(self._comm, report, errors)

    # ------------------------------------------------------------------ both

    @property
    def _ledger(self) -> Ledger:
        return self._attached.ledger

    def _read(self, layer: AdapterLinear) -> tuple[Factors, Factors]:
        """All factors whole: the optimizer's, and in float32 what the forward pass uses."""
        factors = self._engine.read(layer)
        return factors, {name: factor.to(self._engine.dtype).float() for name, factor in factors.items()}

    def _carry_out(self, layer: AdapterLinear, answer: Recomposition, number: int) -> float:
        """Factors, weight, moments and ledger of one layer; returns this rank's share of the squared rounding error."""
        self._engine.write(layer, answer.factors)
        error = self._ledger.apply(self._engine, layer, number, self._method.update_rounding(), answer.base_update)
        replaced = torch.zeros(self._method.rank, dtype=torch.bool, device=self._comm.device)
        replaced[list(answer.replaced)] = True
        for factor, part in self._engine.parts(layer).items():
            mask = replaced[_component(factor, part, layer)]
            for key in FORGOTTEN:
                if key in part.moments:
                    part.moments[key][mask.to(part.moments[key].device)] = 0.0
        for component in answer.replaced:
            self._born[layer.name][component] = self._done
        return error

    def _owns(self, name: str) -> bool:
        return self._owners[name] == self._comm.rank

    def _note_origin(self, name: str, answer: Recomposition) -> None:
        """Where the ledger's newest entry has the new components: behind what was fused."""
        entry = len(self._ledger.entries[name]) - 1
        first = answer.base_update.right.shape[0] - len(answer.replaced)
        for i, component in enumerate(answer.replaced):
            self._origin[name][component] = (entry, first + i)

    def _learned_norm(self, name: str, used: Factors, components: tuple[int, ...]) -> float:
        """‖s·(B₁A₁ − B₁A₁ as they were put in place)‖; on the layer's owner, before the swap."""
        now = self._method.delta(used)
        chosen = list(components)
        lefts, rights = [now.left[:, chosen]], [now.right[chosen]]
        for component in components:
            entry, column = self._origin[name][component]
            then = self._ledger.pair(name, entry)  # its sign is the other one already
            lefts.append(then.left[:, column : column + 1].to(now.left))
            rights.append(then.right[column : column + 1].to(now.right))
        return low_rank_norm(torch.cat(lefts, 1), torch.cat(rights, 0))

    def _seen(self, layer: AdapterLinear, answer: Recomposition) -> LayerSwap:
        """What there is to tell of a layer after its swap; some of it on the owner alone."""
        seen = LayerSwap(answer.replaced)
        seen.update_norm = low_rank_norm(answer.base_update.left, answer.base_update.right)
        seen.reserve_left = self._reserve_left(layer.name)
        if self._owns(layer.name):
            now = {name: factor.to(self._engine.dtype).float() for name, factor in answer.factors.items()}
            pairs = [self._method.delta(now), *self._ledger.pairs(layer.name)]
            device = self._comm.device
            left = torch.cat([pair.left.to(device, torch.float32) for pair in pairs], 1)
            right = torch.cat([pair.right.to(device, torch.float32) for pair in pairs], 0)
            singular_values = product_singular_values(left, right)
            seen.delta_norm, seen.effective_rank = float(singular_values.norm()), effective_rank(singular_values)
        return seen

    def _forget_scores(self) -> None:
        for name, layer in self._layers.items():
            parts = self._engine.parts(layer)
            self._scores[name] = {factor: self._elements.start(part.master) for factor, part in parts.items()}

    # ------------------------------------------------------------------ to a checkpoint and back

    def state(self) -> dict[str, Any] | None:
        """What is the same on all ranks, as JSON; None for a method that never replaces components."""
        if not self.active:
            return None
        return {
            "swaps": self._swaps, "done": self._done, "born": self._born, "origin": self._origin,
            "reserves": {name: self._reserve_left(name) for name in self._layers},
            "ended": self._ended, "switching": self._switching.state() if self._switching else {},
        }  # fmt: skip

    def tensors(self) -> Iterator[tuple[str, Tensor | None]]:
        """`<layer>/<factor>/<score>`, whole, and `<layer>/reserve/left|right`, what is unused; on rank 0's CPU. Collective."""
        if not self.active:
            return
        for name, layer in self._layers.items():
            if self._following:
                yield from self._score_tensors(layer)
            count = self._reserve_left(name)
            if count:
                for side, tensor in zip(("left", "right"), self._moved_reserve(layer, count)):
                    yield f"{name}/reserve/{side}", tensor

    def _score_tensors(self, layer: AdapterLinear) -> Iterator[tuple[str, Tensor | None]]:
        parts = self._engine.parts(layer)
        for factor, shape in self._trained_shapes(layer).items():
            for key in SCORE_KEYS:
                flat = torch.zeros(torch.Size(shape).numel(), device=self._comm.device)
                part = parts.get(factor)
                if part is not None and part.counted:
                    flat[part.start : part.start + part.master.numel()] = self._scores[layer.name][factor][key]
                whole = self._comm.reduce_to(flat, 0).view(shape).cpu()
                yield f"{layer.name}/{factor}/{key}", whole if self._comm.is_main else None

    def _moved_reserve(self, layer: AdapterLinear, count: int) -> tuple[Tensor | None, Tensor | None]:
        """The unused components of a layer, on rank 0."""
        name, device, dtype = layer.name, self._comm.device, self._engine.dtype
        if self._owns(name):
            reserve, first = self._reserves[name], self._taken[name]
            sides = reserve.left[:, first:].to(device).contiguous(), reserve.right[first:].to(device).contiguous()
        else:
            left, right = (layer.out_features, count), (count, layer.in_features)
            sides = torch.empty(left, dtype=dtype, device=device), torch.empty(right, dtype=dtype, device=device)
        sides = tuple(self._comm.broadcast(side, self._owners[name]).cpu() for side in sides)
        return sides if self._comm.is_main else (None, None)

    def restore(self, state: dict[str, Any], read: Callable[[str], Tensor | None]) -> None:
        """Goes on from what `state` and `tensors` gave, at any stage and world size. Collective. read: the tensor of a name, on
        rank 0; collective."""
        self._swaps, self._done, self._born = state["swaps"], state["done"], state["born"]
        # Of the reserves only what is unused was written.
        self._reserve_sizes, self._taken = state["reserves"], dict.fromkeys(self._layers, 0)
        self._origin = {name: [tuple(place) for place in places] for name, places in state["origin"].items()}
        self._ended = state["ended"]
        if not self.active:
            return
        self._switching.restore(state["switching"])
        for name, layer in self._layers.items():
            if self._following:
                self._restore_scores(layer, read)
            if self._reserve_left(name):
                self._restore_reserve(layer, read)

    def _restore_scores(self, layer: AdapterLinear, read: Callable[[str], Tensor | None]) -> None:
        parts = self._engine.parts(layer)
        for factor, shape in self._trained_shapes(layer).items():
            for key in SCORE_KEYS:
                whole = torch.zeros(shape, device=self._comm.device)
                found = read(f"{layer.name}/{factor}/{key}")
                if self._comm.is_main:
                    whole.copy_(found)
                self._comm.broadcast(whole, 0)
                part = parts.get(factor)
                if part is not None:
                    own = whole.view(-1)[part.start : part.start + part.master.numel()]
                    self._scores[layer.name][factor][key].copy_(own)

    def _restore_reserve(self, layer: AdapterLinear, read: Callable[[str], Tensor | None]) -> None:
        """The unused components, to the layer's owner."""
        sides = [read(f"{layer.name}/reserve/{side}") for side in ("left", "right")]
        whole = broadcast_pair(self._comm, layer.shape, 0, LowRank(*sides) if self._comm.is_main else None)
        if self._owns(layer.name):
            self._reserves[layer.name] = LowRank(
                *(side.to("cpu", self._engine.dtype, copy=True) for side in (whole.left, whole.right))
            )

    def _trained_shapes(self, layer: AdapterLinear) -> dict[str, tuple[int, ...]]:
        shapes = self._method.shapes(*layer.shape)
        return {factor: shapes[factor] for factor in self._method.trains}


def _component(factor: str, part: Part, layer: AdapterLinear) -> Tensor:
    """(n,) int64: the component that each element of a part belongs to. A core belongs to all, which are replaced together."""
    if factor == "R":
        return torch.zeros(part.master.numel(), dtype=torch.int64, device=part.master.device)
    shape = layer.method.shapes(*layer.shape)[factor]
    return component_of(factor, part.start, part.master.numel(), shape, part.master.device)


def _mean_low_share(scores: Tensor) -> float:
    return sum(low_half_share(row) for row in scores) / len(scores)
