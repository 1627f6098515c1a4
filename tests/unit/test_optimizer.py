"""The optimizers by name: LoRA+'s rates, and bitsandbytes' moments read,
written and resumed to the last bit.
"""

import importlib.util

import pytest
import torch

from distlora.adapter.attach import attach
from distlora.engine.comm import Comm, Topology
from distlora.engine.local import LocalEngine
from distlora.engine.optimizers import OptimizerSpec, moment_of, restore_state, set_rate, steps_taken
from distlora.engine.protocol import adapter_layers, left_factors
from distlora.maths.blockwise import BLOCK, decode, encode
from distlora.methods import last_trained_factor, registry

RATE, RATIO = 1e-2, 16.0
WIDE, NARROW = (
    700,
    23,
)  # with 7 columns or rows: above and below the 4096 elements from which on moments are 8-bit
BNB = ("adamw8bit", "paged_adamw", "paged_adamw8bit")

pytestmark = pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
of_bitsandbytes = pytest.mark.parametrize("name", BNB)
eight_bit = pytest.mark.parametrize("name", [name for name in BNB if OptimizerSpec(name).eight_bit])


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.wide = torch.nn.Linear(WIDE, NARROW)
        self.head = torch.nn.Linear(NARROW, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.wide(x)))


def start(spec: OptimizerSpec, method: str = "lora", dtype=torch.float32) -> LocalEngine:
    """An engine with random factors, A of 4900 elements, B of 161, and a new head; equal arguments give equal
    ones.
    """
    net, generator = Net().to(dtype), torch.Generator().manual_seed(0)
    attach(net, registry()[method](rank=7), ["wide"], {"head.weight", "head.bias"})
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / max(parameter.shape) ** 0.5)
    engine = LocalEngine(Comm(Topology(), torch.device("cpu"), distributed=False), dtype)
    engine.start(net, spec)
    return engine


def train(engine: LocalEngine, seeds) -> list[float]:
    losses = []
    for seed in seeds:
        x = torch.randn(8, WIDE, generator=torch.Generator().manual_seed(seed)).to(engine.dtype)
        loss = engine.run(lambda net, x: net(x).float().square().mean(), x)
        engine.set_rate(RATE * (1 + seed % 2))
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


def masters(engine: LocalEngine) -> dict[str, torch.Tensor]:
    return {name: engine.read_trained(name)["master"] for name in engine.trained_shapes()}


def equal(left: dict, right: dict) -> bool:
    return left.keys() == right.keys() and all(torch.equal(value, right[key]) for key, value in left.items())


# ---------------------------------------------------------------------- LoRA+


@pytest.mark.parametrize("name", sorted(registry()))
def test_the_faster_factor_is_b_where_b_is_trained(name):
    method = registry()[name]()
    assert last_trained_factor(method) == ("B" if "B" in method.trains else None)
    if method.path:
        net = torch.nn.Sequential(torch.nn.Linear(64, 64))
        attach(net, method, ["0"])
        assert left_factors(adapter_layers(net)) == ({"0.B"} if "B" in method.trains else set())


@pytest.mark.parametrize("name", ["adamw", "sgd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lora_plus_is_torchs_optimizer_with_two_groups(name, dtype):
    """The schedule moves both rates, and B's stays `ratio` times the other."""
    engine = start(OptimizerSpec(name, RATE, weight_decay=0.1, lora_plus_ratio=RATIO), dtype=dtype)
    expected = masters(engine)
    rest = [value.requires_grad_() for key, value in expected.items() if key != "wide.B"]
    groups = [{"params": rest}, {"params": [expected["wide.B"].requires_grad_()]}]
    optimizer = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[name](groups, RATE, weight_decay=0.1)
    for seed in range(3):
        x = torch.randn(8, WIDE, generator=torch.Generator().manual_seed(seed)).to(dtype)
        engine.backward(engine.run(lambda net, x: net(x).float().square().mean(), x))
        for key, parameter in engine.module.named_parameters():
            if key in expected:
                expected[key].grad = parameter.grad.float()
        rate = RATE / (seed + 1)
        engine.set_rate(rate)
        optimizer.param_groups[0]["lr"], optimizer.param_groups[1]["lr"] = rate, RATIO * rate
        engine.step()
        optimizer.step()
    assert equal(masters(engine), {key: value.detach() for key, value in expected.items()})


def test_the_first_rate_of_b_is_right_before_any_schedule():
    parameters = {"x.A": torch.nn.Parameter(torch.ones(3)), "x.B": torch.nn.Parameter(torch.ones(3))}
    spec = OptimizerSpec("sgd", RATE, lora_plus_ratio=RATIO)
    optimizer = spec.build(spec.groups(parameters, {"x.B"}))
    assert [group["lr"] for group in optimizer.param_groups] == [RATE, RATIO * RATE]
    set_rate(optimizer, 1.0)
    assert [group["lr"] for group in optimizer.param_groups] == [1.0, RATIO]


def test_without_lora_plus_there_is_one_group_and_no_group_is_empty():
    parameters = {name: torch.nn.Parameter(torch.ones(3)) for name in ("x.A", "x.B")}
    assert len(OptimizerSpec().groups(parameters, {"x.B"})) == 1
    (group,) = OptimizerSpec(lora_plus_ratio=2.0).groups({"x.B": parameters["x.B"]}, {"x.B"})
    assert group["params"] == [parameters["x.B"]]


@pytest.mark.parametrize("name", ["adamw", *BNB])
def test_lora_plus_resumes_to_the_last_bit(name):
    spec = OptimizerSpec(name, RATE, weight_decay=0.1, lora_plus_ratio=RATIO)
    assert_resumes(spec, torch.float32)


# ---------------------------------------------------------------------- 8-bit numbers


def tables() -> list[torch.Tensor]:
    """Ascending and uneven; the first, like bitsandbytes', without -1,
    the second without negative numbers.
    """
    fine = torch.logspace(-6, 0, 128)
    return [
        torch.cat([-fine[:-1].flip(0), torch.zeros(1), fine]),
        torch.cat([torch.zeros(1), torch.logspace(-7, 0, 255)]),
    ]


@pytest.mark.parametrize("table", tables(), ids=["signed", "unsigned"])
@pytest.mark.parametrize("size", [1, BLOCK, 3 * BLOCK + 5])
def test_what_was_decoded_is_encoded_to_the_same_bits(table, size):
    generator = torch.Generator().manual_seed(size)
    codes = torch.randint(0, 256, (size,), generator=generator).to(torch.uint8)
    blocks = torch.rand(-(-size // BLOCK), generator=generator) * 1e-3
    scales = blocks.repeat_interleave(BLOCK)[:size]
    again, found = encode(decode(codes, scales, table), scales, table)
    assert torch.equal(again, codes) and torch.equal(found, blocks)


@pytest.mark.parametrize("table", tables(), ids=["signed", "unsigned"])
def test_an_encoded_number_is_the_nearest_of_the_table(table):
    values = torch.rand(2 * BLOCK, generator=torch.Generator().manual_seed(1)) * (-3 if table[0] < 0 else 3)
    codes, blocks = encode(values, torch.zeros_like(values), table)
    assert torch.equal(blocks, values.abs().view(2, BLOCK).amax(1))
    distances = (values.view(2, BLOCK, 1) / blocks.view(2, 1, 1) - table).abs()
    nearest = distances.gather(2, codes.long().view(2, BLOCK, 1))
    assert (nearest.squeeze() <= distances.amin(2) + 1e-7).all()


def test_zeros_stay_zeros():
    for table in tables():
        codes, blocks = encode(torch.zeros(BLOCK), torch.zeros(BLOCK), table)
        assert not blocks.any() and not decode(codes, blocks.expand(BLOCK), table).any()


# ---------------------------------------------------------------------- bitsandbytes


def assert_resumes(spec: OptimizerSpec, dtype) -> None:
    engine = start(spec, dtype=dtype)
    train(engine, range(3))
    saved, steps = {name: engine.read_trained(name) for name in engine.trained_shapes()}, engine.steps_taken()
    losses, there = train(engine, range(3, 6)), masters(engine)
    # One engine as a resumed run makes it, one that has gone another way before.
    for other in (start(spec, dtype=dtype), engine):
        for name, tensors in saved.items():
            other.write_trained(name, tensors, steps)
        assert other.steps_taken() == steps == 3
        assert all(equal(other.read_trained(name), tensors) for name, tensors in saved.items())
        assert train(other, range(3, 6)) == losses
        assert equal(masters(other), there)


@of_bitsandbytes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_restored_run_goes_on_bit_by_bit(name, dtype):
    assert_resumes(OptimizerSpec(name, RATE, weight_decay=0.1), dtype)


@of_bitsandbytes
def test_it_trains_as_torchs_adamw_up_to_its_rounding(name):
    """Its first step is AdamW's; later ones are where moments are float32."""
    rounds = OptimizerSpec(name).eight_bit
    engine, plain = (start(OptimizerSpec(each, RATE, weight_decay=0.1)) for each in (name, "adamw"))
    train(engine, [0]), train(plain, [0])
    for key, value in masters(plain).items():
        torch.testing.assert_close(masters(engine)[key], value, rtol=0, atol=1e-6)
    losses, expected = train(engine, range(1, 12)), train(plain, range(1, 12))
    torch.testing.assert_close(losses, expected, rtol=0.05 if rounds else 1e-4, atol=0)
    assert rounds == (
        not torch.allclose(masters(engine)["wide.A"], masters(plain)["wide.A"], rtol=0, atol=1e-4)
    )


@eight_bit
def test_large_tensors_keep_eight_bits_and_small_ones_floats(name):
    engine = start(OptimizerSpec(name, RATE))
    train(engine, range(2))
    dtypes = {len(p): state["state1"].dtype for p, state in engine._optimizer.state.items()}
    assert dtypes[7] == torch.uint8 and dtypes[NARROW] == torch.float32  # A and B, by their rows
    for key in ("exp_avg", "exp_avg_sq"):
        large, small = engine.read_trained("wide.A"), engine.read_trained("wide.B")
        assert large[key].abs().max() > 0 and small[key].abs().max() > 0
        assert (large[f"{key}_scale"] >= large[key].abs()).all() and not small[f"{key}_scale"].any()
        assert len(large[f"{key}_scale"].unique()) <= -(-large[key].numel() // BLOCK)
    assert set(large) == {"master", *OptimizerSpec(name).moments()}


def test_single_moments_can_be_changed_where_they_are_floats():
    """A paged AdamW gives views, which is what recomposition needs; 8-bit moments give none."""
    for name in BNB:
        engine = start(OptimizerSpec(name, RATE))
        train(engine, range(2))
        part = engine.parts(engine.module.wide)["A"]
        if OptimizerSpec(name).eight_bit:
            assert part.moments == {}
        else:
            part.moments["exp_avg_sq"][5:9] = 0.0
            assert not engine.read_trained("wide.A")["exp_avg_sq"].view(-1)[5:9].any()


@eight_bit
def test_one_slice_of_a_flat_parameter_is_written_and_the_others_keep_their_bits(name):
    """Under ZeRO several tensors share blocks. All of them are written before anything is rounded again."""
    spec, generator = OptimizerSpec(name, RATE), torch.Generator().manual_seed(2)
    flat = torch.nn.Parameter(torch.randn(5000, generator=generator))
    optimizer = spec.build([flat])
    for _ in range(2):
        flat.grad = torch.randn(5000, generator=generator)
        optimizer.step()
    before = {key: moment_of(optimizer, flat, key).clone() for key in spec.moments()}
    restore_state(optimizer, flat, spec.moments(), 7)
    moment_of(optimizer, flat, "exp_avg", 1000, 100).mul_(0.5)
    assert steps_taken(optimizer) == 7
    optimizer._pack(optimizer.param_groups[0], flat, 0, 0)
    after = {key: moment_of(optimizer, flat, key) for key in spec.moments()}
    changed = {key: (after[key] != before[key]).nonzero().flatten() for key in ("exp_avg", "exp_avg_sq")}
    assert len(changed["exp_avg"]) > 90 and len(changed["exp_avg_sq"]) == 0
    assert changed["exp_avg"].min() >= 1000 and changed["exp_avg"].max() < 1100
    torch.testing.assert_close(
        after["exp_avg"][1000:1100], before["exp_avg"][1000:1100] / 2, rtol=0.1, atol=1e-4
    )


def test_other_blocks_round_once_more_and_lose_little():
    """At another number of ranks a tensor lies elsewhere in its flat parameter."""
    spec, generator = OptimizerSpec("adamw8bit", RATE), torch.Generator().manual_seed(3)
    flat, longer = (torch.nn.Parameter(torch.randn(size, generator=generator)) for size in (5000, 5100))
    first, second = spec.build([flat]), spec.build([longer])
    flat.grad = torch.randn(5000, generator=generator) * torch.logspace(-2, 0, 5000)
    first.step()
    restore_state(second, longer, spec.moments(), 1)
    for key in spec.moments():
        moment_of(second, longer, key, 100).copy_(moment_of(first, flat, key))
    second._pack(second.param_groups[0], longer, 0, 0)
    for key in ("exp_avg", "exp_avg_sq"):
        there, here = moment_of(second, longer, key, 100), moment_of(first, flat, key)
        assert 0 < (there - here).norm() < 0.02 * here.norm()


def test_memory_of_a_trained_number():
    assert OptimizerSpec().bytes_per_element() == 12
    assert (
        OptimizerSpec("sgd").bytes_per_element() == 4
        and OptimizerSpec("sgd", momentum=0.9).bytes_per_element() == 8
    )
    assert OptimizerSpec("paged_adamw").bytes_per_element() == 12
    engine = start(OptimizerSpec("adamw8bit", RATE))
    train(engine, [0])
    (state,) = [state for p, state in engine._optimizer.state.items() if len(p) == 7]
    kept = 4 + sum(state[f"{key}{n}"].nbytes for key in ("state", "absmax") for n in (1, 2)) / 4900
    assert kept == pytest.approx(OptimizerSpec("adamw8bit").bytes_per_element(), rel=1e-3)


def test_a_missing_package_is_one_sentence(monkeypatch):
    assert all(OptimizerSpec(name).problem() is None for name in ("adamw", "sgd", *BNB))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert OptimizerSpec("adamw").problem() is None
    assert OptimizerSpec("paged_adamw").problem() == (
        "train.optimizer.name=paged_adamw needs the package bitsandbytes, which is not installed; "
        'pip install "distlora[bnb]", or set it to adamw'
    )
