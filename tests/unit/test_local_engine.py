"""LocalEngine defines the meaning of training: backward, step, read, write, save, restore."""

import copy
import math

import pytest
import torch

from distlora.adapter.attach import attach
from distlora.engine.comm import Comm, Topology
from distlora.engine.local import LocalEngine
from distlora.engine.optimizers import OptimizerSpec
from distlora.engine.protocol import clip_factor
from distlora.engine.schedules import Schedule
from distlora.maths.low_rank import LowRank
from distlora.maths.rounding import rounding_key
from distlora.methods.lora import LoRA
from distlora.methods.lora_sb import LoRASB

FP32, BF16 = torch.float32, torch.bfloat16
BOTH = pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
SGD = OptimizerSpec("sgd", 1e-2)
SPECS = {
    "adamw": OptimizerSpec("adamw", 1e-2),
    "adamw-decay": OptimizerSpec("adamw", 1e-2, betas=(0.8, 0.99), eps=1e-6, weight_decay=0.1),
    "sgd": SGD,
    "momentum": OptimizerSpec("sgd", 1e-2, momentum=0.9, weight_decay=0.01),
}
every_optimizer = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)


class Net(torch.nn.Module):
    """Two adapted layers of odd sizes, one with a bias, and a new head that trains fully."""

    def __init__(self):
        super().__init__()
        self.first = torch.nn.Linear(131, 60)
        self.second = torch.nn.Linear(60, 31, bias=False)
        self.head = torch.nn.Linear(31, 7)

    def forward(self, x):
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))


HEAD = {"head.weight", "head.bias"}


def _net(dtype=FP32, method=None, seed=0):
    """(model, attached), every factor random and not zero; equal arguments give equal models."""
    generator = torch.Generator().manual_seed(seed)
    net = Net().to(dtype)
    attached = attach(net, method or LoRA(rank=5), "all-linear", HEAD)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / max(parameter.shape) ** 0.5)
    return net, attached


def _engine(dtype=FP32, spec=SGD, clip=None, method=None, seed=0):
    net, attached = _net(dtype, method, seed)
    engine = LocalEngine(Comm(Topology(), torch.device("cpu"), distributed=False), dtype, clip)
    engine.start(net, spec)
    return engine, attached


def _batch(seed, dtype=FP32, rows=8):
    generator = torch.Generator().manual_seed(100 + seed)
    return torch.randn(rows, 131, generator=generator).to(dtype), torch.randn(rows, 7, generator=generator)


def _loss(net, batch):
    x, target = batch
    return (net(x).float() - target).square().mean()


def _train(engine, seeds):
    """One step a seed; returns the losses before each."""
    losses = []
    for seed in seeds:
        loss = engine.run(_loss, _batch(seed, engine.dtype))
        losses.append(loss.item())
        engine.backward(loss)
        engine.step()
    return losses


def _masters(engine):
    return {name: engine.read_trained(name)["master"].clone() for name in engine.trained_shapes()}


def _live(engine):
    return {name: p.detach().clone() for name, p in engine.module.named_parameters()}


# ---------------------------------------------------------------------- stepping


@every_optimizer
@BOTH
@pytest.mark.parametrize("clip", [None, 0.05])
def test_training_is_that_of_a_plain_loop_with_float32_masters(spec, dtype, clip):
    engine, _ = _engine(dtype, spec, clip)
    net, _ = _net(dtype)
    live = {name: p for name, p in net.named_parameters() if p.requires_grad}
    masters = {name: p.detach().float().clone().requires_grad_() for name, p in live.items()}
    if spec.name == "sgd":
        optimizer = torch.optim.SGD(
            masters.values(), spec.lr, momentum=spec.momentum, weight_decay=spec.weight_decay
        )
    else:
        optimizer = torch.optim.AdamW(masters.values(), spec.lr, spec.betas, spec.eps, spec.weight_decay)
    for seed in range(4):
        loss, expected = _loss(engine.module, _batch(seed, dtype)), _loss(net, _batch(seed, dtype))
        assert loss.item() == expected.item()
        engine.backward(loss)
        info = engine.step()
        expected.backward()
        for name, p in live.items():
            masters[name].grad, p.grad = p.grad.float(), None
        norm = math.sqrt(sum(float(m.grad.double().square().sum()) for m in masters.values()))
        assert info.grad_norm == pytest.approx(norm, rel=1e-5) and not info.skipped
        if clip:
            assert norm > clip
            for m in masters.values():
                m.grad *= clip / (norm + 1e-6)
        optimizer.step()
        with torch.no_grad():
            for name, p in live.items():
                p.copy_(masters[name])
    for name, value in _masters(engine).items():
        torch.testing.assert_close(value, masters[name].detach(), rtol=1e-5, atol=1e-7)


@BOTH
def test_frozen_parameters_never_move(dtype):
    engine, attached = _engine(dtype, OptimizerSpec("adamw", 1e-2, weight_decay=0.5))
    before = _live(engine)
    _train(engine, range(3))
    moved = {name for name, value in _live(engine).items() if not torch.equal(value, before[name])}
    assert moved == set(attached.trained) == set(engine.trained_shapes())


def test_gradients_add_up_over_micro_batches():
    whole, parts = _engine(clip=1e-2)[0], _engine(clip=1e-2)[0]
    x, target = _batch(0)
    whole.backward(_loss(whole.module, (x, target)))
    for rows in (slice(0, 3), slice(3, 8)):  # each micro-batch's share of the global mean, not its own mean
        parts.backward((parts.module(x[rows]) - target[rows]).square().sum() / target.numel())
    assert parts.step().grad_norm == pytest.approx(whole.step().grad_norm, rel=1e-5)
    for name, value in _masters(parts).items():
        torch.testing.assert_close(value, _masters(whole)[name], rtol=1e-5, atol=1e-7)


@BOTH
def test_gradients_are_forgotten_after_a_step(dtype):
    engine, _ = _engine(dtype)
    engine.backward(_loss(engine.module, _batch(0, dtype)))
    engine.step()
    assert all(p.grad is None or not p.grad.any() for p in engine.module.parameters())
    loss = _loss(engine.module, _batch(1, dtype))
    wanted = torch.autograd.grad(
        loss, [p for p in engine.module.parameters() if p.requires_grad], retain_graph=True
    )
    engine.backward(loss)
    assert engine.step().grad_norm == pytest.approx(
        math.sqrt(sum(float(g.double().square().sum()) for g in wanted)), rel=1e-4
    )


@BOTH
def test_clipping_bounds_the_step_and_reports_the_norm_before_it(dtype):
    engine, _ = _engine(dtype, OptimizerSpec("sgd", 1.0), clip=1e-3)
    before = _masters(engine)
    engine.backward(100 * _loss(engine.module, _batch(0, dtype)))
    norm = engine.step().grad_norm
    length = math.sqrt(
        sum(float((value - before[name]).square().sum()) for name, value in _masters(engine).items())
    )
    assert norm > 1.0
    assert length == pytest.approx(1e-3, rel=1e-2)


def test_a_clip_above_the_norm_changes_nothing():
    free, loose = _engine()[0], _engine(clip=1e6)[0]
    assert _train(free, range(3)) == _train(loose, range(3))


def test_steps_too_small_for_bfloat16_add_up_in_the_masters():
    engine, _ = _engine(BF16, OptimizerSpec("sgd", 1e-4))
    masters, live = _masters(engine), _live(engine)
    _train(engine, [0] * 3)
    name = "first.A"
    assert not torch.equal(_masters(engine)[name], masters[name])
    unmoved = (_live(engine)[name] == live[name]) & (_masters(engine)[name] != masters[name])
    assert unmoved.float().mean() > 0.5  # most steps are below half a unit in the last place
    for name, value in _masters(engine).items():
        assert value.dtype == FP32 and torch.equal(_live(engine)[name], value.bfloat16())


def test_the_rate_can_be_set_for_every_step():
    engine, _ = _engine(spec=OptimizerSpec("sgd", 123.0))
    for rate in (0.0, 1e-2, 3e-2):
        engine.set_rate(rate)
        before = _masters(engine)["head.bias"]
        loss = _loss(engine.module, _batch(0))
        gradient = torch.autograd.grad(loss, engine.module.head.bias, retain_graph=True)[0]
        engine.backward(loss)
        engine.step()
        torch.testing.assert_close(_masters(engine)["head.bias"], before - rate * gradient)


@BOTH
def test_a_trained_tensor_that_no_pass_reached_is_left_alone(dtype):
    engine, _ = _engine(dtype)
    before = _masters(engine)
    engine.backward(_loss(lambda x: torch.tanh(engine.module.first(x))[:, :7], _batch(0, dtype)))
    engine.step()
    after = _masters(engine)
    assert {name for name in after if not torch.equal(after[name], before[name])} == {"first.A", "first.B"}


def test_modes_and_contexts():
    engine, _ = _engine()
    for on in (True, False):
        engine.train_mode(on)
        assert engine.module.training == engine.module.first.training == on
    before = engine.read_parameter("first.A").clone()
    with engine.probe_pass():
        assert engine.run_probe(_loss, _batch(0)).item() == engine.run(_loss, _batch(0)).item()
    with engine.whole_model() as fits:
        assert fits is True and engine.module.first.weight.shape == (60, 131)
    with engine.loading(), engine.attaching():
        pass
    assert engine.steps_taken() == 0 and torch.equal(engine.read_parameter("first.A"), before)


# ------------------------------------------------------------------- looking at gradients and changing them


def test_silent_tensors_of_a_healthy_step_are_none():
    engine, _ = _engine()
    engine.backward(_loss(engine.module, _batch(0)))
    assert engine.silent_tensors() == {}


@BOTH
def test_silent_tensors_are_named_with_their_fault(dtype):
    engine, attached = _engine(dtype)
    engine.write(
        attached.layers["first"], {"B": torch.zeros(60, 5)}
    )  # so A has no gradient, as at LoRA's start
    engine.backward(_loss(engine.module, _batch(0, dtype)))
    assert engine.silent_tensors() == {"first.A": "zero"}
    engine.module.second.B.grad[3, 2] = math.nan
    engine.module.head.bias.grad[0] = math.inf
    engine.module.head.weight.grad = None
    assert engine.silent_tensors() == {
        "first.A": "zero",
        "second.B": "not finite",
        "head.bias": "not finite",
        "head.weight": "zero",
    }


@BOTH
@pytest.mark.parametrize("clip", [None, 0.05])
def test_mapped_gradients_are_what_is_clipped_and_stepped(dtype, clip):
    engine, attached = _engine(dtype, OptimizerSpec("sgd", 1.0), clip)
    layer = attached.layers["first"]
    before = _masters(engine)
    engine.backward(_loss(engine.module, _batch(0, dtype)))
    plain = {name: p.grad.float().clone() for name, p in engine.module.named_parameters() if p.requires_grad}
    seen = []

    def change(layer, gradients, factors):
        seen.append((layer.name, {name: (g.dtype, tuple(g.shape)) for name, g in gradients.items()}))
        return {"A": -2 * gradients["A"]}  # of two factors one is changed

    engine.map_gradients([layer], change)
    assert seen == [("first", {"A": (FP32, (5, 131)), "B": (FP32, (60, 5))})]
    wanted = plain | {"first.A": -2 * plain["first.A"]}
    norm = math.sqrt(sum(float(g.double().square().sum()) for g in wanted.values()))
    assert engine.step().grad_norm == pytest.approx(norm, rel=1e-5)
    factor = clip / norm if clip else 1.0
    assert factor < 1 or not clip
    for name, value in _masters(engine).items():
        torch.testing.assert_close(value, before[name] - factor * wanted[name], rtol=1e-4, atol=1e-6)


def test_mapping_gradients_happens_after_accumulation():
    """A change that is not linear sees the sum of both micro-batches once."""
    engine, attached = _engine()
    calls = []
    for seed in (0, 1):
        engine.backward(0.5 * _loss(engine.module, _batch(seed)))
    total = engine.module.second.B.grad.clone()
    engine.map_gradients(
        [attached.layers["second"]],
        lambda layer, g, factors: calls.append(g["B"].clone()) or {"B": torch.sign(g["B"])},
    )
    assert len(calls) == 1 and torch.equal(calls[0], total)
    assert torch.equal(engine.module.second.B.grad, torch.sign(total))


@BOTH
@pytest.mark.parametrize("clip", [None, 0.05, 1e3])
def test_the_clip_factor_is_what_the_step_multiplies_by(dtype, clip):
    engine, _ = _engine(dtype, OptimizerSpec("sgd", 1.0), clip)
    before = _masters(engine)
    for seed in (0, 1):
        engine.backward(_loss(engine.module, _batch(seed, dtype)))
    gradients = {
        name: p.grad.float().clone() for name, p in engine.module.named_parameters() if p.requires_grad
    }
    factor = engine.clip_factor()
    assert (factor < 0.9) == (clip == 0.05) and (factor == 1.0) == (clip != 0.05)
    engine.step()
    for name, value in _masters(engine).items():
        torch.testing.assert_close(before[name] - value, factor * gradients[name], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("norm", "clip", "factor"),
    [(5.0, None, 1.0), (5.0, 0.0, 1.0), (0.0, 1.0, 1.0), (0.5, 1.0, 1.0), (4.0, 1.0, 0.25)],
)
def test_clip_factors(norm, clip, factor):
    assert clip_factor(norm, clip) == pytest.approx(factor, rel=1e-6)


# ---------------------------------------------------------------------- parts


@BOTH
def test_parts_are_whole_tensors_on_one_process_and_views_of_what_the_optimizer_has(dtype):
    engine, attached = _engine(dtype, SPECS["adamw"])
    layer = attached.layers["first"]
    before = engine.parts(layer)
    assert before.keys() == {"A", "B"} and all(
        part.moments == {} and part.gradient is None for part in before.values()
    )
    _train(engine, range(2))
    parts = engine.parts(layer)
    for factor, part in parts.items():
        trained = engine.read_trained(f"first.{factor}")
        assert (part.start, part.counted, part.gradient) == (0, True, None)
        assert part.moments.keys() == {"exp_avg", "exp_avg_sq"}
        assert torch.equal(part.master, trained["master"].view(-1)) and part.master.dtype == FP32
        assert all(torch.equal(value, trained[key].view(-1)) for key, value in part.moments.items())
    parts["A"].moments["exp_avg"][3:9] = 0.0
    parts["B"].moments["exp_avg_sq"][7] = 9.0
    assert not engine.read_trained("first.A")["exp_avg"].view(-1)[3:9].any()
    assert engine.read_trained("first.B")["exp_avg_sq"].view(-1)[7] == 9.0
    assert engine.read_trained("first.A")["exp_avg"].view(-1)[9] != 0.0


def test_parts_know_the_momentum_of_sgd():
    engine, attached = _engine(spec=SPECS["momentum"])
    assert engine.parts(attached.layers["second"])["B"].moments == {}
    _train(engine, [0])
    part = engine.parts(attached.layers["second"])["B"]
    assert part.moments.keys() == {"momentum_buffer"} and part.moments["momentum_buffer"].any()
    plain, attached = _engine(spec=SGD)
    _train(plain, [0])
    assert plain.parts(attached.layers["second"])["B"].moments == {}


@BOTH
def test_gradients_of_parts_are_summed_over_micro_batches_and_not_clipped(dtype):
    engine, attached = _engine(dtype, clip=1e-3)
    for seed in (0, 1):
        engine.backward(_loss(engine.module, _batch(seed, dtype)))
    assert engine.clip_factor() < 0.5
    for name, layer in attached.layers.items():
        for factor, part in engine.parts(layer, gradients=True).items():
            wanted = dict(engine.module.named_parameters())[f"{name}.{factor}"].grad
            assert (
                part.gradient.dtype == FP32
                and torch.equal(part.gradient, wanted.float().view(-1))
                and wanted.any()
            )


def test_parts_are_of_trained_factors_only_and_one_without_a_pass_has_no_gradient():
    engine, attached = _engine(method=LoRASB(rank=5))
    assert engine.parts(attached.layers["first"]).keys() == {"R"}
    engine.backward(_loss(lambda x: torch.tanh(engine.module.first(x))[:, :7], _batch(0)))
    assert engine.parts(attached.layers["first"], gradients=True)["R"].gradient is not None
    assert engine.parts(attached.layers["second"], gradients=True)["R"].gradient is None


# ---------------------------------------------------------------------- adding to a frozen weight


@BOTH
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_add_low_rank_changes_the_frozen_weight_and_nothing_else(rounding, dtype):
    engine, attached = _engine(dtype, SPECS["adamw"])
    _train(engine, [0])
    layer, generator = attached.layers["first"], torch.Generator().manual_seed(4)
    update = LowRank(torch.randn(60, 3, generator=generator), torch.randn(3, 131, generator=generator))
    before, exact = _live(engine), layer.weight.double() + update.left.double() @ update.right.double()
    error = engine.add_low_rank(layer, update, rounding, rounding_key(1, "first", 1))
    after = _live(engine)
    assert {name for name in after if not torch.equal(after[name], before[name])} == {"first.weight"}
    missed = float((after["first.weight"].double() - exact).norm())
    unit = 1e-6 if dtype == FP32 else 2**-8 if rounding == "nearest" else 2**-7
    assert missed <= unit * float(exact.norm())
    assert error == (0.0 if dtype == FP32 else pytest.approx(missed**2, rel=1e-3))
    x, _ = _batch(1, dtype)
    assert torch.equal(
        layer(x), layer.method.forward(x, after["first.weight"], layer.bias, layer.factors(), True)
    )
    assert not layer.weight.requires_grad and layer.weight.grad is None


def test_add_low_rank_draws_by_its_key():
    update = LowRank(torch.full((60, 1), 1e-3), torch.ones(1, 131))
    found = []
    for key in (5, 5, 6):
        engine, attached = _engine(BF16)
        engine.add_low_rank(attached.layers["first"], update, "stochastic", key)
        found.append(attached.layers["first"].weight.detach().clone())
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


# ---------------------------------------------------------------------- reading and writing layers


@BOTH
def test_what_is_written_is_read(dtype):
    engine, attached = _engine(dtype, method=LoRASB(rank=5))
    layer = attached.layers["first"]
    generator = torch.Generator().manual_seed(9)
    values = {name: torch.randn(f.shape, generator=generator) for name, f in layer.factors().items()}
    engine.write(layer, values)
    got = engine.read(layer)
    assert torch.equal(got["R"], values["R"]) and got["R"].dtype == FP32  # the master of what trains
    for name in ("A", "B"):  # frozen: as the forward pass uses them
        assert got[name].dtype == dtype and torch.equal(got[name], values[name].to(dtype))
    x, _ = _batch(0, dtype)
    assert torch.equal(layer.R, values["R"].to(dtype))
    expected = layer.method.forward(
        x, layer.weight, layer.bias, {k: v.to(dtype) for k, v in values.items()}, False
    )
    assert torch.equal(layer(x), expected)


@BOTH
def test_a_step_goes_on_from_what_was_written(dtype):
    """Both copies were hit: a step from the old master would undo the write, a forward pass from the old copy
    ignore it.
    """
    engine, attached = _engine(dtype, OptimizerSpec("sgd", 1e-2))
    layer = attached.layers["first"]
    _train(engine, [0])
    value = torch.randn(60, 5, generator=torch.Generator().manual_seed(9))
    engine.write(layer, {"B": value})
    loss = _loss(engine.module, _batch(1, dtype))
    gradient = torch.autograd.grad(loss, layer.B, retain_graph=True)[0].float()
    engine.backward(loss)
    engine.step()
    torch.testing.assert_close(engine.read(layer)["B"], value - 1e-2 * gradient, rtol=1e-6, atol=1e-6)
    assert torch.equal(layer.B, engine.read(layer)["B"].to(dtype))


@BOTH
def test_writing_one_factor_leaves_the_others(dtype):
    engine, attached = _engine(dtype)
    layer = attached.layers["second"]
    before = engine.read(layer)
    engine.write(layer, {"A": torch.zeros(5, 60)})
    after = engine.read(layer)
    assert not after["A"].any() and torch.equal(after["B"], before["B"])


@BOTH
def test_what_is_read_is_a_copy(dtype):
    """Reads are snapshots: training on, or editing them, changes neither side."""
    engine, attached = _engine(dtype, SPECS["adamw"])
    layer = attached.layers["first"]
    _train(engine, [0])
    taken = {
        "read": engine.read(layer),
        "read_trained": engine.read_trained("first.A"),
        "read_parameter": {"value": engine.read_parameter("first.A")},
    }
    kept = copy.deepcopy(taken)
    _train(engine, range(1, 4))
    changed = [
        f"{call} {name}"
        for call, values in taken.items()
        for name in values
        if not torch.equal(values[name], kept[call][name])
    ]
    assert changed == []


@BOTH
def test_single_parameters_by_name(dtype):
    engine, attached = _engine(dtype)
    layer = attached.layers["first"]
    weight = engine.read_parameter("first.weight").clone()
    assert weight.dtype == dtype and torch.equal(weight, layer.weight)
    assert torch.equal(engine.read_parameter("first.A"), layer.A)
    engine.write_parameter("first.weight", weight + 1)
    assert torch.equal(layer.weight, weight + 1)
    owned = engine.weight_at_owner(layer, 0)
    assert owned.dtype == FP32 and torch.equal(owned, (weight + 1).float())


def test_trained_shapes_are_all_and_only_the_trained_tensors():
    engine, attached = _engine()
    assert engine.trained_shapes() == {
        "first.A": (5, 131),
        "first.B": (60, 5),
        "second.A": (5, 60),
        "second.B": (31, 5),
        "head.weight": (7, 31),
        "head.bias": (7,),
    }
    assert list(engine.trained_shapes()) == attached.trained


# ---------------------------------------------------------------------- saving and restoring


def _snapshot(engine):
    tensors = {name: copy.deepcopy(engine.read_trained(name)) for name in engine.trained_shapes()}
    return tensors, engine.steps_taken()


def _restore(engine, snapshot):
    tensors, steps = snapshot
    for name in engine.trained_shapes():
        engine.write_trained(name, tensors[name], steps)


@every_optimizer
@BOTH
def test_a_restored_run_goes_on_bit_by_bit(spec, dtype):
    engine, _ = _engine(dtype, spec)
    _train(engine, range(3))
    snapshot = _snapshot(engine)
    expected_losses, expected = _train(engine, range(3, 6)), _masters(engine)

    other, _ = _engine(dtype, spec)
    _restore(other, snapshot)
    assert other.steps_taken() == snapshot[1]
    assert _train(other, range(3, 6)) == expected_losses
    assert all(torch.equal(value, expected[name]) for name, value in _masters(other).items())
    assert other.steps_taken() == engine.steps_taken()


@BOTH
def test_a_running_engine_goes_back_to_a_snapshot(dtype):
    engine, _ = _engine(dtype, SPECS["adamw"])
    _train(engine, range(2))
    snapshot = _snapshot(engine)
    expected = _train(engine, range(2, 5))
    _restore(engine, snapshot)
    assert _train(engine, range(2, 5)) == expected


@pytest.mark.parametrize("spec", [SPECS["adamw"], SPECS["momentum"]], ids=["adamw", "momentum"])
def test_a_running_engine_goes_back_to_before_its_first_step(spec):
    """The snapshot has no moments, so none may be left."""
    engine, _ = _engine(spec=spec)
    snapshot = _snapshot(engine)
    expected = _train(engine, range(3))
    _restore(engine, snapshot)
    assert _train(engine, range(3)) == expected


@every_optimizer
def test_a_snapshot_holds_float32_master_and_moments(spec):
    engine, _ = _engine(BF16, spec)
    assert set(engine.read_trained("first.A")) == {"master"}  # before the first step there are no moments
    _train(engine, range(2))
    state = engine.read_trained("first.A")
    assert set(state) == {"master", *spec.moments()}
    assert {(value.dtype, tuple(value.shape)) for value in state.values()} == {(FP32, (5, 131))}
    assert all(state[key].any() for key in spec.moments())
    assert engine.steps_taken() == (2 if spec.name == "adamw" else 0)


def test_the_moments_are_adams():
    engine, _ = _engine(spec=OptimizerSpec("adamw", 1e-2, betas=(0.9, 0.99)))
    loss = _loss(engine.module, _batch(0))
    gradient = torch.autograd.grad(loss, engine.module.first.A, retain_graph=True)[0]
    engine.backward(loss)
    engine.step()
    state = engine.read_trained("first.A")
    torch.testing.assert_close(state["exp_avg"], 0.1 * gradient)
    torch.testing.assert_close(state["exp_avg_sq"], 0.01 * gradient.square())


def test_the_restored_step_count_counts():
    """Adam's bias correction depends on it: with a wrong count the next step has another length."""
    lengths = {}
    for steps in (1, 1000):
        engine, _ = _engine(spec=SPECS["adamw"])
        _train(engine, [0])
        tensors, _ = _snapshot(engine)
        _restore(engine, (tensors, steps))
        assert engine.steps_taken() == steps
        before = _masters(engine)["first.A"]
        _train(engine, [1])
        lengths[steps] = float((_masters(engine)["first.A"] - before).norm())
        assert engine.steps_taken() == steps + 1
    assert abs(lengths[1000] / lengths[1] - 1) > 0.5


# ---------------------------------------------------------------------- schedules


PEAK = 2e-3


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine"])
def test_warm_up_is_linear_and_its_first_step_is_not_zero(kind):
    schedule = Schedule(kind, PEAK, steps=100, warmup_ratio=0.1)
    assert schedule.warmup_steps == 10
    assert schedule.rate(0) == pytest.approx(PEAK / 10)
    assert [schedule.rate(step) for step in range(10)] == pytest.approx(
        [PEAK * (step + 1) / 10 for step in range(10)]
    )
    assert schedule.rate(9) == pytest.approx(PEAK)
    assert max(schedule.rate(step) for step in range(100)) == pytest.approx(PEAK)


@pytest.mark.parametrize(
    ("kind", "middle", "last"),
    [
        ("constant", PEAK, PEAK),
        ("linear", PEAK / 2, PEAK / 90),
        ("cosine", PEAK / 2, PEAK * (1 - math.cos(math.pi / 90)) / 2),
    ],
)
def test_decay_from_the_peak_to_one_step_before_zero(kind, middle, last):
    schedule = Schedule(kind, PEAK, steps=100, warmup_ratio=0.1)
    assert schedule.rate(10) == pytest.approx(PEAK)
    assert schedule.rate(55) == pytest.approx(middle)
    assert schedule.rate(99) == pytest.approx(last)
    rates = [schedule.rate(step) for step in range(10, 100)]
    assert rates == sorted(rates, reverse=True) and all(rate > 0 for rate in rates)


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine"])
def test_without_warm_up_the_first_step_has_the_peak(kind):
    schedule = Schedule(kind, PEAK, steps=10)
    assert schedule.warmup_steps == 0 and schedule.rate(0) == PEAK


@pytest.mark.parametrize(
    ("ratio", "steps", "warmup"), [(0.02, 100, 2), (0.02, 101, 3), (0.02, 10, 1), (0.5, 3, 2), (1.0, 4, 4)]
)
def test_the_warm_up_is_rounded_up(ratio, steps, warmup):
    schedule = Schedule("cosine", PEAK, steps, ratio)
    assert schedule.warmup_steps == warmup
    assert schedule.rate(warmup - 1) == pytest.approx(PEAK)
    assert all(schedule.rate(step) > 0 for step in range(steps))


def test_a_run_of_one_step():
    assert Schedule("linear", PEAK, 1).rate(0) == PEAK
    assert Schedule("cosine", PEAK, 1, warmup_ratio=0.02).rate(0) == PEAK
