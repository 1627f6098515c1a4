"""Recomposition in a training run: what a recomposition changes, what it must not change, and that a run can
leave off anywhere.
"""

import logging
import weakref

import pytest
import torch

from distlora.adapter.passes import Adapted
from distlora.engine.optimizers import OptimizerSpec
from distlora.maths.low_rank import LowRank
from distlora.maths.moments import AGE_LIMIT
from distlora.methods.srlora import SRLoRA
from distlora.recompose import ages as ages_module
from distlora.recompose import recomposer as recompose
from distlora.recompose.ages import NEVER
from distlora.recompose.recomposer import USED_UP, Recomposer
from tests.tiny_runs import (
    BF16,
    FP32,
    PROBE_SAMPLES,
    RATE,
    SEED,
    SRLORA,
    Run,
    change,
    copies,
    equal,
    loss_sum,
    relative,
    samples,
)

GRADIENT = SRLORA | {"refill": "gradient"}
#: Windows of two steps and bounds that are always met: a recomposition whenever one is allowed.
EAGER = {"window": 2, "improvement": 0.99, "share": 1.0, "freeze_fraction": 0.2}
ADAPTIVE = SRLORA | {"schedule": "adaptive", "adaptive": EAGER}
#: Rank, ⌊γ·r⌋ and target rank of all kinds; layers are 29×23 and 17×29.
SETTINGS = {
    "plain": SRLORA,
    "one at a time": SRLORA | {"gamma": 0.25, "target_rank": 8},
    "all at once": SRLORA | {"gamma": 1.0},
    "odd": SRLORA | {"rank": 5, "target_rank": 14, "gamma": 0.7},
    "scaled": SRLORA | {"alpha": 5.0},
    "rank one": SRLORA | {"rank": 1, "gamma": 1.0, "target_rank": 4},
    "gradient": GRADIENT,
    "adaptive": ADAPTIVE,
}
every_setting = pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
BOTH = pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])


def _recompositions(run):
    """Trains, and yields at every recomposition (how far the answers moved, report)."""
    while run.done < run.total:
        run.step(decide=False)
        moved, report = change(run, run.decide)
        if report is not None and report.recomposed:
            yield moved, report


class Published:
    """Importance as the paper has it, element by element beside training: float64, from gradients and weights
    alone.
    """

    def __init__(self, run):
        self.run = run
        self.mean = {
            name: torch.zeros(shape, dtype=torch.float64)
            for name, shape in run.engine.trained_shapes().items()
        }
        self.uncertainty = {name: torch.zeros_like(value) for name, value in self.mean.items()}

    def look(self):
        masters = self.run.masters()
        for name, parameter in self.run.engine.module.named_parameters():
            if parameter.requires_grad:
                importance = (masters[name].double() * parameter.grad.double()).abs()
                self.mean[name] = 0.85 * self.mean[name] + 0.15 * importance
                self.uncertainty[name] = (
                    0.85 * self.uncertainty[name] + 0.15 * (importance - self.mean[name]).abs()
                )

    def scores(self):
        """(layers, r): S_k = mean_i s(B_ik) + mean_j s(A_kj)."""
        single = {name: self.mean[name] * self.uncertainty[name] for name in self.mean}
        rows = [
            [
                float(single[f"{name}.B"][:, k].mean() + single[f"{name}.A"][k].mean())
                for k in range(self.run.method.rank)
            ]
            for name in self.run.layers
        ]
        return torch.tensor(rows, dtype=torch.float64)


# ---------------------------------------------------------------------- the network's function


@every_setting
def test_a_recomposition_preserves_the_function(settings):
    run = Run(settings)
    counted = 0
    for moved, report in _recompositions(run):
        counted += 1
        assert moved < 1e-5, report.reason
        assert all(len(layer.components) == run.method.replaced_at_once for layer in report.layers.values())
    assert counted == (3 if settings is ADAPTIVE else run.method.most_recompositions)
    assert all(not torch.equal(value, run.first_weights[name]) for name, value in run.weights().items())


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("key", ["plain", "odd", "gradient"])
def test_in_bfloat16_up_to_the_rounding_of_the_weight(key, rounding):
    """Bound: half a unit in the last place of W (a whole one where draws decide); measured on the logits: 0.5
    %.
    """
    run = Run(SETTINGS[key] | {"rounding": rounding}, BF16)
    unit = 2.0**-8 if rounding == "nearest" else 2.0**-7
    while run.done < run.total:
        run.step(decide=False)
        before = {name: run.adapted(name) for name in run.layers}
        moved, report = change(run, run.decide)
        if report is not None and report.recomposed:
            assert 0 < moved < 0.02
            for name, layer in run.layers.items():
                assert (
                    run.adapted(name) - before[name]
                ).norm() <= 1.001 * unit * layer.weight.double().norm()


@BOTH
def test_what_is_fused_is_what_the_forward_pass_used(dtype):
    """Not the optimizer's float32 values: W moves by s·(B₁A₁ − B₁'A₁') of the cast factors, rounded once."""
    run = Run(SRLORA | {"alpha": 5.0}, dtype)
    run.to_recomposition()
    before = {
        name: (run.layers[name].weight.double(), run.used(name), run.engine.read(run.layers[name]))
        for name in run.layers
    }
    report = run.decide()
    for name, layer in run.layers.items():
        weight, old, masters = before[name]
        chosen, new = list(report.layers[name].components), run.used(name)
        product = old["B"][:, chosen] @ old["A"][chosen] - new["B"][:, chosen] @ new["A"][chosen]
        exact = weight + 1.25 * product
        assert relative(layer.weight.double(), exact) < (2**-8 if dtype == BF16 else 1e-6)
        entry = run.ledger.pair(name, 1)
        assert relative(entry.left.double() @ entry.right.double(), 1.25 * product) < 1e-6
        if dtype == BF16:
            assert (layer.weight != exact.bfloat16()).float().mean() < 0.002
            # The test could tell:
            other = (
                masters["B"].double()[:, chosen] @ masters["A"].double()[chosen]
                - new["B"][:, chosen] @ new["A"][chosen]
            )
            assert (layer.weight != (weight + 1.25 * other).to(dtype)).float().mean() > 0.02


@BOTH
def test_only_the_chosen_components_are_replaced_in_both_copies(dtype):
    run = Run(SRLORA, dtype)
    run.to_recomposition()
    before = {name: run.engine.read(layer) for name, layer in run.layers.items()}
    report = run.decide()
    for name, layer in run.layers.items():
        after, chosen = run.engine.read(layer), set(report.layers[name].components)
        assert len(chosen) == 2
        for k in range(4):
            kept = (
                torch.equal(after["B"][:, k], before[name]["B"][:, k]),
                torch.equal(after["A"][k], before[name]["A"][k]),
            )
            assert kept == ((False, False) if k in chosen else (True, True))
        for factor, value in after.items():
            assert torch.equal(getattr(layer, factor), value.to(dtype))


# ---------------------------------------------------------------------- importance and choice


@BOTH
@pytest.mark.parametrize("clip", [0.05, None])
def test_scores_are_the_papers_and_start_anew_after_a_recomposition(clip, dtype):
    run = Run(SRLORA, dtype, clip=clip)
    recompositions, paper, stale = 0, Published(run), Published(run)
    while run.done < run.total:
        _, report = run.step(look=lambda paper=paper: (paper.look(), stale.look()))
        if report is None:
            continue
        recompositions += 1
        torch.testing.assert_close(report.scores, paper.scores(), rtol=1e-4, atol=0)
        assert report.names == list(run.layers)
        for row, layer in zip(paper.scores(), report.layers.values()):
            assert layer.components == tuple(sorted(row.argsort()[:2].tolist()))
            assert layer.low_half_share == pytest.approx(
                float(row.sort().values[:2].sum() / row.sum()), rel=1e-4
            )
        if recompositions > 1:  # the test could tell
            assert not torch.allclose(report.scores, stale.scores(), rtol=1e-2, atol=0)
        paper = Published(run)
    assert recompositions == 4


# ---------------------------------------------------------------------- the optimizer's moments


@BOTH
@pytest.mark.parametrize("key", ["plain", "all at once", "odd", "gradient"])
def test_first_moments_of_the_replaced_are_zero_and_nothing_else_is_touched(key, dtype):
    run = Run(SETTINGS[key], dtype)
    counted = 0
    while run.done < run.total:
        run.step(decide=False)
        means, squares = run.moments("exp_avg"), run.moments("exp_avg_sq")
        report = run.decide()
        if report is None or not report.recomposed:
            continue
        counted += 1
        for name, layer in report.layers.items():
            chosen = list(layer.components)
            assert means[f"{name}.B"][:, chosen].all(0).any() and means[f"{name}.A"][chosen].any()
            means[f"{name}.B"][:, chosen], means[f"{name}.A"][chosen] = 0.0, 0.0
        assert equal(run.moments("exp_avg"), means) and equal(run.moments("exp_avg_sq"), squares)
    assert counted


def test_the_momentum_of_sgd_is_forgotten_too():
    run = Run(SRLORA, spec=OptimizerSpec("sgd", RATE, momentum=0.9))
    run.to_recomposition()
    before = run.moments("momentum_buffer")
    report = run.decide()
    for name, layer in report.layers.items():
        chosen = list(layer.components)
        before[f"{name}.B"][:, chosen], before[f"{name}.A"][chosen] = 0.0, 0.0
    assert equal(run.moments("momentum_buffer"), before)
    run.train()  # without second moments there is no rule to follow


LATE, SMALL_RATE, CLIP = 160, 1e-3, 0.1


@pytest.fixture(scope="module")
def late():
    """Runs right after a recomposition after step 160, to be taken up; from here on gradients are forty times
    larger, and clipped.
    """
    saved = {}

    def get(dtype=FP32, refill="spectrum"):
        settings = SRLORA | {"interval": LATE, "refill": refill}
        arguments = dict(steps=2 * LATE, spec=OptimizerSpec("adamw", SMALL_RATE), clip=CLIP)
        if (dtype, refill) not in saved:
            run = Run(settings, dtype, **arguments)
            run.loss_scale = 0.025
            assert [report.recomposed for report in run.train(LATE)[1]] == [True]
            saved[dtype, refill] = run.saved()
        return Run(settings, dtype, fresh=True, **arguments).restore(saved[dtype, refill])

    return get


def _clipped_gradients(run):
    norm = torch.nn.utils.get_total_norm(
        [p.grad.float() for p in run.engine.module.parameters() if p.grad is not None]
    )
    assert norm > 2 * CLIP, "clipping is to be active"
    factor = CLIP / norm
    return {
        name: p.grad.float() * factor for name, p in run.engine.module.named_parameters() if p.requires_grad
    }


def _young(run, tensors, old=False):
    """Values of the replaced components as one vector; old: of all the others."""
    found = []
    for name, value in tensors.items():
        layer, _, factor = name.rpartition(".")
        born = torch.tensor(run.recomposer.state()["born"].get(layer, [NEVER] * 4)) != NEVER
        mask = torch.zeros(value.shape, dtype=torch.bool)
        if layer in run.layers:
            mask |= born if factor == "B" else born[:, None]
        found.append(value[mask != old])
    return torch.cat(found)


def _updates(run, steps):
    """|update| / rate of the replaced components in each step."""
    for _ in range(steps):
        before = run.masters()
        run.step(look=lambda: _clipped_gradients(run))
        yield _young(
            run, {name: (value - before[name]).abs() / SMALL_RATE for name, value in run.masters().items()}
        )


@pytest.mark.parametrize(
    ("refill", "dtype"), [("spectrum", FP32), ("spectrum", BF16), ("gradient", FP32)], ids=str
)
def test_after_a_late_recomposition_new_components_take_no_step_above_one_and_a_half_rates(
    refill, dtype, late
):
    largest = max(float(update.max()) for update in _updates(late(dtype, refill), 42))
    assert 0.3 < largest <= 1.5


@pytest.mark.parametrize("second_moments", ["kept", "zeroed"])
def test_without_the_rule_they_do(second_moments, late, monkeypatch):
    monkeypatch.setattr(ages_module, "own_age", lambda *_: None)
    run = late()
    if second_moments == "zeroed":
        for name, layer in run.layers.items():
            born = torch.tensor(run.recomposer.state()["born"][name]) != NEVER
            parts = run.engine.parts(layer)
            parts["A"].moments["exp_avg_sq"].view(4, -1)[born] = 0.0
            parts["B"].moments["exp_avg_sq"].view(-1, 4)[:, born] = 0.0
    assert max(float(update.max()) for update in _updates(run, 42)) > 1.5


def test_second_moments_of_new_components_are_those_of_an_adam_of_their_age(late):
    """v_k/(1−β₂^k) of the clipped gradients since the recomposition is the stock optimizer's v/(1−β₂^t), up
    to the limit of age.
    """
    run, square = late(), 0.0
    for k in range(1, AGE_LIMIT + 2):
        seen = []
        run.step(look=lambda seen=seen: seen.append(_young(run, _clipped_gradients(run)).double()))
        square = 0.999 * square + 0.001 * seen[0].square()
        found = _young(run, run.moments("exp_avg_sq")).double() / (1 - 0.999 ** (LATE + k))
        wanted = square / (1 - 0.999**k)
        error = float(((found - wanted).abs() / wanted.clamp(min=1e-12)).max())
        if k <= AGE_LIMIT:
            assert error < 1e-3, f"step {k} after the recomposition"
    assert error > 3e-3, "from here on the optimizer's own correction holds"


def test_components_of_the_start_train_as_if_there_were_no_rule(monkeypatch):
    """Before the first recomposition nothing is young;
    after it the moments of the others are the optimizer's alone.
    """
    calls, rule = [], ages_module.own_age
    monkeypatch.setattr(
        ages_module, "own_age", lambda *arguments: (calls.append(arguments), rule(*arguments))
    )
    run = Run(SRLORA, clip=CLIP)
    run.train(4)
    assert calls == []
    squares, gradients = run.moments("exp_avg_sq"), {}
    run.step(look=lambda: gradients.update(_clipped_gradients(run)))
    assert len(calls) == 4
    wanted = {name: 0.999 * squares[name] + 0.001 * gradients[name].square() for name in squares}
    found = run.moments("exp_avg_sq")
    torch.testing.assert_close(
        _young(run, found, old=True), _young(run, wanted, old=True), rtol=1e-5, atol=1e-14
    )
    assert not torch.allclose(_young(run, found), _young(run, wanted), rtol=0.1, atol=0)


# ---------------------------------------------------------------------- the reserve


@pytest.mark.parametrize("key", [key for key, settings in SETTINGS.items() if settings is not GRADIENT])
def test_the_reserve_is_used_in_descending_order_and_never_twice(key):
    run = Run(SETTINGS[key])
    triplets = {
        name: torch.linalg.svd(value.double(), full_matrices=False)
        for name, value in run.first_weights.items()
    }
    at_once, used = run.method.replaced_at_once, run.method.rank
    for _, report in _recompositions(run):
        for name, layer in report.layers.items():
            u, sigma, vt = triplets[name]
            now, s = run.engine.read(run.layers[name]), run.method.scaling
            for i, component in enumerate(layer.components):
                p = used + i
                made = s * torch.outer(now["B"][:, component], now["A"][component]).double()
                torch.testing.assert_close(made, sigma[p] * torch.outer(u[:, p], vt[p]), rtol=0, atol=1e-5)
                balance = now["B"][:, component].norm() / now["A"][component].norm()
                assert float(balance) == pytest.approx(1, rel=1e-4)
            assert layer.sigma == pytest.approx(sigma[used : used + at_once].tolist(), rel=1e-4)
            assert layer.reserve_left == run.method.target_rank - used - at_once
        used += at_once
    assert run.method.rank + at_once < used <= run.method.target_rank


def _with_short_reserve(count):
    """A run whose reserve ends earlier than its schedule."""
    run = Run(SRLORA)
    short = {
        name: LowRank(pair.left[:, :count], pair.right[:count]) for name, pair in run.report.reserves.items()
    }
    run.recomposer = Recomposer(run.engine, run.attached, SEED, run.total, short)
    return run


@pytest.mark.parametrize(("count", "recompositions"), [(0, 0), (1, 0), (2, 1), (5, 2)])
def test_where_the_reserve_ends_recomposition_ends_with_a_message(count, recompositions, caplog):
    run = _with_short_reserve(count)
    with caplog.at_level(logging.INFO, "distlora"):
        _, reports = run.train()
    assert [report.recomposed for report in reports] == [True] * recompositions + [False]
    assert (
        reports[-1].step == 4 * (recompositions + 1)
        and reports[-1].reason == USED_UP
        and reports[-1].layers == {}
    )
    assert caplog.text.count("used up") == 1
    assert run.ledger.columns("first") == 4 + 4 * recompositions
    assert run.recomposer.state()["ended"] is True


def test_young_components_are_looked_after_when_the_reserve_has_ended(monkeypatch):
    run = _with_short_reserve(2)
    ages = []
    rule = ages_module.own_age
    monkeypatch.setattr(ages_module, "own_age", lambda *a: (ages.append(int(a[2].max())), rule(*a)))
    run.train()
    assert sorted(set(ages)) == list(range(1, 17))


def test_the_last_recomposition_that_the_target_rank_allows_is_said(caplog):
    run = Run(SRLORA | {"interval": 3})
    with caplog.at_level(logging.INFO, "distlora"):
        _, reports = run.train()
    assert [report.step for report in reports] == [3, 6, 9, 12, 15]
    assert (
        "all 4 recompositions that target_rank allows were made" in caplog.text and not reports[-1].recomposed
    )


def test_the_reserve_lies_on_the_host_and_its_size_is_told():
    run = Run(SRLORA, BF16)
    # Eight triplets of every layer in two bytes a number.
    assert run.recomposer.reserve_bytes() == sum(2 * 8 * sum(layer.shape) for layer in run.layers.values())
    assert {pair.left.dtype for pair in run.report.reserves.values()} == {BF16}
    assert Run(GRADIENT).recomposer.reserve_bytes() == 0


def test_components_that_are_used_leave_host_memory():
    run = Run(SRLORA, BF16)
    run.report.reserves.clear()  # the training program does not keep them either
    sides = sum(sum(layer.shape) for layer in run.layers.values())
    for left, (_, report) in zip((6, 4, 2, 0), _recompositions(run), strict=True):
        assert {layer.reserve_left for layer in report.layers.values()} == {left}
        assert run.recomposer.reserve_bytes() == 2 * left * sides
        pairs = run.recomposer._reserve._pairs.values()
        held = sum(side.untyped_storage().nbytes() for pair in pairs for side in (pair.left, pair.right))
        assert held == 2 * left * sides, "a view would keep all of it"


# ---------------------------------------------------------------------- new components of the gradient


def _gradient_at(run, name):
    """dL/dW of the probe's mean loss at the adapted weights, by autograd on the dense network."""
    weights = {n: run.adapted(n).requires_grad_() for n in run.layers}
    first, second, head = run.layers["first"], run.layers["second"], run.engine.module.head
    batch = samples(500 + len(run.probes), FP32, PROBE_SAMPLES)
    hidden = torch.tanh(
        torch.nn.functional.linear(batch["x"].double(), weights["first"], first.bias.double())
    )
    hidden = torch.tanh(torch.nn.functional.linear(hidden, weights["second"], second.bias))
    logits = torch.nn.functional.linear(hidden, head.weight.double(), head.bias.double())
    return torch.autograd.grad(torch.nn.functional.cross_entropy(logits, batch["labels"]), weights[name])[0]


@pytest.mark.parametrize("alpha", [None, 5.0])
def test_refill_from_the_gradient_takes_its_leading_directions_at_the_present_weights(alpha):
    run = Run(GRADIENT | {"alpha": alpha})
    for number in (1, 2, 3):
        run.to_recomposition()
        run.probes.append(number)
        gradients = {name: _gradient_at(run, name) for name in run.layers}
        run.probes.pop()
        before = {name: run.used(name) for name in run.layers}
        report = run.decide()
        for name, layer in report.layers.items():
            chosen, after, s = list(layer.components), run.used(name), run.method.scaling
            u, sigma, vt = torch.linalg.svd(-gradients[name])
            norms = s * before[name]["B"].norm(dim=0) * before[name]["A"].norm(dim=1)
            magnitude = float(norms[chosen].mean())
            assert layer.sigma == pytest.approx([magnitude] * 2, rel=1e-4)
            wanted = magnitude * u[:, :2] @ vt[:2]
            assert relative(s * after["B"][:, chosen] @ after["A"][chosen], wanted) < 1e-3
    assert run.probes == [1, 2, 3], "every recomposition has its own samples"


def test_gradients_of_a_refill_are_freed_one_by_one(monkeypatch):
    seen, plain = [], SRLoRA.new_components

    def look(self, layer, magnitude, count):
        assert all(gradient() is None for gradient in seen), "an earlier layer's gradient is still there"
        seen.append(weakref.ref(layer.source))
        return plain(self, layer, magnitude, count)

    monkeypatch.setattr(SRLoRA, "new_components", look)
    run = Run(GRADIENT)
    run.to_recomposition()
    run.decide()
    assert len(seen) == 2


def test_the_probe_of_a_refill_leaves_no_gradient_behind():
    run = Run(GRADIENT)
    run.to_recomposition()
    run.decide()
    assert all(p.grad is None or not p.grad.any() for p in run.engine.module.parameters())
    assert all(layer.present_pass == Adapted() for layer in run.layers.values())
    assert run.engine.module.training


# ---------------------------------------------------------------------- schedules


@BOTH
def test_without_a_schedule_srlora_is_pissa_bit_by_bit(dtype):
    plain = Run({"name": "pissa", "rank": 4}, dtype, steps=10)
    none = Run(SRLORA | {"schedule": "none"}, dtype, steps=10)
    assert not plain.recomposer.active and not none.recomposer.active
    losses, reports = plain.train()
    assert none.train() == (losses, reports) and len(losses) == 10 and reports == []
    assert equal(plain.masters(), none.masters()) and equal(plain.weights(), none.weights())
    assert equal(plain.moments("exp_avg_sq"), none.moments("exp_avg_sq"))
    recomposed = Run(SRLORA, dtype, steps=10)
    assert recomposed.train()[0] != losses, "the test could tell"


def test_recompositions_come_where_the_schedule_has_them_and_never_after_the_last_step():
    run = Run(SRLORA)
    assert [(report.step, report.reason) for report in run.train()[1]] == [
        (4 * j, f"recomposition {j} of 4") for j in (1, 2, 3, 4)
    ]
    short = Run(SRLORA, steps=5)
    assert [report.step for report in short.train()[1]] == [1, 2, 3, 4]


def test_an_adaptive_schedule_drives_real_recompositions_and_tells_why(caplog):
    run = Run(ADAPTIVE)
    with caplog.at_level(logging.INFO, "distlora"):
        _, reports = run.train()
    recompositions = [report for report in reports if report.recomposed]
    assert [report.step for report in recompositions] == [4, 8, 12]
    assert run.ledger.columns("first") == 4 + 3 * 4
    for report in recompositions:
        shares = [layer.low_half_share for layer in report.layers.values()]
        assert f"the lower half carries {sum(shares) / 2:.3g} of the importance" in report.reason
    kept = [report for report in reports if not report.recomposed]
    assert kept and all(report.layers == {} and report.scores is not None for report in kept)
    assert "frozen" in kept[-1].reason
    assert all(report.reason in caplog.text for report in reports)


def test_an_adaptive_schedule_that_finds_no_reason_replaces_nothing():
    run = Run(SRLORA | {"schedule": "adaptive", "adaptive": EAGER | {"share": 1e-9}})
    _, reports = run.train()
    assert reports and not any(report.recomposed for report in reports)
    assert "not below 1e-09" in reports[0].reason
    plain = Run({"name": "pissa", "rank": 4})
    plain.train()
    # The reserve's wider SVD ends in the same factors, so that all of training is the same.
    assert equal(run.masters(), plain.masters())


@pytest.mark.parametrize(
    "settings", [{"name": "pissa", "rank": 4}, {"name": "lora", "rank": 4}], ids=lambda s: s["name"]
)
def test_methods_that_replace_nothing_are_left_alone(settings):
    run = Run(settings)
    assert not run.recomposer.active
    assert run.train(3)[1] == []
    assert copies(run.recomposer.tensors()) == {}


# ---------------------------------------------------------------------- leaving off and going on

SB = {"name": "lora_sb", "rank": 4, "init": {"eta": 1e-3}}
RESUMED = {
    "nearest": (SRLORA, FP32),
    "stochastic": (SRLORA | {"rounding": "stochastic"}, BF16),
    "scaled": (SETTINGS["odd"] | {"alpha": 3.0}, BF16),
    "gradient": (GRADIENT, BF16),
    "adaptive": (ADAPTIVE, FP32),
    "restart": (SB | {"recompose": {"times": 4}}, BF16),
    "restart at zero": (SB | {"recompose": {"times": 4, "start": "zero", "rounding": "stochastic"}}, FP32),
}
#: In between, right before a recomposition, right after one, after the last.
POINTS = (3, 4, 10, 17)


@pytest.mark.parametrize(("settings", "dtype"), RESUMED.values(), ids=RESUMED)
def test_a_run_goes_on_bit_by_bit_from_anywhere(settings, dtype):
    run = Run(settings, dtype)
    saved, losses, reports = {}, [], []
    for _ in range(run.total):
        loss, report = run.step()
        losses.append(loss)
        reports += [report] if report else []
        if run.done in POINTS:
            saved[run.done] = run.saved()
    assert sum(report.recomposed for report in reports) >= 3
    for point, kept in saved.items():
        other = Run(settings, dtype, fresh=True).restore(kept)
        found, told = other.train()
        assert found == losses[point:], f"from step {point}"
        assert [report.record() for report in told] == [
            report.record() for report in reports if report.step > point
        ]
        for late, early in zip(reversed(told), reversed(reports)):
            assert early.scores is None or torch.equal(late.scores, early.scores)
        assert equal(other.weights(), run.weights()) and equal(other.masters(), run.masters())
        assert equal(other.moments("exp_avg_sq"), run.moments("exp_avg_sq"))
        assert other.recomposer.state() == run.recomposer.state()
        assert other.ledger.describe() == run.ledger.describe()
        assert equal(copies(other.ledger.tensors()), copies(run.ledger.tensors()))
        assert equal(copies(other.recomposer.tensors()), copies(run.recomposer.tensors()))


def test_a_run_whose_reserve_has_ended_goes_on_bit_by_bit():
    """Nothing is replaced any more, and components that are young still get their due."""
    run = _with_short_reserve(2)
    run.train(9)
    other = Run(SRLORA, fresh=True).restore(run.saved())
    assert run.train() == other.train() and equal(other.masters(), run.masters())


def test_what_is_saved_of_the_recomposer():
    run = Run(SRLORA, BF16)
    run.train(9)
    tensors = copies(run.recomposer.tensors())
    scores = {
        f"{name}/{factor}/{key}" for name in run.layers for factor in "AB" for key in ("mean", "uncertainty")
    }
    assert set(tensors) == scores | {
        f"{name}/reserve/{side}" for name in run.layers for side in ("left", "right")
    }
    assert tensors["first/B/mean"].shape == (29, 4) and tensors["first/A/mean"].any()
    assert tensors["first/reserve/left"].shape == (29, 4) and tensors["first/reserve/right"].dtype == BF16
    state = run.recomposer.state()
    assert state["swaps"] == 2 and state["reserves"] == {"first": 4, "second": 4} and state["ended"] is False
    assert state["born"].keys() == state["origin"].keys() == set(run.layers)
    run.train()
    assert copies(run.recomposer.tensors()) == {}, (
        "the reserve is used up, and no recomposition is left to be scored for"
    )


# ---------------------------------------------------------------------- what is told of a recomposition


@pytest.mark.parametrize("refill", ["spectrum", "gradient"])
@pytest.mark.parametrize("alpha", [None, 5.0])
def test_losses_and_sizes_are_those_of_dense_matrices(alpha, refill):
    run = Run(SRLORA | {"alpha": alpha, "refill": refill}, BF16)
    s = run.method.scaling
    begun = {name: run.used(name) for name in run.layers}  # of every component, as it was put in place
    for _ in range(4):
        run.to_recomposition()
        before, weights = {name: run.used(name) for name in run.layers}, run.weights()
        report = run.decide()
        for name, layer in report.layers.items():
            chosen, old, new = list(layer.components), before[name], run.used(name)
            added = s * (old["B"][:, chosen] @ old["A"][chosen] - new["B"][:, chosen] @ new["A"][chosen])
            start = begun[name]
            learned = s * (
                old["B"][:, chosen] @ old["A"][chosen] - start["B"][:, chosen] @ start["A"][chosen]
            )
            error = (weights[name].double() + added - run.layers[name].weight.double()).norm()
            assert layer.update_norm == pytest.approx(float(added.norm()), rel=1e-4)
            assert layer.rounding_loss == pytest.approx(float(error / added.norm()), rel=1e-3)
            assert layer.learned_norm == pytest.approx(float(learned.norm()), rel=1e-3)
            assert layer.rounding_loss_of_learned == pytest.approx(float(error / learned.norm()), rel=1e-3)
            assert layer.rounding_loss_of_learned > 2 * layer.rounding_loss
            total = s * new["B"] @ new["A"] + sum(
                pair.left.double() @ pair.right.double() for pair in run.ledger.pairs(name)
            )
            sigma = torch.linalg.svdvals(total)
            assert layer.delta_norm == pytest.approx(float(sigma.norm()), rel=1e-3)
            share = sigma / sigma.sum()
            assert layer.effective_rank == pytest.approx(
                float(torch.special.entr(share).sum().exp()), rel=2e-2
            )
            for factor, columns in (("B", (slice(None), chosen)), ("A", chosen)):
                start[factor][columns] = new[factor][columns]


def test_numbers_are_computed_after_the_recomposition_and_a_failure_is_everyones(monkeypatch):
    """On several ranks each layer's owner computes them, and the others would wait for one that fails."""
    agreed = []

    def measure(*_):
        raise RuntimeError("no convergence")

    run = Run(SRLORA)
    monkeypatch.setattr(recompose, "measure", measure)
    monkeypatch.setattr(run.engine.comm, "agree", agreed.append)
    monkeypatch.setattr(recompose, "complete", lambda *_: None)
    run.to_recomposition()
    moved, report = change(run, run.decide)
    assert [str(error) for error in agreed] == ["no convergence"]
    assert moved < 1e-5 and [len(entries) for entries in run.ledger.entries.values()] == [2, 2]
    assert report.scalars["seconds"] > 0


def test_the_loss_is_of_real_batches():
    """The oracle above stands on the same loss as training."""
    batch = samples(0, FP32)
    run = Run(SRLORA)
    assert loss_sum(run.engine.module, batch)[0].item() / len(batch["labels"]) == pytest.approx(
        run.backward(), rel=1e-5
    )
