"""The start of a stack of experts: the method initialises every expert as a layer of its own."""

from collections.abc import Callable

import torch
from torch import Tensor

from distlora.adapter.expert_layers import of_expert, stacked
from distlora.adapter.layer import AdapterLinear
from distlora.maths.generators import layer_generator
from distlora.maths.low_rank import stacked_pairs
from distlora.methods import Factors, Init, LayerInit

Look = Callable[[str, LayerInit, Init], None]


def initialise_stack(
    layer: AdapterLinear, source: Tensor | None, seed: int | str, dtype: torch.dtype, eta: float,
    device: torch.device, look: Look,
) -> Init:  # fmt: skip
    """The factors of all experts, stacked; reported numbers are means over the experts.

    source: (E, out, in), what the method asks for, or None. Every expert has a generator of its own. look: is
    shown every expert's name and factors. An expert that no token of a probe came to has the gradient zero,
    whose decomposition has arbitrary directions: it starts along the first coordinates, LoRA-SB with R = 0.
    """
    method, found = layer.method, []
    for expert, name in enumerate(layer.matrix_names):
        own = None if source is None else source[expert]
        given = LayerInit(layer.shape, own, layer_generator(seed, name), dtype, eta, device)
        found.append(method.initialise(given))
        look(name, given, found[-1])
    report = {key: sum(init.report[key] for init in found) / len(found) for key in found[0].report}
    pairs = ([init.base_update for init in found], [init.reserve for init in found])
    both = (None if own[0] is None else stacked_pairs(own) for own in pairs)
    return Init(stacked([init.factors for init in found]), report, *both)


def gradient_maps(layer: AdapterLinear, factors: Factors) -> dict[str, tuple[Tensor, Tensor]]:
    """What `CorrectsGradients.gradient_map` answers; of a stack with (E, r, r) in the place of (r, r). An
    expert that needs no correction has identities there.
    """
    method = layer.method
    if not layer.stack:
        return method.gradient_map(factors)
    maps = [method.gradient_map(of_expert(factors, expert)) for expert in range(*layer.stack)]
    found = {}
    for name in sorted({name for own in maps for name in own}):
        rows, columns = factors[name].shape[-2:]
        none = torch.eye(rows, device=factors[name].device), torch.eye(columns, device=factors[name].device)
        sides = [own.get(name, none) for own in maps]
        found[name] = torch.stack([left for left, _ in sides]), torch.stack([right for _, right in sides])
    return found
