"""What every method promises. The methods are found by the registry:
a new one is tested without a line here.
"""

import copy
import gc
import random
import sys
import weakref
from pathlib import Path

import numpy as np
import pydantic
import pytest
import torch

from distlora import methods
from distlora.adapter.attach import attach
from distlora.adapter.layer import AdapterLinear
from distlora.initialisation.trial import trial
from distlora.maths.linalg import row_norms
from distlora.maths.low_rank import LowRank
from distlora.methods import (
    CorrectsGradients,
    HasMagnitude,
    HoldsPretrained,
    Init,
    LayerInit,
    Method,
    NeedsProbe,
    Recomposes,
    TakesFromWeight,
    TrainsWeight,
    TransformsGradients,
    last_trained_factor,
    magnitude_of,
    probe_of,
    recomposing,
    registry,
    writes_weight,
)

RANK = 6
SHAPES = [(60, 131), (131, 60)]  # (out, in): odd, so that no usual divisor fits

ALL = sorted(registry())
ADAPTING = [name for name in ALL if registry()[name].path]

#: Methods whose adapted network is not the pretrained one before its first step: moved by a first step, or by
#: a small random core. A method that is not named here keeps the function.
STARTS = {"lora_sb": "moved", "lora_xs": "near"}
#: ‖ΔW‖ at the start over r·‖W‖₂ of methods that are near the pretrained network.
NEAR = 2e-5
#: Methods that decompose a matrix to start.
DECOMPOSES = {"lora_sb", "lora_xs", "lora_ga", "pissa", "srlora"}


#: Fields that must go with a rank, of methods whose defaults suit only some ranks.
GOES_WITH_RANK = {"srlora": lambda rank: {"target_rank": 2 * rank, "gamma": max(0.5, 1 / max(1, rank))}}


def make(name: str, **fields) -> Method:
    fields = {"rank": RANK, **fields}
    return registry()[name](**GOES_WITH_RANK.get(name, lambda rank: {})(fields["rank"]), **fields)


def source_for(method: Method, shape, seed=1):
    """A weight-like or gradient-like matrix, if the method wants one."""
    if method.source_matrix() is None:
        return None
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) / shape[1] ** 0.5


def initialise(method: Method, shape, seed=0, dtype=torch.float32, source=None) -> Init:
    source = source_for(method, shape) if source is None else source
    return method.initialise(LayerInit(shape, source, torch.Generator().manual_seed(seed), dtype, eta=1e-2))


def random_factors(method: Method, shape, dtype=torch.float32, seed=2):
    """Factors of which none is zero: at B = 0 or R = 0 most errors are invisible."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (torch.randn(size, generator=generator, dtype=torch.float64) / max(size) ** 0.5).to(dtype)
        for name, size in method.shapes(*shape).items()
    }


def adapter(method: Method, shape, factors=None, dtype=torch.float32) -> AdapterLinear:
    """A layer that holds these factors, or the method's own initial ones with the change of the weight that
    goes with them.
    """
    linear = plain(shape, dtype)
    layer = AdapterLinear(linear, method, "layer")
    source = linear.weight.detach().float() if method.source_matrix() == "weight" else None
    init = initialise(method, shape, dtype=dtype, source=source) if factors is None else Init(factors)
    with torch.no_grad():
        for name, value in init.factors.items():
            getattr(layer, name).copy_(value)
        if init.base_update is not None:
            layer.weight.copy_(layer.weight.float() + init.base_update.left @ init.base_update.right)
    return layer


def plain(shape, dtype=torch.float32) -> torch.nn.Linear:
    """The pretrained layer that `adapter` starts from."""
    out_features, in_features = shape
    linear = torch.nn.Linear(in_features, out_features, dtype=dtype)
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in linear.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / in_features**0.5)
            parameter.requires_grad_(False)
    return linear


def adapted_weight(method: Method, weight, factors):
    """W' by the contract: the sum of W and the update, its rows scaled to the magnitude if there is one."""
    delta = method.delta(factors)
    total = weight + delta.left @ delta.right
    if magnitude_of(method) is None:
        return total
    return torch.nn.functional.normalize(total) * factors[magnitude_of(method)][:, None]


def inputs(shape, dtype=torch.float32, seed=3, tokens=(2, 7)):
    return torch.randn(
        *tokens, shape[1], generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    ).to(dtype)


def start_of(name: str) -> str:
    return STARTS.get(name, "same")


def with_(capability) -> list[str]:
    """Methods that have a capability."""
    return [name for name in ALL if issubclass(registry()[name], capability)]


every_method = pytest.mark.parametrize("name", ALL)
every_adapter = pytest.mark.parametrize("name", ADAPTING)
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


# ---------------------------------------------------------------------- the registry and the recipe section


def test_every_file_is_a_method_under_its_own_name():
    files = {path.stem for path in Path(methods.__file__).parent.glob("*.py")} - {"__init__", "contract"}
    assert files == set(ALL)
    assert all(registry()[name].__module__ == f"distlora.methods.{name}" for name in ALL)
    assert {
        "lora",
        "lora_xs",
        "lora_sb",
        "full",
        "pissa",
        "srlora",
        "rslora",
        "lora_ga",
        "dora",
        "lora_pro",
    } <= set(ALL)


def test_the_core_of_the_contract_is_twelve_members_beside_the_fields():
    """What only some methods can do belongs to a capability."""
    named = {name for name in {*dir(Method), *Method.__annotations__} if not name.startswith("_")}
    assert named - set(dir(pydantic.BaseModel)) - {"name", "rank", "alpha", "dropout", "modules_to_save"} == {
        *("path", "trains", "zero_gradient_at_start", "scaling"),
        *("shapes", "problem_with", "fitted"),
        *("source_matrix", "initialise", "forward", "delta", "export_low_rank"),
    }
    assert set(Method.model_fields) == {"name", "rank", "alpha", "dropout", "modules_to_save"}
    assert [name for name in vars(Method) if name.startswith("_") and name == "_update"] == ["_update"]


def test_a_capability_is_no_method():
    capabilities = {
        *(NeedsProbe, HoldsPretrained, TakesFromWeight, HasMagnitude, CorrectsGradients),
        *(TransformsGradients, Recomposes, TrainsWeight),
    }
    assert capabilities.isdisjoint(registry().values())
    assert all(with_(capability) for capability in capabilities), "each has a method that tests it"


@every_method
def test_declarations(name):
    method, factors = make(name), set(make(name).shapes(*SHAPES[0]))
    assert method.name == name and sys.modules[type(method).__module__].__doc__.splitlines()[0]
    assert set(method.trains) | set(method.path) <= factors
    assert magnitude_of(method) in (None, *method.trains) and magnitude_of(method) not in method.path
    assert set(method.zero_gradient_at_start) < set(method.trains) or not method.zero_gradient_at_start
    assert bool(method.path) != isinstance(method, TrainsWeight)
    assert (method.source_matrix() == "gradient") == (probe_of(method) is not None)
    assert registry()[name](**method.model_dump()) == method
    assert registry()[name].model_validate_json(method.model_dump_json()) == method


@pytest.mark.parametrize("name", with_(NeedsProbe))
def test_what_eta_scales_is_a_factor(name):
    method = make(name)
    assert method.proportional_to_eta() in (None, *method.shapes(*SHAPES[0]))
    assert method.proportional_to_eta() or probe_of(method).eta is None


@every_method
def test_facts_follow_from_capabilities_and_settings(name):
    method = make(name)
    assert (recomposing(method) is method) == (isinstance(method, Recomposes) and method.recomposes)
    assert writes_weight(method) == (isinstance(method, TakesFromWeight) or bool(recomposing(method)))
    assert last_trained_factor(method) in (None, *method.trains)


@every_adapter
def test_only_what_writes_the_weight_changes_it_at_the_start(name):
    taken = initialise(make(name), SHAPES[0]).base_update
    assert (taken is not None) == isinstance(make(name), TakesFromWeight)


@every_method
@pytest.mark.parametrize(
    "wrong",
    [{"rnak": 8}, {"rank": 0}, {"rank": 1.5}, {"dropout": 1.0}, {"dropout": -0.1}, {"alpha": 0}],
    ids=str,
)
def test_wrong_fields_are_refused(name, wrong):
    with pytest.raises(pydantic.ValidationError):
        make(name, **wrong)


@every_method
def test_a_method_is_frozen(name):
    with pytest.raises(pydantic.ValidationError):
        make(name).rank = 3


# ---------------------------------------------------------------------- initialisation


@every_adapter
@every_shape
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_initial_factors_have_the_declared_shapes_and_dtypes(name, shape, dtype):
    method = make(name)
    factors = initialise(method, shape, dtype=dtype).factors
    assert {key: tuple(value.shape) for key, value in factors.items()} == method.shapes(*shape)
    for key, value in factors.items():
        assert value.device.type == "cpu" and value.isfinite().all() and not value.requires_grad
        assert value.dtype == torch.float32 or (key not in method.trains and value.dtype == dtype)


@every_adapter
@every_shape
def test_initialisation_is_deterministic_and_touches_no_global_state(name, shape):
    method = make(name)
    before = torch.get_rng_state(), random.getstate(), copy.deepcopy(np.random.get_state())
    source = source_for(method, shape)
    kept = None if source is None else source.clone()
    first = initialise(method, shape, source=source)
    assert torch.equal(torch.get_rng_state(), before[0]) and random.getstate() == before[1]
    assert all(np.array_equal(a, b) for a, b in zip(np.random.get_state(), before[2], strict=True))
    assert source is None or torch.equal(source, kept)
    torch.rand(3)  # the global generator has moved on: no matter
    second = initialise(method, shape, source=source)
    assert all(torch.equal(first.factors[key], second.factors[key]) for key in first.factors)
    assert first.report == second.report


@every_adapter
@every_shape
def test_the_function_is_preserved_at_the_start(name, shape):
    """W + base_update + delta = W, unless the method is known to begin elsewhere."""
    method, original = make(name), plain(shape)
    layer = adapter(method, shape)
    delta = method.export_low_rank(layer.factors())
    change = (layer.weight.double() + delta.left.double() @ delta.right.double() - original.weight).norm()
    scale = method.rank * torch.linalg.matrix_norm(original.weight, 2)
    x = inputs(shape)
    if start_of(name) == "moved":
        assert change > 1e-3 * scale
    elif start_of(name) == "near":
        assert 1e-6 * scale < change <= NEAR * scale
        torch.testing.assert_close(layer(x), original(x), rtol=0, atol=1e-3)
    elif torch.equal(layer.weight, original.weight):
        assert torch.equal(layer(x), original(x))
    else:  # taken from the weight and added again: equal to float32
        assert change <= 1e-6 * scale
        torch.testing.assert_close(layer(x), original(x), rtol=1e-5, atol=1e-5)


@every_adapter
def test_a_trial_tells_what_a_start_is(name):
    """What the table of methods and the plan go by."""
    method, found = make(name), trial(make(name))
    init = initialise(method, SHAPES[0])
    taken, reserved = (
        0 if pair is None else pair.right.shape[0] for pair in (init.base_update, init.reserve)
    )
    assert (found.taken, found.reserved) == (taken, reserved)
    assert found.exported == method.export_low_rank(init.factors).right.shape[0] + taken
    assert found.decomposes == (name in DECOMPOSES)
    least, most = {"moved": (1e-2, 1e3), "near": (1e-6, 1e-3), "same": (0, 1e-6)}[start_of(name)]
    assert least <= found.moved <= most


@every_adapter
@every_shape
@pytest.mark.parametrize("alpha", [None, 15.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_changes_the_weight_at_the_start_is_made_of_the_cast_factors(name, shape, alpha, dtype):
    """In bfloat16 too the two cancel to float32: a later cast would leave 1e-2 of it."""
    method = make(name, alpha=alpha)
    init = initialise(method, shape, dtype=dtype)
    if init.base_update is None:
        return
    assert init.base_update.left.dtype == init.base_update.right.dtype == torch.float32
    delta = method.delta({key: value.to(dtype).float() for key, value in init.factors.items()})
    total = (
        init.base_update.left.double() @ init.base_update.right.double()
        + delta.left.double() @ delta.right.double()
    )
    assert total.abs().max() <= 1e-6 * (delta.left @ delta.right).abs().max()


@every_adapter
@every_shape
def test_at_the_start_exactly_the_declared_tensors_have_no_gradient(name, shape):
    method = make(name)
    layer = adapter(method, shape)
    layer(inputs(shape)).square().sum().backward()
    assert {key for key in method.trains if not getattr(layer, key).grad.any()} == set(
        method.zero_gradient_at_start
    )


@every_adapter
@every_shape
def test_a_rank_above_the_smaller_side_is_refused(name, shape):
    assert make(name, rank=1).problem_with(*shape) is None
    problem = make(name, rank=61).problem_with(*shape)
    assert problem and "61" in problem and "60" in problem


@every_adapter
def test_scaling_is_a_positive_number_that_alpha_sets(name):
    assert make(name).scaling > 0
    assert make(name, alpha=6.0).scaling * 2 == pytest.approx(make(name, alpha=12.0).scaling)


# ---------------------------------------------------------------------- the layer's mathematics


@every_adapter
@every_shape
@pytest.mark.parametrize("alpha", [None, 15.0])
@pytest.mark.parametrize("with_bias", [False, True])
def test_forward_is_a_linear_layer_with_the_merged_weight(name, shape, alpha, with_bias):
    method = make(name, alpha=alpha)
    factors = random_factors(method, shape, torch.float64)
    generator = torch.Generator().manual_seed(4)
    weight = torch.randn(shape, generator=generator, dtype=torch.float64)
    bias = torch.randn(shape[0], generator=generator, dtype=torch.float64) if with_bias else None
    delta = method.delta(factors)
    assert (
        delta.left.shape[0] == shape[0]
        and delta.right.shape[1] == shape[1]
        and delta.left.dtype == torch.float64
    )
    assert (delta.left @ delta.right).norm() > 0.1
    x = inputs(shape, torch.float64)
    y = method.forward(x, weight, bias, factors, training=False)
    torch.testing.assert_close(
        y, torch.nn.functional.linear(x, adapted_weight(method, weight, factors), bias)
    )


@every_adapter
@pytest.mark.parametrize("alpha", [None, 15.0])
def test_delta_is_scaling_times_the_product_of_the_factors(name, alpha):
    method = make(name, alpha=alpha)
    factors = random_factors(method, SHAPES[0], torch.float64)
    product = factors[method.path[0]]
    for key in method.path[1:]:
        product = factors[key] @ product
    delta = method.delta(factors)
    torch.testing.assert_close(delta.left @ delta.right, method.scaling * product)


@every_adapter
@pytest.mark.parametrize("alpha", [None, 2.0])
def test_gradcheck(name, alpha):
    method = make(name, rank=2, alpha=alpha)
    shape = (4, 5)
    factors = random_factors(method, shape, torch.float64)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    bias = torch.randn(shape[0], generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    kept = {"prepared": method.prepare(weight, factors)} if isinstance(method, HasMagnitude) else {}
    leaves = [inputs(shape, torch.float64, tokens=(2, 3)).requires_grad_()]
    leaves += [factors[key].requires_grad_() for key in method.trains]

    def forward(x, *trained):
        moved = {**factors, **dict(zip(method.trains, trained, strict=True))}
        return method.forward(x, weight, bias, moved, training=True, **kept)

    assert torch.autograd.gradcheck(forward, leaves)


@every_adapter
@every_shape
def test_only_the_declared_factors_train(name, shape):
    method = make(name)
    layer = adapter(method, shape, random_factors(method, shape))
    x = inputs(shape).requires_grad_()
    layer(x).square().sum().backward()
    assert {key for key, p in layer.named_parameters() if p.requires_grad} == set(method.trains)
    assert {key for key, p in layer.named_parameters() if p.grad is not None} == set(method.trains)
    assert all(getattr(layer, key).grad.any() for key in method.trains)
    assert x.grad.any()


@every_adapter
def test_the_input_is_kept_only_where_the_first_factor_trains(name):
    """Frozen W and frozen A need of x nothing but the r-wide x Aᵀ."""
    method = make(name)
    layer = adapter(method, SHAPES[0], random_factors(method, SHAPES[0]))
    x = inputs(SHAPES[0]).requires_grad_() + 1
    alive = weakref.ref(x)
    y = layer(x)
    del x
    gc.collect()
    assert y.requires_grad
    assert (alive() is not None) == (method.path[0] in method.trains)


@every_adapter
@every_shape
def test_bfloat16_is_close_to_float32(name, shape):
    method = make(name)
    factors = random_factors(method, shape)
    exact, half = adapter(method, shape, factors), adapter(method, shape, factors, torch.bfloat16)
    x = inputs(shape)
    y, expected = half(x.bfloat16()), exact(x)
    assert y.dtype == torch.bfloat16
    assert (y.float() - expected).norm() < 0.02 * expected.norm()
    for layer, value in ((half, y), (exact, expected)):
        value.float().square().sum().backward()
        assert all(getattr(layer, key).grad.dtype == value.dtype for key in method.trains)
    for key in method.trains:
        reference = getattr(exact, key).grad
        assert (getattr(half, key).grad.float() - reference).norm() < 0.05 * reference.norm()


@every_adapter
def test_dropout_acts_in_training_only_and_is_right_on_average(name):
    shape = SHAPES[0]
    factors = random_factors(make(name), shape)
    magnitude = magnitude_of(make(name))
    if magnitude:  # such that no row is scaled, or that alone would be most of what is compared
        delta = make(name).delta(factors)
        factors[magnitude] = (plain(shape).weight + delta.left @ delta.right).norm(dim=1)
    with_dropout, without = (adapter(make(name, dropout=p), shape, factors) for p in (0.3, 0.0))
    x = inputs(shape, tokens=(1,))
    with torch.no_grad():
        assert torch.equal(with_dropout.eval()(x), without.eval()(x))
        base = torch.nn.functional.linear(x, without.weight, without.bias)
        update = without.train()(x) - base
        draws = 4000
        with torch.random.fork_rng():
            torch.manual_seed(7)
            noisy = with_dropout.train()(x.expand(draws, -1)) - base
    assert (noisy - update).abs().max() > 0.1 * update.abs().max()
    assert (noisy.mean(0) - update).norm() < 0.05 * (noisy - update).norm(dim=1).mean()


@every_adapter
def test_dropout_leaves_the_pretrained_part_alone(name):
    """W x is never dropped: with zero factors training and evaluation agree. (A magnitude is one here that
    scales no row.)
    """
    method = make(name, dropout=0.5)
    factors = {key: torch.zeros(size) for key, size in method.shapes(*SHAPES[0]).items()}
    if magnitude_of(method):
        factors[magnitude_of(method)] = row_norms(plain(SHAPES[0]).weight.detach())
    layer = adapter(method, SHAPES[0], factors)
    x = inputs(SHAPES[0])
    expected = torch.nn.functional.linear(x, layer.weight, layer.bias)
    torch.testing.assert_close(layer.train()(x), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(layer.eval()(x), expected, rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------------- recomposition


@pytest.mark.parametrize("name", [name for name in ADAPTING if recomposing(make(name))])
@every_shape
@pytest.mark.parametrize("alpha", [None, 15.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_recomposition_preserves_the_adapted_weight(name, shape, alpha, dtype):
    """base_update + delta after = delta before, as the forward pass uses them; all that is not replaced keeps
    every bit.
    """
    method = make(name, alpha=alpha)
    factors = random_factors(method, shape)
    used = {key: value.to(dtype).float() for key, value in factors.items()}
    scores = torch.rand(method.rank, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    replaced = method.choose(scores if method.element_scores() else None)
    assert list(replaced) == sorted(set(replaced)) and replaced and set(replaced) <= set(range(method.rank))
    reserve = initialise(method, shape, dtype=dtype).reserve
    new = LowRank(reserve.left[:, : len(replaced)], reserve.right[: len(replaced)])
    answer = method.fuse(factors, used, replaced, new)
    assert answer.replaced == replaced
    before, after = (
        method.delta(f) for f in (used, {key: v.to(dtype).float() for key, v in answer.factors.items()})
    )
    change = answer.base_update
    assert change.left.dtype == change.right.dtype == torch.float32 and change.right.shape[0] == 2 * len(
        replaced
    )
    total = change.left.double() @ change.right.double() + after.left.double() @ after.right.double()
    expected = before.left.double() @ before.right.double()
    assert (total - expected).abs().max() <= 1e-6 * expected.abs().max()
    kept = [k for k in range(method.rank) if k not in replaced]
    assert torch.equal(answer.factors["B"][:, kept], factors["B"][:, kept])
    assert torch.equal(answer.factors["A"][kept], factors["A"][kept])


# ---------------------------------------------------------------------- gradients and exports


@pytest.mark.parametrize("name", with_(CorrectsGradients))
@pytest.mark.parametrize("alpha", [None, 15.0])
def test_gradient_maps_are_float32_and_fit_the_trained_factors(name, alpha):
    method = make(name, alpha=alpha)
    for dtype in (torch.float32, torch.bfloat16):
        for key, (p, q) in method.gradient_map(random_factors(method, SHAPES[0], dtype)).items():
            assert key in method.trains
            rows, columns = method.shapes(*SHAPES[0])[key]
            assert (p.shape, q.shape) == ((rows, rows), (columns, columns))
            assert p.dtype == q.dtype == torch.float32


@pytest.mark.parametrize("name", with_(TransformsGradients))
def test_transformed_gradients_are_linear_in_the_gradients_and_new(name):
    """Linear, so that clipping may come before or after."""
    method = make(name)
    factors, shapes = random_factors(method, SHAPES[0]), method.shapes(*SHAPES[0])
    full = (random_factors(method, SHAPES[0], seed=seed) for seed in (4, 5))
    one, other = ({key: factors[key] for key in method.trains} for factors in full)
    kept = {key: value.clone() for key, value in one.items()}
    found, of_other = method.transform_gradients(one, factors), method.transform_gradients(other, factors)
    both = method.transform_gradients({key: 2 * one[key] - 3 * other[key] for key in one}, factors)
    assert found.keys() <= set(method.trains)
    assert all(torch.equal(one[key], kept[key]) for key in one)
    for key, value in found.items():
        assert value.dtype == torch.float32 and tuple(value.shape) == shapes[key] and not value.requires_grad
        torch.testing.assert_close(both[key], 2 * value - 3 * of_other[key], rtol=1e-4, atol=1e-4)


@every_adapter
@pytest.mark.parametrize("alpha", [None, 15.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_export_is_what_the_factors_add_to_the_weight(name, alpha, dtype):
    method = make(name, alpha=alpha)
    factors = random_factors(method, SHAPES[0], dtype)
    pair = method.export_low_rank(factors)
    assert pair.left.dtype == pair.right.dtype == torch.float32
    exact = method.delta({key: value.double() for key, value in factors.items()})
    torch.testing.assert_close(
        pair.left @ pair.right, (exact.left @ exact.right).float(), rtol=1e-4, atol=1e-5
    )


@every_method
def test_a_trained_step_reaches_every_method_through_attach(name):
    """The whole round: attach, a backward pass, a step; the loss falls and nothing but the declared moves."""
    generator = torch.Generator().manual_seed(8)
    net = torch.nn.Sequential(
        torch.nn.Linear(131, 60), torch.nn.Tanh(), torch.nn.Linear(60, 31), torch.nn.Linear(31, 17)
    ).double()
    attached = attach(net, make(name), ["0", "2"])
    for layer in attached.layers.values():
        for key, value in random_factors(attached.method, layer.shape).items():
            getattr(layer, key).data.copy_(value)
    x, target = (torch.randn(9, width, generator=generator, dtype=torch.float64) for width in (131, 17))
    before = {key: p.detach().clone() for key, p in net.named_parameters()}

    def loss():
        return (net(x) - target).square().mean()

    start = loss()
    start.backward()
    torch.optim.SGD([p for p in net.parameters() if p.requires_grad], 1e-3).step()
    assert {key for key, p in net.named_parameters() if not torch.equal(p, before[key])} == set(
        attached.trained
    )
    assert attached.trained and all(key.startswith(("0.", "2.")) for key in attached.trained)
    assert loss() < start
