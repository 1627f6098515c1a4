"""The start of a stack of experts: the method initialises every expert as a layer of its own."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from distlora.adapter.expert_layers import of_expert, stacked
from distlora.adapter.layer import AdapterLinear
from distlora.maths.generators import layer_generator
from distlora.maths.linalg import low_rank_norm
from distlora.maths.low_rank import LowRank
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
    for expert in range(*layer.stack):
        own = None if source is None else source[expert]
        name = f"{layer.name}.{expert}"
        given = LayerInit(layer.shape, own, layer_generator(seed, name), dtype, eta, device)
        found.append(method.initialise(given))
        look(name, given, found[-1])
    report = {key: sum(init.report[key] for init in found) / len(found) for key in found[0].report}
    return Init(
        stacked([init.factors for init in found]), report, _pairs([init.base_update for init in found])
    )


def _pairs(pairs: Sequence[LowRank | None]) -> LowRank | None:
    if pairs[0] is None:
        return None
    return LowRank(torch.stack([pair.left for pair in pairs]), torch.stack([pair.right for pair in pairs]))


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


def pair_norm(pair: LowRank) -> float:
    """‖left @ right‖ (Frobenius) of a pair, or of all pairs of a stack together."""
    if pair.left.dim() == 2:
        return low_rank_norm(pair.left, pair.right)
    return math.sqrt(sum(low_rank_norm(*own) ** 2 for own in zip(pair.left, pair.right)))
