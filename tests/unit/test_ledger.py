"""The ledger: W is a function of W0 and what was written down, byte for byte;
and exactly that, in float32.
"""

import pytest
import torch

from distlora.engine.ledger import Entry
from distlora.maths.low_rank import LowRank
from distlora.maths.rounding import rounding_key
from tests.tiny_runs import BF16, FP32, SEED, SRLORA, Run, copies, equal, relative, through_json

ROUNDINGS = pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
#: A scaling that is no power of two: the products of the ledger are no bfloat16 numbers.
SETTINGS = {
    "plain": SRLORA,
    "scaled": SRLORA | {"alpha": 5.0},
    "one at a time": SRLORA | {"gamma": 0.25, "target_rank": 8},
}
every_setting = pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)


@pytest.fixture(scope="module")
def trained():
    """Finished runs by their arguments; not to be changed."""
    runs = {}

    def get(settings, dtype=BF16, **more):
        key = str((settings, dtype, more))
        if key not in runs:
            runs[key] = Run(settings | more, dtype)
            reports = runs[key].train()[1]
            assert [report.recomposed for report in reports] == [True] * 4
        return runs[key]

    return get


def _replayed(run, described=None):
    """A model that holds W0, and a ledger that was replayed into it."""
    other = Run(run.method.model_dump(), run.engine.dtype, fresh=True)
    tensors = copies(run.ledger.tensors())
    other.ledger.replay(
        other.engine, other.layers, described or through_json(run.ledger.describe()), tensors.__getitem__
    )
    return other


def _summed(run, name):
    """Σ left @ right over all entries, float64."""
    return sum(pair.left.double() @ pair.right.double() for pair in run.ledger.pairs(name))


# ---------------------------------------------------------------------- the live weight


@every_setting
@ROUNDINGS
def test_after_four_recompositions_a_replay_gives_every_byte(rounding, settings, trained):
    run = trained(settings, rounding=rounding)
    assert [len(entries) for entries in run.ledger.entries.values()] == [
        5,
        5,
    ]  # PiSSA's own, and four recompositions
    other = _replayed(run)
    assert equal(other.weights(), run.weights())
    assert not any(torch.equal(value, run.first_weights[name]) for name, value in run.weights().items())


@ROUNDINGS
def test_a_replayed_ledger_can_be_saved_and_replayed_again(rounding, trained):
    run = trained(SRLORA, rounding=rounding)
    other = _replayed(run)
    assert other.ledger.describe() == run.ledger.describe()
    assert equal(copies(other.ledger.tensors()), copies(run.ledger.tensors()))
    assert equal(_replayed(other).weights(), run.weights())


@ROUNDINGS
@pytest.mark.parametrize("order", [(0, 2, 1, 3, 4), (4, 3, 2, 1, 0), (1, 2, 3, 4, 0)], ids=str)
def test_in_another_order_it_gives_another_weight(order, rounding, trained):
    """So that the test above can tell whether the order is kept."""
    run = trained(SRLORA, rounding=rounding)
    for name, layer in run.layers.items():
        other = Run(run.method.model_dump(), BF16, fresh=True)
        for index in order:
            entry, pair = run.ledger.entries[name][index], run.ledger.pair(name, index)
            key = rounding_key(SEED, name, entry.number)
            other.engine.add_low_rank(other.layers[name], pair, entry.rounding, key)
        assert (other.layers[name].weight != layer.weight).float().mean() > 0.05


def test_summed_up_first_it_gives_another_weight(trained):
    run = trained(SRLORA, rounding="nearest")
    for name, weight in run.weights().items():
        once = (run.first_weights[name].double() + _summed(run, name)).bfloat16()
        assert (once != weight).float().mean() > 0.2


def test_stochastic_rounding_is_keyed_by_seed_layer_and_number(trained):
    run = trained(SRLORA, rounding="stochastic")
    described = through_json(run.ledger.describe())
    for entry in described["second"]:
        entry["number"] += 1
    other = _replayed(run, described)
    # The initialisation is rounded to the nearest, and draws nothing.
    assert torch.equal(other.layers["first"].weight, run.layers["first"].weight)
    assert not torch.equal(other.layers["second"].weight, run.layers["second"].weight)


# ---------------------------------------------------------------------- the exact sum


@every_setting
def test_in_float32_w0_and_the_ledger_are_the_engines_weight(settings, trained):
    run = trained(settings, FP32)
    for name, weight in run.weights().items():
        assert relative(run.first_weights[name].double() + _summed(run, name), weight.double()) < 1e-6


@every_setting
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
def test_stacked_is_the_exact_update_of_w0(dtype, settings, trained):
    run = trained(settings, dtype)
    for name in run.layers:
        used = {factor: value.float() for factor, value in run.used(name).items()}
        stacked = run.ledger.stacked(name, run.method.delta(used))
        columns = run.method.rank + run.ledger.columns(name)
        assert columns == 2 * (run.method.rank + 4 * run.method.replaced_at_once)
        assert (stacked.left.shape[1], stacked.right.shape[0]) == (columns, columns)
        assert stacked.left.dtype == stacked.right.dtype == FP32
        exact = run.first_weights[name].double() + stacked.left.double() @ stacked.right.double()
        # In bfloat16 the live weight has been rounded five times, each to 2⁻⁸ of it at most.
        assert relative(exact, run.adapted(name)) < (1e-5 if dtype == FP32 else 5 * 2**-8)


def test_in_bfloat16_the_ledger_is_exact_where_the_live_weight_is_not(trained):
    """The numbers that the arithmetic used: the float32 sum of the entries explains every rounded weight to
    the last place.
    """
    run = trained(SRLORA, rounding="nearest")
    for name in run.layers:
        weight = run.first_weights[name]
        for pair in run.ledger.pairs(name):
            exact = weight.double() + pair.left.double() @ pair.right.double()
            weight = exact.bfloat16()
        assert (
            weight != run.layers[name].weight
        ).float().mean() < 0.002  # ties that float32 sums decide otherwise


# ---------------------------------------------------------------------- entries


@pytest.mark.parametrize(
    ("dtype", "alpha", "kept"), [(BF16, None, BF16), (BF16, 5.0, FP32), (FP32, None, FP32), (BF16, 8.0, BF16)]
)
def test_numbers_are_kept_in_the_lowest_dtype_that_holds_them(dtype, alpha, kept):
    run = Run(SRLORA | {"alpha": alpha}, dtype)
    run.train(5)
    for name, layer in run.layers.items():
        assert [entry.dtype for entry in run.ledger.entries[name]] == [str(kept).removeprefix("torch.")] * 2
        assert run.ledger.pair(name, 1).left.dtype == run.ledger.pair(name, 1).right.dtype == kept
        pair = run.ledger.pair(name, 1)
        assert (tuple(pair.left.shape), tuple(pair.right.shape)) == (
            (layer.out_features, 4),
            (4, layer.in_features),
        )


def test_entries_say_what_they_are(trained):
    run = trained(SRLORA, rounding="stochastic")
    wanted = [
        Entry(0, "nearest", 4, "bfloat16"),
        *(Entry(number, "stochastic", 4, "bfloat16") for number in (1, 2, 3, 4)),
    ]
    assert run.ledger.entries == {"first": wanted, "second": wanted}
    assert run.ledger.columns("first") == 20
    assert list(copies(run.ledger.tensors()))[:3] == ["first/0/left", "first/0/right", "first/1/left"]


def test_what_is_written_down_does_not_follow_the_caller():
    run = Run(SRLORA, fresh=True)
    layer = run.layers["first"]
    update = LowRank(torch.ones(layer.out_features, 2), torch.ones(2, layer.in_features))
    run.ledger.apply(run.engine, layer, 1, "nearest", update)
    update.left.zero_()
    assert run.ledger.pair("first", 0).left.all()


def test_apply_adds_and_answers_with_the_rounding_error():
    run = Run(SRLORA, BF16, fresh=True)
    layer, generator = run.layers["second"], torch.Generator().manual_seed(0)
    left = torch.randn(layer.out_features, 3, generator=generator)
    update = LowRank(left, torch.randn(3, layer.in_features, generator=generator))
    exact = layer.weight.double() + update.left.double() @ update.right.double()
    error = run.ledger.apply(run.engine, layer, 1, "nearest", update)
    assert (
        error == pytest.approx(float((exact - layer.weight.double()).square().sum()), rel=1e-3) and error > 0
    )
    assert relative(layer.weight.double(), exact) < 2**-8


def test_an_empty_ledger_has_nothing():
    run = Run(SRLORA, fresh=True)
    assert run.ledger.describe() == {} and list(run.ledger.tensors()) == []
    assert run.ledger.columns("first") == 0 and list(run.ledger.pairs("first")) == []
    pair = LowRank(torch.ones(29, 2), torch.ones(2, 23))
    stacked = run.ledger.stacked("first", pair)
    assert torch.equal(stacked.left, pair.left) and torch.equal(stacked.right, pair.right)
