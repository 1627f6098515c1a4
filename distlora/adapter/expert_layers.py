"""Mixtures of experts whose weights are one 3-D parameter for all experts of a block.

transformers' classes state how they are computed, see `use_experts_implementation` there: attributes say
whether there is a gate and a bias, and whether the weights are stored transposed. `Experts` stands in the
place of such a module and computes the same, with two layers of its own:

    up projection   (E, 2·I, H), or (E, H, 2·I) where transposed     `gate_up_proj`, or `up_proj` without gate
    down projection (E, H, I), or (E, I, H)                          `down_proj`

Both are called in every pass, whatever the tokens' routes are, so that under ZeRO-3 all ranks gather the same
parameters in the same order.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from distlora.adapter.layer import AdapterLinear
from distlora.adapter.passes import Tap
from distlora.maths.grouped import grouped_linear, spread_rows, tapped_grouped_linear
from distlora.maths.low_rank import LowRank, add_low_rank, add_pair
from distlora.maths.rounding import Rounding
from distlora.methods import Factors, Method

#: Keys of stochastic rounding are below this.
_KEYS = 1 << 63

#: What classes of transformers say of their experts.
_FACTS = ("num_experts", "has_gate", "has_bias", "is_transposed", "_apply_gate")


@dataclass(frozen=True)
class ExpertWeight:
    """A 3-D parameter of experts. module: the name of the experts' module. attribute: the parameter's name in
    it. experts: E. shape: (out, in) of one expert. transposed: stored as (E, in, out).
    """

    module: str
    attribute: str
    experts: int
    shape: tuple[int, int]
    transposed: bool

    @property
    def name(self) -> str:
        return f"{self.module}.{self.attribute}" if self.module else self.attribute


def expert_weights(model: nn.Module) -> dict[str, ExpertWeight]:
    """All weights of experts that can be adapted, by the parameter's name, in the model's order."""
    found = {}
    for name, module in model.named_modules():
        if not _states_its_form(module):
            continue
        for attribute in _projections(module):
            parameter = getattr(module, attribute)
            count, first, second = _shape(parameter)
            shape = (second, first) if module.is_transposed else (first, second)
            weight = ExpertWeight(name, attribute, count, shape, module.is_transposed)
            found[weight.name] = weight
    return found


def obstacle_of(model: nn.Module, weight: ExpertWeight) -> str | None:
    """Why experts cannot be adapted here, as the end of a sentence about them; None if they can be."""
    module = model.get_submodule(weight.module)
    parameter = getattr(module, weight.attribute)
    if getattr(module, "_is_expert_parallel", False):
        return "is split between ranks by experts, which is not supported"
    if not parameter.dtype.is_floating_point or type(parameter) is not nn.Parameter:
        return "is stored in packed form, over which experts are not adapted"
    return None


def parameters_of(model: nn.Module, weights: Sequence[ExpertWeight]) -> list[nn.Parameter]:
    """These weights, and the biases that belong to them."""
    found = []
    for weight in weights:
        module = model.get_submodule(weight.module)
        names = (weight.attribute, f"{weight.attribute}_bias")
        found += [
            getattr(module, name) for name in names if isinstance(getattr(module, name, None), nn.Parameter)
        ]
    return found


def put_on_experts(
    model: nn.Module, method: Method, weights: Sequence[ExpertWeight]
) -> dict[str, AdapterLinear]:
    """Puts the method on these weights, in place; returns the layers by name."""
    chosen = {weight.name: weight for weight in weights}
    layers = {}
    for module in dict.fromkeys(weight.module for weight in weights):
        own = model.get_submodule(module)
        experts = Experts(own, f"{module}.", method, set(chosen))
        parent, _, child = module.rpartition(".")
        setattr(model.get_submodule(parent), child, experts)
        layers |= {layer.name: layer for layer in experts.children() if isinstance(layer, AdapterExperts)}
    return layers


class Experts(nn.Module):
    """Experts in the place of the class's own, which its parameters are taken from.

    own: what transformers made. prefix: its name and a dot. adapted: full names of the weights that the
    method is put on.
    """

    def __init__(self, own: nn.Module, prefix: str, method: Method, adapted: set[str]):
        super().__init__()
        self.num_experts, self.has_gate = own.num_experts, own.has_gate
        projections = _projections(own)
        for attribute in projections:
            frozen = ExpertLinear(own, attribute)
            name = prefix + attribute
            layer = AdapterExperts(frozen, method, name) if name in adapted else frozen
            delattr(own, attribute)
            setattr(self, attribute, layer)
        for name, child in list(own.named_children()):
            setattr(self, name, child)
        for name, parameter in list(own.named_parameters(recurse=False)):
            if name.removesuffix("_bias") not in projections:
                setattr(self, name, parameter)
        self._up, self._down = projections
        self._gate = own._apply_gate if own.has_gate else own.act_fn
        self._normed = bool(getattr(own, "has_post_expert_norm", False))

    def forward(self, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden: (tokens, H). top_k_index, top_k_weights: (tokens, k), the experts of each token and their
        weights. Returns (tokens, H).
        """
        tokens, k = top_k_index.shape
        experts, order = torch.sort(top_k_index.reshape(-1), stable=True)
        counts = _counts(experts, self.num_experts)
        inner = self._gate(getattr(self, self._up)(hidden[order // k], counts))
        outer = getattr(self, self._down)(inner, counts)
        if self._normed:
            outer = self.post_expert_norm(outer)
        weighted = outer * top_k_weights.reshape(-1)[order].unsqueeze(-1)
        # A gather and a sum in one order: an index_add would add in another order on every run.
        back = torch.empty_like(order)
        back[order] = torch.arange(order.numel(), device=order.device)
        return weighted[back].view(tokens, k, -1).sum(1).to(hidden.dtype)


class ExpertLinear(nn.Module):
    """One frozen projection of all experts: `y_e = x_e W_eᵀ + b_e`.

    weight: as it is stored, (E, out, in), or (E, in, out) where `transposed`. bias: (E, out) or None. stack:
    (E,).
    """

    def __init__(self, own: nn.Module, attribute: str):
        super().__init__()
        self.weight = getattr(own, attribute)
        bias = f"{attribute}_bias"
        self.register_parameter("bias", getattr(own, bias) if own.has_bias else None)
        self.transposed = own.is_transposed
        count, first, second = _shape(self.weight)
        self.stack = (count,)
        self.out_features, self.in_features = (second, first) if self.transposed else (first, second)

    def forward(self, x: Tensor, counts: Sequence[int]) -> Tensor:
        """x: (S, in), sorted by expert. counts: the rows of each expert. Returns (S, out)."""
        return grouped_linear(x, self.weight, self.bias, counts, self.transposed)


class AdapterExperts(AdapterLinear):
    """A projection of all experts with a method's factors beside every W_e: each factor is one 3-D tensor, A
    (E, r, in), R (E, r, r), B (E, out, r), and a magnitude (E, out). The frozen weight stays as it is stored.
    """

    def __init__(self, projection: ExpertLinear, method: Method, name: str):
        super().__init__(projection, method, name)
        self._transposed = projection.transposed

    @property
    def transposed(self) -> bool:
        return self._transposed

    def forward(self, x: Tensor, counts: Sequence[int]) -> Tensor:
        """x: (S, in), sorted by expert. counts: the rows of each expert. Returns (S, out)."""
        self.called = self.called or x.numel() > 0
        return self.present_pass(_Routed(self, counts), x)

    def whole_weight(self, stored: Tensor | None = None) -> Tensor:
        """All W_e, (E, out, in) in float32; must not be changed. stored: as for `AdapterLinear`."""
        stored = self.weight.detach() if stored is None else stored
        out, inner = self.shape
        weight = stored.float().view(*self.stack, *((inner, out) if self.transposed else (out, inner)))
        weight, beside = weight.mT if self.transposed else weight, self.beside
        return weight if beside is None else add_pair(weight, beside)

    def add_to_part(
        self, part: Tensor, start: int, update: LowRank, rounding: Rounding, key: int, device: torch.device
    ) -> float:
        """update: left (E, out, k), right (E, k, in). Every expert is rounded with draws of its own."""
        size, end, error = self.out_features * self.in_features, start + part.numel(), 0.0
        for expert in range(start // size, -(-end // size)):
            first, last = max(start, expert * size), min(end, (expert + 1) * size)
            left, right = update.left[expert], update.right[expert]
            own = LowRank(right.T, left.T) if self.transposed else LowRank(left, right)
            here = part[first - start : last - start]
            error += add_low_rank(here, first - expert * size, own, rounding, (key + expert) % _KEYS, device)
        return error

    def transform_gradients(self, gradients: Factors, factors: Factors) -> Factors:
        new = [
            self.method.transform_gradients(of_expert(gradients, expert), of_expert(factors, expert))
            for expert in range(*self.stack)
        ]
        return stacked(new)


class _Routed:
    """An expert layer in one call: what a pass asks of a layer, for rows that are sorted by expert."""

    def __init__(self, layer: AdapterExperts, counts: Sequence[int]):
        self._layer, self._counts = layer, counts
        self.beside = layer.beside
        self.weight, self.bias, self.method, self.training = (
            layer.weight,
            layer.bias,
            layer.method,
            layer.training,
        )

    def factors(self) -> Factors:
        return self._layer.factors()

    def prepared(self, factors: Factors) -> Factors:
        return self._layer.prepared(factors)

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return grouped_linear(x, weight, bias, self._counts, self._layer.transposed)

    def tapped_product(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, anchor: Tensor, tap: Tap
    ) -> Tensor:
        return tapped_grouped_linear(x, weight, bias, self._counts, self._layer.transposed, anchor, tap)

    def along(self, u: Tensor, factor: Tensor, bias: Tensor | None) -> Tensor:
        return grouped_linear(u, factor, bias, self._counts)

    def spread(self, values: Tensor) -> Tensor:
        """(E, out) to (S, out): every row has the numbers of its expert."""
        return spread_rows(values, self._counts)


def of_expert(tensors: Factors, expert: int) -> Factors:
    """One expert's part of stacked tensors."""
    return {name: tensor[expert] for name, tensor in tensors.items()}


def stacked(tensors: Sequence[Factors]) -> Factors:
    """The parts of all experts as 3-D tensors."""
    return {name: torch.stack([own[name] for own in tensors]) for name in tensors[0]}


def _states_its_form(module: nn.Module) -> bool:
    return all(hasattr(module, fact) for fact in _FACTS) and all(
        len(_shape(getattr(module, name, None))) == 3 for name in _projections(module)
    )


def _projections(module: nn.Module) -> tuple[str, str]:
    return ("gate_up_proj" if module.has_gate else "up_proj"), "down_proj"


def _shape(parameter: Tensor | None) -> tuple[int, ...]:
    """The whole shape, also of a parameter that ZeRO-3 has cut up."""
    return () if not isinstance(parameter, Tensor) else tuple(getattr(parameter, "ds_shape", parameter.shape))


def _counts(experts: Tensor, number: int) -> tuple[int, ...]:
    """How often each expert is named in a sorted list. On the meta device, where there are no values, all are
    counted as the first one's: the sizes are the same.
    """
    if experts.is_meta:
        return (experts.numel(), *[0] * (number - 1))
    return tuple(torch.bincount(experts, minlength=number).tolist())
