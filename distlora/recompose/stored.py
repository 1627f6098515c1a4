"""What a checkpoint says of recomposition, compared with the run that is to go on from it."""

import copy
from collections.abc import Mapping
from typing import Any

from distlora.adapter.layer import AdapterLinear
from distlora.maths.recomposition_schedule import RecompositionSchedule
from distlora.methods import Recomposes
from distlora.recompose.scores import KEYS
from distlora.recompose.stacks import matrices_of


def problem_with(
    state: Mapping[str, Any],
    layers: Mapping[str, AdapterLinear],
    method: Recomposes,
    ledger: Mapping[str, list[dict[str, Any]]],
) -> str | None:
    """What of it does not fit; None if all does. state: with the types that a checkpoint has. ledger: the
    entries of every layer."""
    in_ledger, done = method.refill_from() != "restart", state["done"]
    for key in ("born", "reserves", *(("origin",) if in_ledger else ())):
        if state[key].keys() != layers.keys():
            other = next(iter(state[key].keys() ^ layers.keys()))
            return f"{key} has other layers than the run, such as {other}"
    components = {name: method.rank * matrices_of(layer) for name, layer in layers.items()}
    for layer, born in state["born"].items():
        if len(born) != components[layer] or max(born) > done:
            return f"born of {layer} does not tell of {components[layer]} components before step {done}"
    for layer, places in state["origin"].items() if in_ledger else ():
        columns = [entry["columns"] for entry in ledger.get(layer, ())]
        inside = all(entry < len(columns) and column < columns[entry] for entry, column in places)
        if len(places) != components[layer] or not inside:
            return f"origin of {layer} is not in its ledger"
    return None


def restored(schedule: RecompositionSchedule, state: dict[str, Any]) -> RecompositionSchedule:
    """A copy of the schedule that has taken its state back. Raises ValueError for what is none."""
    other = copy.deepcopy(schedule)
    other.restore(state)
    return other


def wanted(
    state: Mapping[str, Any],
    layers: Mapping[str, AdapterLinear],
    method: Recomposes,
    follows: bool,
) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors that the run reads, by name. follows: whether importance is still
    followed."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, layer in layers.items():
        own = method.shapes(*layer.shape)
        factors = {factor: (*layer.stack, *own[factor]) for factor in method.trains}
        if follows:
            shapes |= {f"{name}/{factor}/{key}": shape for factor, shape in factors.items() for key in KEYS}
        if method.refill_from() == "restart":
            shapes |= {f"{name}/{factor}/start": shape for factor, shape in factors.items()}
        count = state["reserves"][name]
        if count:
            shapes[f"{name}/reserve/left"] = *layer.stack, layer.out_features, count
            shapes[f"{name}/reserve/right"] = *layer.stack, count, layer.in_features
    return shapes
