"""Packed weights: what bitsandbytes makes of a matrix, layers over it, and a run with it on one process."""

import gc
import weakref

import bitsandbytes as bnb
import pytest
import torch
from torch import nn

from distlora.adapter.attach import attach, pack_linears
from distlora.adapter.layer import AdapterLinear, PackedLinear
from distlora.adapter.packed import packer, packing_maker, scale_bytes
from distlora.checkpoints.directory import newest
from distlora.checkpoints.restore import restore
from distlora.checkpoints.save import save
from distlora.data import collate
from distlora.engine.ledger import pretrained_at_owner
from distlora.engine.local import LocalEngine
from distlora.engine.owners import open_ledger
from distlora.errors import UserError
from distlora.files.tensors import TensorFiles
from distlora.initialisation.factors import initialise
from distlora.initialisation.pretrained import PretrainedFiles
from distlora.initialisation.probe import Probe
from distlora.maths.functional import linear, tapped_linear
from distlora.maths.low_rank import LowRank
from distlora.methods import TrainsWeight, registry
from distlora.models.losses import response_loss
from distlora.models.targets import loss_of_samples
from distlora.plan import plan_of
from distlora.recipe.combination import problem_with_packed_weights
from distlora.recipe.sections import Recipe
from tests.benchmarks.live_bytes import DEVICE, LiveBytes
from tests.distributed.cases import Setting, solo
from tests.distributed.recomposition_cases import Recomposing
from tests.distributed.world import build, samples, save_model
from tests.stepping import train_step

CPU = torch.device("cpu")
FP32, BF16 = torch.float32, torch.bfloat16
#: An odd number of elements, of which the last block has few; and whole blocks.
SHAPES = [(61, 131), (60, 131), (64, 128)]
#: Largest error of a number, as a share of what its scale was made from.
WORST = {"nf4": 0.16, "int8": 0.5 / 127 + 1e-6}
every_kind = pytest.mark.parametrize("kind", ["nf4", "int8"])
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
every_dtype = pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
every_double = pytest.mark.parametrize("double", [False, True], ids=["single", "double"])


def weight_of(shape, dtype=FP32, seed=0):
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.05).to(dtype)


def packed(kind, weight, compute=None, double=True):
    packing = packer(kind, weight.dtype, compute, double)(tuple(weight.shape))
    return packing, packing.pack(weight)


# ---------------------------------------------------------------------- packing


@every_kind
@every_shape
@every_dtype
def test_a_packed_weight_is_flat_small_and_near(kind, shape, dtype):
    weight = weight_of(shape, dtype)
    packing, stored = packed(kind, weight)
    numbers = weight.numel()
    assert stored.shape == (packing.elements,) and stored.dtype == dtype
    assert packing.nbytes == (-(-numbers // 2) if kind == "nf4" else numbers)
    assert 0 <= stored.nbytes - packing.nbytes < dtype.itemsize
    found = packing.unpack(stored, FP32)
    assert found.shape == shape and found.dtype == FP32 and packing.unpack(stored).dtype == dtype
    error = (found - weight.float()).abs()
    if kind == "nf4":
        whole = numbers // 64 * 64
        error, scale = (
            error.view(-1)[:whole].view(-1, 64),
            weight.float().view(-1)[:whole].view(-1, 64).abs().amax(1),
        )
    else:
        scale = weight.float().abs().amax(1)
    assert (error.amax(1) <= WORST[kind] * scale * 1.02).all() and error.max() > 0


@every_shape
@every_double
def test_nf4_is_what_the_vendors_own_layer_holds_and_computes(shape, double):
    out, into = shape
    theirs = bnb.nn.Linear4bit(
        into, out, bias=False, compute_dtype=FP32, compress_statistics=double, quant_type="nf4"
    )
    weight = weight_of(shape)
    theirs.weight = bnb.nn.Params4bit(
        weight.clone(),
        requires_grad=False,
        blocksize=64,
        compress_statistics=double,
        quant_type="nf4",
        module=theirs,
    )
    theirs = theirs.to("cpu")
    packing, stored = packed("nf4", weight, double=double)
    assert torch.equal(stored.view(torch.uint8)[: packing.nbytes], theirs.weight.data.view(-1))
    x = weight_of((5, into), seed=1)
    torch.testing.assert_close(linear(x, stored, None, packing.unpack), theirs(x), rtol=1e-5, atol=1e-6)


@every_kind
@every_dtype
def test_what_was_unpacked_packs_to_the_same_again(kind, dtype):
    packing, stored = packed(kind, weight_of(SHAPES[0], dtype), double=False)  # quantised scales move
    scales = [scale.clone() for scale in packing.scales()]
    again = packing.pack(packing.unpack(stored, FP32))
    assert torch.equal(again.view(torch.uint8), stored.view(torch.uint8))
    assert all(
        torch.allclose(a.float(), b.float(), rtol=1e-6) for a, b in zip(packing.scales(), scales, strict=True)
    )


@every_kind
def test_another_rank_unpacks_with_the_bytes_and_the_scales_alone(kind):
    """All that must travel: the stored tensor and `scales`, which are overwritten in place."""
    packing, stored = packed(kind, weight_of(SHAPES[0]))
    other, _ = packed(kind, weight_of(SHAPES[0], seed=9))
    for mine, theirs in zip(other.scales(), packing.scales(), strict=True):
        mine.copy_(theirs)
    assert torch.equal(other.unpack(stored, FP32), packing.unpack(stored, FP32))


@every_kind
@every_dtype
def test_zero_rows_and_blocks_stay_zero(kind, dtype):
    weight = weight_of((4, 64), dtype)
    weight[1:3] = 0
    packing, stored = packed(kind, weight)
    found = packing.unpack(stored)
    assert found.isfinite().all() and (found[1:3].abs() <= 1e-3 * found[0].abs().max()).all()


@every_shape
@every_dtype
@pytest.mark.parametrize("asked", [("nf4", True), ("nf4", False), ("int8", True)], ids=str)
def test_sizes_are_known_before_anything_is_packed(asked, shape, dtype):
    kind, double = asked
    packing, stored = packed(kind, weight_of(shape, dtype), double=double)
    before = packing_maker(kind, dtype, None, double)(shape)
    assert (before.elements, before.scale_nbytes) == (stored.numel(), scale_bytes(packing))
    for wanted in (dtype, FP32):
        with LiveBytes() as counter:
            counter.watch([stored, *packing.scales()])
            there = counter.now[DEVICE]
            matrix = packing.unpack(stored, wanted)
            seen = counter.peak[DEVICE] - there
        assert matrix.nbytes <= seen <= before.unpacking_nbytes(wanted)
        assert (
            seen == before.unpacking_nbytes(wanted) or kind == "int8"
        )  # whose second product the library hides


def test_double_quantisation_makes_the_scales_small():
    sizes = {
        double: scale_bytes(packed("nf4", weight_of((256, 256)), double=double)[0])
        for double in (False, True)
    }
    assert sizes == {False: 4 * 1024, True: 1024 + 4 * 4 + 4}


# ---------------------------------------------------------------------- the product


@every_kind
@pytest.mark.parametrize("compute", [None, FP32], ids=["as stored", "fp32"])
@every_dtype
def test_the_product_and_its_gradient_are_those_of_the_unpacked_matrix(kind, dtype, compute):
    packing, stored = packed(kind, weight_of(SHAPES[0], dtype), compute)
    matrix, bias = packing.unpack(stored), weight_of((61,), dtype, 2)
    assert matrix.dtype == (compute or dtype)
    x = weight_of((3, 131), dtype, 1).requires_grad_()
    y = linear(x, stored, bias, packing.unpack)
    expected = nn.functional.linear(x.detach().to(matrix.dtype), matrix, bias.to(matrix.dtype)).to(dtype)
    assert y.dtype == dtype and torch.equal(y, expected)
    y.sum().backward()
    assert torch.equal(x.grad, (torch.ones(3, 61, dtype=matrix.dtype) @ matrix).to(dtype))


@every_kind
def test_nothing_of_the_unpacked_matrix_outlives_the_forward_pass(kind):
    packing, stored = packed(kind, weight_of(SHAPES[0]))
    made = []

    def unpack(stored):
        matrix = packing.unpack(stored)
        made.append(weakref.ref(matrix))
        return matrix

    for product in (
        linear,
        lambda x, w, b, u: tapped_linear(x, w, b, torch.zeros((), requires_grad=True), print, u),
    ):
        x = weight_of((3, 131), seed=1).requires_grad_()
        y = product(x, stored, None, unpack)
        gc.collect()
        assert y.requires_grad and all(matrix() is None for matrix in made)


def test_a_tap_sees_what_the_gradient_is_made_of():
    packing, stored = packed("nf4", weight_of(SHAPES[0]))
    seen, anchor, x = [], torch.zeros((), requires_grad=True), weight_of((3, 131), seed=1)
    y = tapped_linear(x, stored, None, anchor, lambda *found: seen.append(found), packing.unpack)
    torch.autograd.backward(y.square().sum(), inputs=[anchor])
    ((dy, rows),) = seen
    assert torch.equal(rows, x)
    torch.testing.assert_close(dy, 2 * x @ packing.unpack(stored).T)


# ---------------------------------------------------------------------- layers


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(131, 60)
        self.other = nn.Linear(60, 60)
        self.twin = nn.Linear(60, 60, bias=False)
        self.twin.weight = self.other.weight
        self.second = nn.Linear(60, 31, bias=False)
        self.head = nn.Linear(31, 7)

    def forward(self, x):
        return self.head(
            torch.tanh(self.second(torch.tanh(self.twin(self.other(torch.tanh(self.first(x)))))))
        )


def net_of(kind="nf4", dtype=FP32, method=None, targets=("first",)):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = Net().to(dtype)
    plain = {name: parameter.detach().clone() for name, parameter in net.named_parameters()}
    made = pack_linears(net, packer(kind, dtype), CPU, {"head.weight", "head.bias"})
    attached = attach(net, method or registry()["lora"](rank=4), list(targets), {"head.weight", "head.bias"})
    return net, attached, plain, made


@every_kind
@every_dtype
def test_every_linear_layer_is_packed_but_heads_and_shared_weights(kind, dtype):
    net, attached, plain, made = net_of(kind, dtype)
    assert isinstance(net.first, AdapterLinear) and isinstance(net.second, PackedLinear) and len(made) == 2
    assert type(net.other) is type(net.head) is nn.Linear and net.twin.weight is net.other.weight
    assert {p.dtype for p in net.parameters()} == {dtype}
    assert set(attached.trained) == {"first.A", "first.B", "head.weight", "head.bias"}
    x = weight_of((5, 131), dtype, 1)
    expected = nn.functional.linear(x, net.first.packing.unpack(net.first.weight), plain["first.bias"])
    assert torch.equal(net.first(x), expected)
    assert torch.equal(net.first.whole_weight(), net.first.packing.unpack(net.first.weight, FP32))
    assert (net.first.whole_weight() - plain["first.weight"].float()).norm() > 1e-3


def test_the_weight_of_a_plain_layer_is_asked_for_in_the_same_way():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layer = AdapterLinear(nn.Linear(7, 5).bfloat16(), registry()["lora"](rank=2), "x")
    assert torch.equal(layer.whole_weight(), layer.weight.float())
    assert torch.equal(layer.whole_weight(layer.weight.detach().view(-1) * 2), layer.weight.float() * 2)


def test_casts_and_moves_of_the_whole_model_leave_packed_weights_alone():
    """DeepSpeed casts the model as a whole; scales in bfloat16 would be wrong in the third digit."""
    net, _, _, _ = net_of("nf4", BF16)
    before = net.first.whole_weight()
    assert torch.equal(net.bfloat16().to("cpu").first.whole_weight(), before)


def test_whole_weights_are_let_go_one_by_one():
    with torch.random.fork_rng():
        net = Net()
    alive = [weakref.ref(net.first.weight), weakref.ref(net.second.weight)]
    counts = []

    def make(shape):
        gc.collect()
        counts.append(sum(reference() is not None for reference in alive))
        return packer("nf4", FP32)(shape)

    pack_linears(net, make, CPU, {"head.weight"})
    gc.collect()
    assert counts == [2, 1] and all(reference() is None for reference in alive)


# ---------------------------------------------------------------------- a run on one process


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    place = tmp_path_factory.mktemp("model")
    save_model(place)
    return place


def started(directory, dtype=FP32, **settings):
    engine = LocalEngine(solo(), dtype)
    return engine, build(engine, directory, **{"quantization": "nf4", "method": "lora", **settings})


@every_kind
@every_dtype
def test_the_plan_counts_the_bytes_that_are_there(directory, kind, dtype):
    engine, attached = started(directory, dtype, quantization=kind)
    recipe = Recipe(
        model={"path": str(directory), "dtype": str(dtype).removeprefix("torch."), "quantization": kind},
        method=attached.method, data={"task": "arithmetic"}, train={"steps": 1}, output_dir="unused",
    )  # fmt: skip
    plan = plan_of(recipe, 1, 1)
    scales = sum(scale_bytes(layer.packing) for layer in attached.layers.values())
    assert (
        plan.memory.weights + plan.memory.adapters
        == sum(p.nbytes for p in engine.module.parameters()) + scales
    )
    assert {name: p.numel() for name, p in engine.module.named_parameters()} == plan.setup.shapes.sizes


def train_steps(engine, count=4):
    batches = [collate(samples(6, 1), 0, CPU)]
    return [train_step(engine, batches, response_loss, 1e-2)[0] for _ in range(count)]


@every_kind
def test_training_over_a_packed_base_is_training_over_its_matrix(directory, kind):
    """The same numbers in plain layers give the same curve."""
    engine, attached = started(directory, quantization=kind)
    other, twin = started(directory, quantization=None)
    for name, layer in attached.layers.items():
        assert layer.packing is not None and other.module.get_parameter(f"{name}.weight").shape == layer.shape
        other.write_parameter(f"{name}.weight", engine.weight_at_owner(layer, 0))
    for each, at in ((engine, attached), (other, twin)):
        initialise(each, at, 3, 1e-2)
    losses = train_steps(engine)
    assert losses[-1] < losses[0] - 0.01
    assert losses == pytest.approx(train_steps(other), rel=1e-5)


@pytest.mark.parametrize("name", ["lora_xs", "lora_sb"])
def test_what_starts_from_the_weight_or_its_gradient_starts_from_the_matrix(directory, name):
    engines = [started(directory, method=name, quantization=kind) for kind in ("nf4", None)]
    for layer in engines[0][1].layers.values():
        engines[1][0].write_parameter(f"{layer.name}.weight", engines[0][0].weight_at_owner(layer, 0))
    rows = [collate(samples(4, 2), 0, CPU)]
    data = Probe(lambda: iter(rows), lambda: iter(rows), 4, loss_of_samples(response_loss))
    first, second = (initialise(engine, attached, 3, 1e-2, data) for engine, attached in engines)
    assert first.scalars == pytest.approx(second.scalars, rel=1e-3)
    assert train_steps(engines[0][0]) == pytest.approx(train_steps(engines[1][0]), rel=1e-3)


def test_a_checkpoint_over_a_packed_base_holds_no_weight_and_goes_on_alike(directory, tmp_path):
    engine, attached = started(directory)
    initialise(engine, attached, 3, 1e-2)
    train_steps(engine, 2)
    path = save(engine, attached, tmp_path, 2, {})
    assert not [name for name in TensorFiles(path, "adapter").names if name.endswith("weight")]
    expected = train_steps(engine, 2)
    engine, attached = started(directory)
    restore(engine, attached, newest(tmp_path))
    assert train_steps(engine, 2) == expected


# ---------------------------------------------------------------------- methods that change the weight


@pytest.mark.parametrize(
    ("name", "settings"), [("pissa", {}), ("lora_ga", {"alpha": 2}), ("srlora", {"target_rank": 12})]
)
@every_dtype
def test_what_is_left_of_the_pretrained_weight_is_packed_and_not_of_the_packed_one(
    directory, name, settings, dtype
):
    engine, attached = started(directory, dtype, method=name, **settings)
    _, untouched = started(directory, dtype)
    plain, _ = started(directory, dtype, quantization=None)
    rows = [collate(samples(4, 2), 0, CPU)]
    report = initialise(
        engine,
        attached,
        3,
        1e-2,
        Probe(lambda: iter(rows), lambda: iter(rows), 4, loss_of_samples(response_loss)),
    ).scalars
    before = after = weights = 0.0
    for layer in attached.layers.values():
        original = plain.module.get_parameter(f"{layer.name}.weight").detach().float()
        delta = attached.method.delta(
            {key: value.to(dtype).float() for key, value in engine.read(layer).items()}
        )
        rest = original - delta.left @ delta.right
        again = packer("nf4", dtype)(layer.shape)
        # The owner's sum is one addmm, whose last bit may decide what a number is rounded to.
        assert (layer.whole_weight() - again.unpack(again.pack(rest), FP32)).norm() <= 1e-2 * rest.norm()
        packed_alone = untouched.layers[layer.name].whole_weight()
        before += float((original - packed_alone).square().sum())
        after += float((rest - layer.whole_weight()).square().sum())
        weights += float(original.square().sum())
    assert report["quantization_error"] == pytest.approx((before / weights) ** 0.5, rel=1e-4)
    assert report["quantization_error_left"] == pytest.approx((after / before) ** 0.5, rel=1e-4)
    assert "rounding_loss" not in report
    if name == "pissa":
        assert report["quantization_error_left"] < 0.95


def test_the_start_of_pissa_is_made_of_the_pretrained_weight(directory):
    """QPiSSA: the singular vectors are those of W, not of what packing made of it."""
    (engine, attached), (plain, twin) = (
        started(directory, method="pissa", quantization=kind) for kind in ("nf4", None)
    )
    initialise(engine, attached, 3, 1e-2)
    initialise(plain, twin, 3, 1e-2)
    for name, layer in attached.layers.items():
        for factor, value in engine.read(layer).items():
            assert torch.equal(value, plain.read(twin.layers[name])[factor])


def test_a_resumed_start_packs_the_same_bytes(directory, tmp_path):
    engine, attached = started(directory, BF16, method="pissa")
    initialise(engine, attached, 3, 1e-2)
    save(engine, attached, tmp_path, 1, {})
    again, twin = started(directory, BF16, method="pissa")
    open_ledger(again, twin, 3, again.ledger.pretrained)
    restore(again, twin, newest(tmp_path))
    for name, layer in attached.layers.items():
        assert torch.equal(twin.layers[name].weight.view(torch.uint8), layer.weight.view(torch.uint8))
        assert torch.equal(twin.layers[name].whole_weight(), layer.whole_weight())


def test_weights_that_are_not_in_the_files_are_named(directory):
    with pytest.raises(UserError, match=r"hold no model.layers.9.x.weight of shape \(3, 4\)"):
        PretrainedFiles(directory, {"model.layers.9.x": (3, 4)}, FP32)


def test_whatever_goes_wrong_with_the_files_is_everyones_error(directory, monkeypatch):
    originals = PretrainedFiles(directory, {}, FP32)

    def broken(layer: str):
        raise RuntimeError("header too small")

    monkeypatch.setattr(originals, "read", broken)
    with pytest.raises(UserError, match="weight of a layer cannot be read again: header too small"):
        pretrained_at_owner(solo(), originals, "a layer", 0)


@pytest.mark.parametrize("name", registry())
def test_every_method_refuses_a_packed_base_or_trains_over_it(name):
    method = registry()[name](**{} if issubclass(registry()[name], TrainsWeight) else {"rank": 4})
    problem = problem_with_packed_weights(method, "nf4", partitioned=True)
    if problem:
        assert "\n" not in problem and problem.rpartition(";")[2].strip()
        return
    net, attached, _, _ = net_of("nf4", FP32, method)
    with torch.no_grad():
        for factor in attached.layers["first"].factors().values():
            factor.copy_(weight_of(factor.shape, seed=factor.numel()) * 5)
    stored, x = net.first.weight.clone(), weight_of((9, 131), seed=1) * 20
    net(x).square().mean().backward()
    assert all(getattr(net.first, factor).grad.any() for factor in method.trains)
    before = float(net(x).square().mean().detach())
    torch.optim.SGD([p for p in net.parameters() if p.requires_grad], 0.1).step()
    assert net(x).square().mean() < before and torch.equal(
        net.first.weight.view(torch.uint8), stored.view(torch.uint8)
    )


# ---------------------------------------------------------------------- recomposition

SRLORA = {
    "method": "srlora", "rank": 4, "target_rank": 16, "gamma": 0.5, "interval": 2, "quantization": "nf4",
    "targets": ["q_proj"],
}  # fmt: skip


def test_what_is_fused_stands_beside_a_packed_weight(directory, tmp_path):
    """Every swap keeps the function, which `steps` checks; the packed bytes stay; and a resumed run goes on
    alike.
    """
    run = Recomposing(Setting(LocalEngine(solo()), directory, tmp_path, micro_batch=12, **SRLORA), 7)
    stored = {name: layer.weight.clone() for name, layer in run.attached.layers.items()}
    run.steps(0, 5)
    for name, layer in run.attached.layers.items():
        assert torch.equal(layer.weight.view(torch.uint8), stored[name].view(torch.uint8))
        assert layer.beside.right.shape == (
            8,
            layer.in_features,
        )  # two swaps: two components fused, and two taken out, each
        assert [entry.beside for entry in run.engine.ledger.entries[name]] == [False, True, True]
    assert run.recomposer.beside_bytes() == sum(
        4 * 8 * sum(layer.shape) for layer in run.attached.layers.values()
    )
    save(run.engine, run.attached, tmp_path, 5, {}, recomposer=run.recomposer)
    run.losses.clear()
    run.steps(5, 7)
    again = Recomposing(
        Setting(LocalEngine(solo()), directory, tmp_path, micro_batch=12, **SRLORA), 7, begin=False
    )
    restore(again.engine, again.attached, newest(tmp_path), again.recomposer)
    again.steps(5, 7)
    assert again.losses == run.losses


def test_a_pair_beside_is_part_of_the_weight(directory):
    engine, attached = started(directory)
    layer = next(iter(attached.layers.values()))
    generator = torch.Generator().manual_seed(1)
    pairs = [
        LowRank(torch.randn(60, k, generator=generator), torch.randn(k, 60, generator=generator))
        for k in (2, 3)
    ]
    before, x = layer.whole_weight(), weight_of((5, 60)).requires_grad_()
    assert max(layer.put_beside(pair) for pair in pairs) < 1e-20  # float32 holds them
    wanted = before + sum(pair.left @ pair.right for pair in pairs)
    torch.testing.assert_close(layer.whole_weight(), wanted)
    y = layer(x)
    torch.testing.assert_close(y, nn.functional.linear(x, wanted, layer.bias), rtol=1e-4, atol=1e-4)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(gradient, (torch.ones(5, 60) @ wanted), rtol=1e-4, atol=1e-4)
    anchor, seen = torch.zeros((), requires_grad=True), []
    layer.tap(anchor, lambda dy, x: seen.append(dy))
    tapped = layer(x)
    torch.testing.assert_close(tapped, y, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.autograd.grad(tapped.sum(), [x, anchor], allow_unused=True)[0], gradient)
    assert len(seen) == 1


def test_what_the_cast_of_a_pair_beside_loses_is_told(directory):
    _, attached = started(directory, BF16)
    layer = next(iter(attached.layers.values()))
    pair = LowRank(torch.full((60, 1), 1.001), torch.ones(1, 60))
    assert layer.put_beside(pair) == pytest.approx(3600 * 0.001**2, rel=1e-3)


def test_fusing_into_a_packed_weight_packs_it_anew_and_tells_the_loss(directory):
    engine, attached = started(
        directory, fuse_into="base", **{k: v for k, v in SRLORA.items() if k != "quantization"}
    )
    open_ledger(engine, attached, 3, engine.ledger.pretrained)
    layer = next(iter(attached.layers.values()))
    before, update = layer.whole_weight(), LowRank(weight_of((60, 2)), weight_of((2, 60), seed=1))
    error = engine.ledger.apply(
        engine, layer, 1, "nearest", update, attached.method.fuses_beside(packed=True)
    )
    exact = before + update.left @ update.right
    assert layer.beside is None and 0 < error == pytest.approx(
        float((exact - layer.whole_weight()).square().sum()), rel=1e-4
    )
    assert (exact - layer.whole_weight()).norm() < 0.15 * exact.norm()


def test_where_fused_components_can_go():
    srlora = registry()["srlora"]
    assert [
        srlora(fuse_into=into).fuses_beside(packed)
        for into in (None, "base", "sidecar")
        for packed in (False, True)
    ] == [False, True, False, False, True, True]
    into_base, rounded = srlora(fuse_into="base"), srlora(fuse_into="base", rounding="stochastic")
    assert problem_with_packed_weights(srlora(), "nf4", partitioned=True) is None
    assert problem_with_packed_weights(into_base, "nf4", partitioned=False) is None
    assert "set that to sidecar" in problem_with_packed_weights(into_base, "nf4", partitioned=True)
    assert "set that to nearest" in problem_with_packed_weights(rounded, "nf4", partitioned=False)
    assert registry()["lora_sb"](recompose={"times": 1}).fuses_beside(packed=True)
