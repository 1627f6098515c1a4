"""Initialisation of whole models: the same for every division of labour,
and a first step of the right size.
"""

import math

import pytest
import torch

from distlora.adapter.layer import AdapterLinear
from distlora.adapter.passes import Adapted
from distlora.data import collate, shard
from distlora.engine.local import LocalEngine
from distlora.engine.owners import assign_owners, broadcast_pair, open_ledger
from distlora.errors import UserError
from distlora.initialisation import search
from distlora.initialisation.factors import initialise, install_gradient_maps
from distlora.initialisation.probe import Probe, mean_gradients
from distlora.maths.functional import linear
from distlora.maths.generators import layer_generator
from distlora.maths.low_rank import LowRank
from distlora.methods import LayerInit, TrainsWeight, registry
from distlora.methods.lora_sb import LoRASB
from distlora.models.losses import response_loss
from distlora.models.targets import loss_of_samples, sample_weights
from distlora.training.step import accumulate
from tests.distributed.cases import solo
from tests.distributed.world import build, samples
from tests.tiny_models import tiny_model_dir

COUNT, RANK = 6, 7
ADAPTERS = [name for name, method in registry().items() if not issubclass(method, TrainsWeight)]
#: The smallest layer is 20 × 60; four swaps of three components each.
SRLORA = {"method": "srlora", "target_rank": 19}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tiny_model_dir("qwen2", tmp_path_factory.mktemp("models"))


def started(directory, dtype=torch.float32, **settings):
    engine = LocalEngine(solo(), dtype)
    return engine, build(engine, directory, **settings)


def probe_data(size=1) -> Probe:
    rows = samples(COUNT, 7)

    def batches(size):
        return (collate([rows[i] for i in part], 0) for part in shard(COUNT, 0, 1, size))

    return Probe(lambda: batches(size), lambda: batches(3), COUNT, loss_of_samples(response_loss))


def initialised(directory, seed=3, first_rate=1e-2, dtype=torch.float32, **settings):
    engine, attached = started(directory, dtype, **settings)
    report = initialise(engine, attached, seed, first_rate, probe_data())
    return engine, attached, report


@pytest.fixture(scope="module")
def searched(directory):
    """The default initialisation, with a search; not to be changed."""
    return initialised(directory)


def factors_of(engine, attached):
    return {
        f"{name}.{f}": v for name, layer in attached.layers.items() for f, v in engine.read(layer).items()
    }


def update(method, factors):
    """s·B·(R·)A in float64."""
    pair = method.delta({name: factor.double() for name, factor in factors.items()})
    return pair.left @ pair.right


def probe_loss(engine) -> float:
    """The probe's own loss, computed here once more: mean over the samples of their mean loss."""
    total = 0.0
    engine.train_mode(False)
    for batch in probe_data().batches():
        total += response_loss(engine.module, batch, sample_weights(batch))[0].item()
    engine.train_mode(True)
    return total / COUNT


# ---------------------------------------------------------------------- every method


@pytest.mark.parametrize("method", ADAPTERS)
def test_every_layer_gets_what_the_method_makes_of_it(method, directory):
    """Each layer alone, straight from the method, from the same seed: nothing is mixed up between layers."""
    settings = (
        {"init": {"eta": 1e-3}} if method == "lora_sb" else {"target_rank": 19} if method == "srlora" else {}
    )
    engine, attached, _ = initialised(directory, method=method, **settings)
    plain, of_plain = started(directory, method=method, **settings)
    gradients = mean_gradients(
        plain,
        of_plain.layers,
        dict.fromkeys(of_plain.layers, 0),
        probe_data().batches(),
        COUNT,
        loss_of_samples(response_loss),
    )
    for name, layer in attached.layers.items():
        source = {"weight": of_plain.layers[name].weight.detach(), "gradient": gradients[name], None: None}
        told = LayerInit(
            layer.shape,
            source[attached.method.source_matrix()],
            layer_generator(3, name),
            torch.float32,
            eta=1e-3,
        )
        wanted = attached.method.initialise(told).factors
        for factor, value in engine.read(layer).items():
            torch.testing.assert_close(
                value, wanted[factor], rtol=0, atol=1e-6 * float(wanted[factor].abs().max())
            )


@pytest.mark.parametrize("method", ADAPTERS)
def test_equal_seeds_give_equal_factors_and_leave_the_programs_random_numbers_alone(method, directory):
    state, settings = torch.get_rng_state(), {"target_rank": 19} if method == "srlora" else {}
    first, second = (factors_of(*initialised(directory, method=method, **settings)[:2]) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(value.isfinite().all() for value in first.values())
    if method in ("lora", "lora_xs"):
        other = factors_of(*initialised(directory, method=method, seed=4)[:2])
        drawn = [name for name in first if name.endswith(".A" if method == "lora" else ".R")]
        assert drawn and not any(torch.equal(first[name], other[name]) for name in drawn)


def test_a_probe_without_a_first_step_reports_no_size_of_one(directory):
    """`eta: null`: LoRA-GA takes directions from the gradient, and nothing is searched or scaled."""
    engine, attached, report = initialised(directory, method="lora_ga")
    assert attached.method.probe_settings().eta is None
    assert report.scalars["samples"] == COUNT and "eta" not in report.scalars and report.search == []
    assert all(isinstance(value, (int, float)) for value in report.scalars.values())
    plain, _ = started(directory, method="lora_ga")
    x = {"input_ids": torch.arange(12).reshape(2, 6)}
    with torch.no_grad():
        torch.testing.assert_close(engine.module(**x).logits, plain.module(**x).logits, rtol=0, atol=2e-4)


def test_a_method_without_layers_has_nothing_to_initialise(directory):
    engine, attached = started(directory, method="full")
    before = {name: p.detach().clone() for name, p in engine.module.named_parameters()}
    report = initialise(engine, attached, 3, 1e-2)
    assert report.scalars == {} and report.search == []
    assert all(torch.equal(before[name], p) for name, p in engine.module.named_parameters())


def test_a_method_that_fails_says_so(directory, monkeypatch):
    engine, attached = started(directory, method="lora")

    def broken(self, layer):
        raise UserError("method lora: no")

    monkeypatch.setattr(type(attached.method), "initialise", broken)
    with pytest.raises(UserError, match="method lora: no"):
        initialise(engine, attached, 3, 1e-2)


# ------------------------------------------------------------ the frozen weight, and what is kept for later


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    "settings", [{"method": "pissa"}, SRLORA, {"method": "pissa", "alpha": 20.0}], ids=str
)
def test_what_the_factors_add_is_taken_from_the_weight(settings, dtype, directory):
    engine, attached, report = initialised(directory, dtype=dtype, **settings)
    _, of_plain = started(directory, dtype, **settings)
    assert sorted(engine.ledger.entries) == sorted(attached.layers)
    for name, layer in attached.layers.items():
        before = of_plain.layers[name].weight.double()
        used = update(attached.method, {factor: value.detach() for factor, value in layer.factors().items()})
        # Each element once to the nearest: half a unit in the last place.
        missed = layer.weight.double() + used - before
        assert missed.norm() <= (1e-6 if dtype == torch.float32 else 1.001 * 2**-8) * before.norm(), name
        (entry,) = engine.ledger.entries[name]
        assert (entry.number, entry.rounding, entry.columns) == (0, "nearest", RANK)
        pair = engine.ledger.pair(name, 0)
        torch.testing.assert_close(pair.left.double() @ pair.right.double(), -used, rtol=0, atol=1e-6)
        assert used.norm() > 0.3 * before.norm()


@pytest.mark.parametrize("settings", [{"method": "pissa"}, SRLORA], ids=["pissa", "srlora"])
def test_the_networks_function_is_kept(settings, directory):
    engine, _, _ = initialised(directory, **settings)
    plain, _ = started(directory, **settings)  # its factors are zero
    batch = next(probe_data(COUNT).batches())

    @torch.no_grad()
    def logits(engine):
        engine.train_mode(False)
        return engine.module(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits

    wanted = logits(plain)
    assert (logits(engine) - wanted).norm() < 1e-5 * wanted.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_reserves_are_reported_for_every_layer(dtype, directory):
    _, attached, report = initialised(directory, dtype=dtype, **SRLORA)
    assert list(report.reserves) == list(attached.layers)
    for name, pair in report.reserves.items():
        out, inner = attached.layers[name].shape
        assert (tuple(pair.left.shape), tuple(pair.right.shape)) == ((out, 19 - RANK), (19 - RANK, inner))
        assert pair.left.dtype == pair.right.dtype == dtype and pair.left.device.type == "cpu"
    assert initialised(directory, method="pissa")[2].reserves == {}


def test_methods_that_leave_the_weight_alone_write_nothing_down(directory, searched):
    engine, attached, report = searched
    _, of_plain = started(directory)
    assert engine.ledger.describe() == {} and report.reserves == {}
    assert all(
        torch.equal(layer.weight, of_plain.layers[name].weight) for name, layer in attached.layers.items()
    )


def test_an_open_ledger_is_gone_on_with(directory):
    engine, attached = started(directory, method="pissa")
    open_ledger(engine, attached, 3)
    ledger = engine.ledger
    initialise(engine, attached, 3, 1e-2)
    assert engine.ledger is ledger and len(ledger.entries) == len(attached.layers)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_pair_arrives_in_float32_or_not_at_all(dtype):
    assert broadcast_pair(solo(), (5, 7), 0, None) is None
    sent = LowRank(torch.randn(5, 2).to(dtype), torch.randn(2, 7).to(dtype))
    found = broadcast_pair(solo(), (5, 7), 0, sent)
    assert found.left.dtype == found.right.dtype == torch.float32
    assert torch.equal(found.left, sent.left.float()) and torch.equal(found.right, sent.right.float())


# ---------------------------------------------------------------------- starting anew


@pytest.mark.parametrize("eta", ["search", 1e-3])
def test_keeping_the_function_leaves_the_scaled_factor_at_zero(eta, directory):
    engine, attached = started(directory, init={"eta": eta})
    report = initialise(engine, attached, 3, 1e-2, probe_data(), number=2, keep_function=True)
    assert report.scalars["eta"] == 0.0 and report.search == []
    stepped = factors_of(*initialised(directory, init={"eta": 1e-3})[:2])
    for name, value in factors_of(engine, attached).items():
        if name.endswith(".R"):
            assert not value.any()
        else:  # the directions are those of a step of any size
            torch.testing.assert_close(value, stepped[name], rtol=0, atol=1e-4)


def test_every_start_draws_anew(directory):
    draws = []
    for number in (0, 1, 2, 1):
        engine, attached = started(directory, method="lora")
        initialise(engine, attached, 3, 1e-2, number=number)
        draws.append(factors_of(engine, attached))
    first = next(name for name in draws[0] if name.endswith(".A"))
    assert torch.equal(draws[1][first], draws[3][first])
    assert not any(torch.equal(draws[i][first], draws[j][first]) for i, j in ((0, 1), (1, 2), (0, 2)))
    assert torch.equal(draws[0][first], factors_of(*initialised(directory, method="lora")[:2])[first])


# ---------------------------------------------------------------------- division of labour


def _layers(shapes):
    linears = {f"l{i}": torch.nn.Linear(inner, out, device="meta") for i, (out, inner) in enumerate(shapes)}
    return {name: AdapterLinear(linear, LoRASB(rank=2), name) for name, linear in linears.items()}


@pytest.mark.parametrize("seed", range(20))
def test_work_is_balanced_up_to_one_layer(seed):
    generator = torch.Generator().manual_seed(seed)
    count, world = (int(torch.randint(1, high, (1,), generator=generator)) for high in (40, 9))
    shapes = torch.randint(2, 400, (count, 2), generator=generator).tolist()
    layers = _layers(shapes)
    owners = assign_owners(layers, LoRASB(rank=2), world)
    assert list(owners) == list(layers) and set(owners.values()) <= set(range(world))
    jobs = {name: layer.out_features * layer.in_features for name, layer in layers.items()}
    work = [sum(jobs[name] for name in layers if owners[name] == rank) for rank in range(world)]
    assert max(work) <= min(work) + max(jobs.values())


def test_a_layers_draw_depends_on_seed_and_name_only():
    def draw(seed, name):
        return torch.randn(5, generator=layer_generator(seed, name)).tolist()

    wanted = draw(1, "model.layers.0.q_proj")
    draw(1, "another"), torch.randn(3, generator=layer_generator(2, "x"))
    assert draw(1, "model.layers.0.q_proj") == wanted
    others = [draw(2, "model.layers.0.q_proj"), draw(1, "model.layers.1.q_proj"), draw(11, ""), draw(1, "1")]
    assert all(other != wanted for other in others) and others[2] != others[3]


def test_layers_of_a_subset_start_as_in_the_whole_model(directory):
    """No layer's draw depends on which others are adapted."""
    whole = factors_of(*initialised(directory, method="lora")[:2])
    part = factors_of(*initialised(directory, method="lora", targets=["v_proj"])[:2])
    assert part and all(torch.equal(part[name], whole[name]) for name in part)


# ---------------------------------------------------------------------- the size of the first step


@pytest.mark.parametrize("step", ["adamw", "sgd"])
def test_a_number_and_the_schedule_are_what_they_say(step, directory):
    number = initialised(directory, init={"step": step, "eta": 2e-3}, first_rate=0.5)
    schedule = initialised(directory, init={"step": step, "eta": "schedule"}, first_rate=2e-3)
    double = initialised(directory, init={"step": step, "eta": 4e-3})
    assert number[2].scalars["eta"] == schedule[2].scalars["eta"] == 2e-3 and double[2].scalars["eta"] == 4e-3
    assert not number[2].search and not schedule[2].search
    small, same, large = (factors_of(engine, attached) for engine, attached, _ in (number, schedule, double))
    for name in small:
        assert torch.equal(small[name], same[name])
        if name.endswith(".R"):
            torch.testing.assert_close(
                2 * small[name], large[name], rtol=1e-5, atol=1e-5 * float(large[name].abs().max())
            )


def test_the_update_is_the_best_copy_of_the_first_step(directory):
    engine, attached, _ = initialised(directory, init={"eta": 1e-3})
    gradients = mean_gradients(
        engine,
        attached.layers,
        dict.fromkeys(attached.layers, 0),
        probe_data().batches(),
        COUNT,
        loss_of_samples(response_loss),
    )
    for name, layer in attached.layers.items():
        step = -1e-3 * gradients[name].double().sign()
        rest = torch.linalg.svdvals(step)[RANK:].square().sum().sqrt()
        error = torch.linalg.matrix_norm(update(attached.method, engine.read(layer)) - step)
        assert abs(float(error / rest) - 1) < 1e-3, name


@pytest.mark.parametrize(
    ("init", "dtype"),
    [({}, torch.float32), ({"step": "sgd"}, torch.float32), ({"orthonormal": False}, torch.bfloat16)],
    ids=["adamw", "sgd", "skewed-bf16"],
)
def test_the_search_finds_the_least_loss_that_it_saw(init, dtype, directory):
    engine, attached, report = initialised(directory, dtype=dtype, init={"eta": "search", **init})
    scalars, losses = report.scalars, dict(report.search)
    assert len(report.search) >= 5 and len(losses) == len(report.search), "an eta was tried twice"
    assert scalars["loss_after"] == min(losses.values()) < scalars["loss_before"] - 0.01
    assert losses[scalars["eta"]] == scalars["loss_after"]
    # What was written is what was tried, up to the rounding of the written factor.
    assert probe_loss(engine) == pytest.approx(
        scalars["loss_after"], abs=1e-5 if dtype == torch.float32 else 0.05
    )


def test_the_search_brackets_its_minimum_and_refines_it(searched):
    """Half decades upwards, ended by the upper limit or by losses that rise; then ever smaller steps around
    the best.
    """
    report = searched[2]
    exponents = [math.log10(eta * report.scalars["step_rms"]) for eta, _ in report.search]
    losses = [loss for _, loss in report.search]
    coarse = len(losses) - 2 * len(search.REFINEMENTS)
    assert exponents[:coarse] == pytest.approx([search.FROM + i / 2 for i in range(coarse)], abs=1e-6)
    assert (
        exponents[coarse - 1] > search.TO - 0.4
        or losses.index(min(losses[:coarse])) == coarse - 1 - search.PATIENCE
    )
    for turn, width in enumerate(search.REFINEMENTS):
        tried = coarse + 2 * turn
        best = exponents[losses.index(min(losses[:tried]))]
        assert exponents[tried : tried + 2] == pytest.approx([best - width, best + width], abs=1e-6)


@pytest.mark.parametrize(
    ("init", "factor"), [({}, "R"), ({"orthonormal": False}, "B")], ids=["orthonormal", "skewed"]
)
def test_the_search_scales_one_factor_of_the_start_at_eta_1(init, factor, directory):
    engine, attached, report = initialised(directory, init={"eta": "search", **init})
    unit, of_unit, _ = initialised(directory, init={"eta": 1.0, **init})
    eta, found, start = report.scalars["eta"], factors_of(engine, attached), factors_of(unit, of_unit)
    for name in start:
        wanted = start[name] * eta if name.endswith(f".{factor}") else start[name]
        assert torch.equal(found[name], wanted), name


@pytest.mark.parametrize("may_stay", [False, True])
def test_a_search_without_a_better_step_may_take_none(directory, may_stay, monkeypatch):
    engine, attached, _ = initialised(directory, init={"eta": 1e-3})
    losses = iter([1.0, *(2.0 + tried for tried in range(20))])
    monkeypatch.setattr(search, "_probe_loss", lambda *_: next(losses))
    found = search.search_eta(engine, attached.layers, "R", probe_data(), 1.0, may_stay)
    at_rest = all(not engine.read(layer)["R"].any() for layer in attached.layers.values())
    assert (found.eta == 0.0, at_rest, found.loss_after == 1.0) == (may_stay,) * 3


def test_nothing_of_the_search_stays_switched_on(searched):
    engine, attached, _ = searched
    assert all(layer.present_pass == Adapted() for layer in attached.layers.values())
    assert all(module.training for module in engine.module.modules())


def test_a_search_that_breaks_off_leaves_no_trial_behind(directory):
    engine, attached = started(directory)
    data, passes = probe_data(), []

    def loss(model, batch):
        passes.append(1)
        if len(passes) > COUNT + 5:  # past the gradients, in the middle of the search
            raise RuntimeError("broke")
        return response_loss(model, batch, sample_weights(batch))[0]

    with pytest.raises(RuntimeError, match="broke"):
        initialise(engine, attached, 3, 1e-2, Probe(data.batches, data.forward_batches, COUNT, loss))
    assert all(layer.present_pass == Adapted() for layer in attached.layers.values())


def test_the_search_does_not_depend_on_how_samples_are_grouped(directory, searched):
    report = searched[2]
    other, of_other = started(directory)
    again = initialise(other, of_other, 3, 1e-2, probe_data(size=3))
    assert again.scalars["eta"] == pytest.approx(report.scalars["eta"], rel=1e-5)
    assert again.scalars["loss_after"] == pytest.approx(report.scalars["loss_after"], rel=1e-3)


# ---------------------------------------------------------------------- the report


def test_the_report_has_numbers_worth_logging(directory, searched):
    report = searched[2]
    of_layers = {"captured_energy", "captured_energy_min", "step_rms", "step_rms_min"}
    assert report.scalars.keys() == of_layers | {"samples", "loss_before", "loss_after", "eta"}
    assert report.scalars["samples"] == COUNT
    assert all(math.isfinite(value) for value in report.scalars.values())
    engine, _ = started(directory)
    assert report.scalars["loss_before"] == pytest.approx(
        probe_loss(engine), abs=1e-5
    )  # every factor is zero


def test_reported_numbers_are_means_and_least_values_over_the_layers(directory):
    engine, attached, report = initialised(directory, init={"eta": 1.0})
    energies = []
    for layer in attached.layers.values():
        step = layer.out_features * layer.in_features  # ‖sign(g)‖²
        energies.append(
            float(torch.linalg.matrix_norm(update(attached.method, engine.read(layer))) ** 2 / step)
        )
    assert report.scalars["captured_energy"] == pytest.approx(sum(energies) / len(energies), rel=1e-4)
    assert report.scalars["captured_energy_min"] == pytest.approx(min(energies), rel=1e-4)
    assert report.scalars["step_rms"] == pytest.approx(1.0, abs=1e-3)


def test_methods_without_a_probe_report_no_step(directory):
    assert initialised(directory, method="lora")[2].scalars == {}
    assert initialised(directory, method="lora_xs")[2].scalars.keys() == {
        "captured_energy",
        "captured_energy_min",
    }


# ---------------------------------------------------------------------- corrected gradients


def gradients_of_cores(engine, attached):
    accumulate(engine, list(probe_data().batches()), response_loss)
    return {name: layer.R.grad.clone() for name, layer in attached.layers.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("alpha", [None, 21.0], ids=["s=1", "s=3"])
def test_a_resumed_run_corrects_gradients_as_the_first_one_did(alpha, dtype, directory):
    engine, attached, _ = initialised(directory, dtype=dtype, alpha=alpha, init={"eta": 1e-3})
    resumed, of_resumed = started(directory, dtype, alpha=alpha, init={"eta": 1e-3})
    for name, layer in attached.layers.items():
        resumed.write(of_resumed.layers[name], engine.read(layer))
    without = gradients_of_cores(resumed, of_resumed)
    for layer in of_resumed.layers.values():
        layer.R.grad = None
    install_gradient_maps(resumed, of_resumed)
    wanted, found = gradients_of_cores(engine, attached), gradients_of_cores(resumed, of_resumed)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    changed = [name for name in wanted if not torch.equal(without[name], wanted[name])]
    # With s = 1 and float32 factors the plain gradient is optimal already; else every layer's is corrected.
    assert len(changed) == (0 if alpha is None and dtype == torch.float32 else len(wanted))


def test_the_corrected_gradient_is_the_optimal_one(directory):
    engine, attached, _ = initialised(directory, alpha=21.0, init={"eta": 1e-3})
    corrected = gradients_of_cores(engine, attached)
    for layer in attached.layers.values():
        layer.R.grad = None
        layer.map_gradients({})
    plain = gradients_of_cores(engine, attached)
    for name, layer in attached.layers.items():
        b, a = (engine.read(layer)[factor].double() for factor in ("B", "A"))
        wanted = torch.linalg.inv(b.T @ b) @ plain[name].double() @ torch.linalg.inv(a @ a.T) / 9
        torch.testing.assert_close(
            corrected[name].double(), wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max())
        )


def test_maps_are_of_the_factors_as_the_forward_uses_them(directory):
    """In bfloat16 the Gram matrices are those of the rounded factors."""
    engine, attached, _ = initialised(directory, dtype=torch.bfloat16, init={"eta": 1e-3})
    layer = next(iter(attached.layers.values()))
    rounded = {name: factor.detach() for name, factor in layer.factors().items()}
    p, q = attached.method.gradient_map(rounded)["R"]
    accumulate(engine, list(probe_data().batches())[:1], response_loss)
    with_map = layer.R.grad.clone()
    layer.R.grad = None
    layer.map_gradients({"R": (p, q)})
    accumulate(engine, list(probe_data().batches())[:1], response_loss)
    assert torch.equal(layer.R.grad, with_map)


def test_the_layers_function_is_w_plus_the_update(searched):
    engine, attached, _ = searched
    name, layer = list(attached.layers.items())[9]
    x = torch.randn(3, layer.in_features, generator=torch.Generator().manual_seed(0))
    weight = layer.weight + update(attached.method, engine.read(layer)).float()
    torch.testing.assert_close(layer(x), linear(x, weight, layer.bias), rtol=1e-4, atol=1e-4)
