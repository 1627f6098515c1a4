"""SRLoRA: PiSSA whose components are replaced; arXiv 2505.12433, and what goes beyond it."""

import pydantic
import pytest
import torch

from distlora.maths.importance import ElementScores
from distlora.maths.low_rank import LowRank
from distlora.maths.recomposition_schedule import AdaptiveSchedule, FixedSchedule, fixed_steps
from distlora.methods import LayerInit, probe_of, recomposing
from distlora.methods.pissa import PiSSA
from distlora.methods.srlora import AdaptiveSettings, SRLoRA
from distlora.recipe.combination import problem_with_decay

OUT, IN, RANK, TARGET = 60, 131, 6, 21
SHAPES = [(OUT, IN), (IN, OUT)]
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
every_alpha = pytest.mark.parametrize("alpha", [None, 15.0])
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def _method(**fields):
    return SRLoRA(**{"rank": RANK, "target_rank": TARGET, **fields})


def _weight(shape=(OUT, IN), seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) / shape[1] ** 0.5


def _layer(source, dtype=torch.float32):
    return LayerInit(tuple(source.shape), source, torch.Generator().manual_seed(0), dtype)


def _product(pair):
    return pair.left.double() @ pair.right.double()


def _used(factors, dtype):
    """What the forward pass reads, in float32."""
    return {name: value.to(dtype).float() for name, value in factors.items()}


# ---------------------------------------------------------------------- the recipe section


def test_defaults():
    method = SRLoRA()
    assert (method.rank, method.directions, method.gamma, method.scaling) == (8, 32, 0.5, 1.0)
    assert SRLoRA(rank=96).directions == 384 and SRLoRA(rank=2, target_rank=None).directions == 8
    assert (method.schedule, method.refill, method.rounding, method.interval) == (
        "fixed",
        "spectrum",
        "nearest",
        None,
    )
    assert (method.replaced_at_once, method.most_recompositions) == (4, 6)


@pytest.mark.parametrize(
    ("rank", "gamma", "target_rank", "at_once", "recompositions"),
    [
        (8, 0.5, 32, 4, 6),
        (8, 0.5, 12, 4, 1),
        (8, 0.5, 15, 4, 1),
        (8, 1.0, 64, 8, 7),
        (7, 0.5, 32, 3, 8),
        (5, 0.2, 9, 1, 4),
    ],
)
def test_sizes_follow_from_gamma_and_target_rank(rank, gamma, target_rank, at_once, recompositions):
    method = SRLoRA(rank=rank, gamma=gamma, target_rank=target_rank)
    assert (method.replaced_at_once, method.most_recompositions) == (at_once, recompositions)


def test_gamma_times_rank_is_not_lost_to_rounding():
    """0.29 · 100 is 28.999999999999996 in floating point."""
    assert SRLoRA(rank=100, gamma=0.29, target_rank=200).replaced_at_once == 29


@pytest.mark.parametrize("gamma", [0.0, -0.5, 1.01])
def test_gamma_out_of_range_is_refused(gamma):
    with pytest.raises(pydantic.ValidationError, match="gamma"):
        SRLoRA(gamma=gamma)


def test_a_gamma_of_no_component_is_refused_with_one_that_works():
    with pytest.raises(
        pydantic.ValidationError, match="gamma=0.1 of rank 8 is no component: set it to at least 0.125"
    ):
        SRLoRA(rank=8, gamma=0.1)
    assert SRLoRA(rank=8, gamma=0.125).replaced_at_once == 1
    for rank in range(1, 200):  # what the sentence says works for every rank
        with pytest.raises(pydantic.ValidationError) as error:
            SRLoRA(rank=rank, gamma=0.5 / rank, target_rank=999)
        said = float(str(error.value).split("at least ")[1].split()[0])
        assert SRLoRA(rank=rank, gamma=said, target_rank=999).replaced_at_once == 1


def test_a_target_rank_without_room_is_refused_with_one_that_works():
    with pytest.raises(
        pydantic.ValidationError, match="target_rank=11 leaves nothing to replace with: set it to at least 12"
    ):
        SRLoRA(rank=8, target_rank=11)
    assert SRLoRA(rank=8, target_rank=12).most_recompositions == 1


def test_without_a_schedule_the_other_sizes_do_not_matter():
    method = SRLoRA(rank=64, gamma=0.001, schedule="none")
    assert method.most_recompositions == 0 and method.problem_with(64, 64) is None
    assert recomposing(method) is None


@pytest.mark.parametrize(
    "wrong",
    [{"window": 0}, {"share": 0}, {"freeze_fraction": 1.0}, {"improvement": -1}, {"windw": 3}],
    ids=str,
)
def test_wrong_adaptive_settings_are_refused(wrong):
    with pytest.raises(pydantic.ValidationError):
        SRLoRA(adaptive=wrong)


def test_a_first_step_for_the_refill_is_refused():
    assert SRLoRA(probe={"samples": 8}).probe.samples == 8
    with pytest.raises(pydantic.ValidationError, match="eta"):
        SRLoRA(probe={"eta": "search"})


# ---------------------------------------------------------------------- problems with layers and runs


def test_a_reserve_larger_than_the_layer_is_refused():
    assert _method(target_rank=60).problem_with(OUT, IN) is None
    for shape in SHAPES:
        assert (
            _method(target_rank=61).problem_with(*shape)
            == "target_rank 61 is above min(out, in) = 60; lower method.target_rank"
        )
    assert "rank 61 is above" in _method(rank=61, target_rank=99).problem_with(OUT, IN)


def test_an_open_target_rank_is_what_the_smallest_layer_has():
    shapes = [(300, 400), (192, 300), (400, 300)]
    assert SRLoRA(rank=96).fitted(shapes).target_rank == 192
    assert SRLoRA(rank=96).fitted(shapes).most_recompositions == 2
    assert SRLoRA(rank=8).fitted(shapes).target_rank == 32, "no more than four times the rank"
    assert SRLoRA(rank=8, target_rank=40).fitted(shapes).target_rank == 40, "what the recipe says stays"
    assert SRLoRA(rank=96, refill="gradient").fitted(shapes).target_rank == 384, (
        "W's spectrum bounds only what is taken from it"
    )
    assert all(SRLoRA(rank=96).fitted(shapes).problem_with(*shape) is None for shape in shapes)


@pytest.mark.parametrize(("rank", "unused"), [(192, 0), (130, 62)])
def test_a_layer_without_unused_directions_is_refused(rank, unused):
    problem = SRLoRA(rank=rank).fitted([(192, 300)]).problem_with(192, 300)
    assert f"rank {rank} leaves {unused} of min(out, in) = 192" in problem and problem.endswith(
        "lower method.rank"
    )
    assert SRLoRA(rank=128).fitted([(192, 300)]).problem_with(192, 300) is None, (
        "64 are left, and 64 replaced"
    )


def test_the_length_of_a_run_is_held_against_a_fitted_target_rank():
    method = SRLoRA(rank=96)
    assert method.problem_with_length(3) is None, "how many replacements there are is not known yet"
    assert method.fitted([(192, 300)]).problem_with_length(3) is None
    assert "asks for 2 replacements" in method.fitted([(192, 300)]).problem_with_length(2)


def test_components_from_gradients_need_no_reserve_and_so_no_room():
    method = _method(refill="gradient", target_rank=99)
    assert method.problem_with(OUT, IN) is None
    assert "rank 61" in _method(refill="gradient", rank=61, target_rank=99).problem_with(OUT, IN)


def test_weight_decay_is_refused_under_its_own_name():
    problem = problem_with_decay(_method(), 0.1)
    assert problem.startswith("train.weight_decay=0.1 decays pretrained directions under srlora")
    assert problem_with_decay(_method(decay_pretrained=True), 0.1) is None


#: A recipe key, and methods of which one value of it is the largest for a run of 20 steps, and the next one
#: too large.
LIMITS = [
    ("interval", 19, {}),
    ("interval", 17, {"schedule": "adaptive", "adaptive": {"window": 2}}),
    ("target_rank", 6 + 3 * 20 - 1, {}),
    ("adaptive.window", 8, {"schedule": "adaptive"}),
    ("adaptive.window", 9, {"schedule": "adaptive", "adaptive": {"freeze_fraction": 0.0}}),
]


@pytest.mark.parametrize(("key", "largest", "fields"), LIMITS, ids=str)
def test_what_does_not_fit_into_the_run_is_refused_with_the_largest_value_that_does(key, largest, fields):
    def method(value):
        *section, name = key.split(".")
        inner = {section[0]: {**fields.get(section[0], {}), name: value}} if section else {name: value}
        return _method(**{**fields, **inner})

    assert method(largest).problem_with_length(20) is None
    problem = method(largest + 1).problem_with_length(20)
    assert problem.startswith(f"method.{key}={largest + 1} ") and f"set it to at most {largest}," in problem
    assert "20 steps" in problem or "of 20" in problem


@pytest.mark.parametrize(("schedule", "steps"), [("fixed", 1), ("adaptive", 2)])
def test_a_run_too_short_for_any_recomposition_is_refused(schedule, steps):
    problem = _method(schedule=schedule, target_rank=9, adaptive={"window": 1}).problem_with_length
    assert problem(steps).startswith(f"method.schedule={schedule} has no room in a run of {steps} steps")
    assert problem(steps + 1) is None


@pytest.mark.parametrize("fields", [{"interval": 7}, {}, {"schedule": "adaptive"}], ids=str)
def test_what_is_accepted_can_really_recompose(fields):
    method = _method(**fields)
    shortest = next(steps for steps in range(1, 200) if method.problem_with_length(steps) is None)
    schedule = method.recomposition_schedule(shortest)
    decisions = [schedule.after_step(done, 1.0, lambda: 0.0) for done in range(1, shortest + 1)]
    assert any(decision and decision.recompose for decision in decisions)


# ---------------------------------------------------------------------- schedules


def test_a_fixed_schedule_uses_up_the_target_rank():
    schedule = _method().recomposition_schedule(100)
    assert isinstance(schedule, FixedSchedule)
    assert schedule.steps == fixed_steps(100, 5) and schedule.most == 5


def test_an_interval_in_steps_is_bounded_by_the_target_rank():
    schedule = _method(interval=10).recomposition_schedule(100)
    assert schedule.steps == tuple(range(10, 100, 10)) and schedule.most == 5


def test_an_adaptive_schedule_gets_the_recipe_s_settings():
    settings = AdaptiveSettings(window=4, improvement=0.02, share=0.3, freeze_fraction=0.2)
    schedule = _method(schedule="adaptive", adaptive=settings, interval=30).recomposition_schedule(100)
    assert isinstance(schedule, AdaptiveSchedule)
    assert (schedule.total, schedule.most, schedule.window) == (100, 5, 4)
    assert (schedule.improvement, schedule.share, schedule.freeze_from) == (0.02, 0.3, 80)
    assert schedule.state()["interval"] == 30


def test_without_a_schedule_nothing_is_followed():
    assert recomposing(_method(schedule="none")) is None
    assert recomposing(_method()).element_scores() == ElementScores(0.85, 0.85)


def test_where_new_components_come_from():
    assert _method().refill_from() == "reserve" and _method().refill_probe() is None
    method = _method(refill="gradient", probe={"samples": 8})
    assert method.refill_from() == "gradient" and method.refill_probe().samples == 8
    assert probe_of(method) is None and method.source_matrix() == "weight", "it starts from W all the same"


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_the_recipe_decides_the_rounding(rounding):
    assert _method(rounding=rounding).update_rounding() == rounding


# ---------------------------------------------------------------------- initialisation


@every_shape
@every_alpha
@every_dtype
@pytest.mark.parametrize("fields", [{"schedule": "none"}, {}, {"refill": "gradient"}], ids=str)
def test_it_starts_as_pissa_bit_by_bit(shape, alpha, dtype, fields):
    weight = _weight(shape)
    mine = _method(alpha=alpha, **fields).initialise(_layer(weight, dtype))
    theirs = PiSSA(rank=RANK, alpha=alpha).initialise(_layer(weight, dtype))
    assert all(torch.equal(mine.factors[name], theirs.factors[name]) for name in ("A", "B"))
    assert torch.equal(mine.base_update.left, theirs.base_update.left)
    assert torch.equal(mine.base_update.right, theirs.base_update.right)
    assert mine.report == theirs.report
    assert (mine.reserve is None) == bool(fields)


def test_without_a_schedule_only_r_triplets_are_computed(monkeypatch):
    """Where the SVD is iterated, its width changes the bits: PiSSA's bits need PiSSA's width."""
    monkeypatch.setattr("distlora.maths.linalg.EXACT_SIDE", 0)
    weight = _weight((150, 131))
    mine = _method(schedule="none").initialise(_layer(weight))
    theirs = PiSSA(rank=RANK).initialise(_layer(weight))
    assert all(torch.equal(mine.factors[name], theirs.factors[name]) for name in ("A", "B"))


@every_shape
@every_alpha
@every_dtype
def test_the_reserve_holds_the_next_triplets_in_descending_order(shape, alpha, dtype):
    weight = _weight(shape)
    method = _method(alpha=alpha)
    reserve = method.initialise(_layer(weight, dtype)).reserve
    u, s, vt = torch.linalg.svd(weight.double(), full_matrices=False)
    # In float32, neighbouring singular directions mix by the rounding error over the gap of their values.
    tolerance = 5e-4 if dtype == torch.float32 else 2e-2
    assert reserve.left.shape == (shape[0], TARGET - RANK) and reserve.right.shape == (
        TARGET - RANK,
        shape[1],
    )
    for i, k in enumerate(range(RANK, TARGET)):
        component = method.scaling * torch.outer(reserve.left[:, i].double(), reserve.right[i].double())
        exact = s[k] * torch.outer(u[:, k], vt[k])
        assert (component - exact).norm() < tolerance * s[k]
        assert float(reserve.left[:, i].double().norm()) == pytest.approx(
            float(reserve.right[i].double().norm()), rel=tolerance
        )


@every_dtype
def test_the_reserve_is_cast_contiguous_and_no_view_of_the_factors(dtype):
    init = _method().initialise(_layer(_weight(), dtype))
    for side, count in ((init.reserve.left, OUT), (init.reserve.right, IN)):
        assert side.dtype == dtype and side.device.type == "cpu" and side.is_contiguous()
        assert side.untyped_storage().nbytes() == count * (TARGET - RANK) * side.element_size()


# ---------------------------------------------------------------------- choosing


@pytest.mark.parametrize(
    ("scores", "chosen"),
    [
        ([5.0, 1.0, 4.0, 2.0, 6.0, 3.0], (1, 3, 5)),
        ([1.0, 1.0, 1.0, 1.0, 1.0, 1.0], (0, 1, 2)),
        ([2.0, 1.0, 2.0, 2.0, 0.0, 2.0], (0, 1, 4)),
    ],
)
def test_the_lowest_scores_are_chosen_ties_by_number(scores, chosen):
    assert _method().choose(torch.tensor(scores, dtype=torch.float64)) == chosen


@pytest.mark.parametrize(("gamma", "count"), [(1.0, 6), (0.2, 1), (0.34, 2)])
def test_gamma_decides_how_many_are_chosen(gamma, count):
    scores = torch.tensor([5.0, 1.0, 4.0, 2.0, 6.0, 3.0])
    chosen = _method(gamma=gamma).choose(scores)
    assert len(chosen) == count and list(chosen) == sorted(chosen)
    assert set(chosen) == set(scores.argsort()[:count].tolist())
    assert all(isinstance(number, int) for number in chosen)


# ---------------------------------------------------------------------- replacing


def _trained(method, weight, dtype, seed=5):
    """Initial factors after some training: masters with digits that the low precision does not have."""
    init = method.initialise(_layer(weight, dtype))
    generator = torch.Generator().manual_seed(seed)
    factors = {
        name: value + 0.05 * torch.randn(value.shape, generator=generator)
        for name, value in init.factors.items()
    }
    return init, factors


def _fresh(init, count, first=0):
    return LowRank(init.reserve.left[:, first : first + count], init.reserve.right[first : first + count])


@every_shape
@every_alpha
@every_dtype
@pytest.mark.parametrize("replaced", [(0, 2, 5), (3,), (0, 1, 2, 3, 4, 5)], ids=str)
def test_a_recomposition_preserves_the_adapted_weight(shape, alpha, dtype, replaced):
    """W + s·B·A is the same before and after, to float32, with the factors as the forward pass uses them."""
    method = _method(alpha=alpha)
    init, factors = _trained(method, _weight(shape), dtype)
    used = _used(factors, dtype)
    answer = method.fuse(factors, used, replaced, _fresh(init, len(replaced)))
    before = _product(method.delta(used))
    after = _product(method.delta(_used(answer.factors, dtype))) + _product(answer.base_update)
    assert (after - before).abs().max() < 1e-6 * before.abs().max()
    assert _product(answer.base_update).norm() > 0.01 * before.norm()
    assert answer.base_update.left.dtype == answer.base_update.right.dtype == torch.float32


@every_alpha
@every_dtype
def test_a_recomposition_fuses_what_the_forward_pass_used_and_takes_out_the_new(alpha, dtype):
    """W ← W + s·(B₁A₁ − B₁'A₁'), component by component, in the order of `replaced`."""
    method, replaced = _method(alpha=alpha), (1, 4)
    init, factors = _trained(method, _weight(), dtype)
    used, new = _used(factors, dtype), _fresh(init, 2, first=3)
    answer = method.fuse(factors, used, replaced, new)
    columns = [
        *(method.scaling * used["B"][:, k] for k in replaced),
        *(-method.scaling * new.left[:, i].float() for i in (0, 1)),
    ]
    assert torch.equal(answer.base_update.left, torch.stack(columns, 1))
    assert torch.equal(
        answer.base_update.right, torch.stack([*(used["A"][k] for k in replaced), *new.right.float()])
    )
    assert answer.replaced == replaced


@every_dtype
def test_a_recomposition_touches_the_replaced_components_alone(dtype):
    method, replaced = _method(), (1, 4)
    init, factors = _trained(method, _weight(), dtype)
    before = {name: value.clone() for name, value in factors.items()}
    new = _fresh(init, 2)
    answer = method.fuse(factors, _used(factors, dtype), replaced, new)
    assert all(torch.equal(factors[name], before[name]) for name in factors)  # the arguments stay
    assert all(value.dtype == torch.float32 for value in answer.factors.values())
    kept = [0, 2, 3, 5]
    assert torch.equal(answer.factors["B"][:, kept], before["B"][:, kept])
    assert torch.equal(answer.factors["A"][kept], before["A"][kept])
    assert torch.equal(answer.factors["B"][:, list(replaced)], new.left.float())
    assert torch.equal(answer.factors["A"][list(replaced)], new.right.float())


@every_dtype
def test_all_updates_of_a_run_sum_up_to_the_documented_export(dtype):
    """ΔW = s·(BA − B₀A₀ − Σ B₁'A₁' + Σ B₁A₁): after recompositions, the adapted weight less W0 is what
    training has learned.
    """
    method, weight = _method(), _weight()
    init, factors = _trained(method, weight, dtype)
    first = _product(method.delta(_used(init.factors, dtype)))
    learned = _product(method.delta(_used(factors, dtype))) - first
    total = _product(init.base_update)
    for number in range(5):  # the whole reserve
        replaced = method.choose(torch.rand(RANK, generator=torch.Generator().manual_seed(number)))
        answer = method.fuse(factors, _used(factors, dtype), replaced, _fresh(init, 3, first=3 * number))
        factors, total = answer.factors, total + _product(answer.base_update)
        kept = _product(method.delta(_used(factors, dtype)))
        assert (total + kept - learned).norm() < 1e-6 * first.norm()
        factors["A"] = factors["A"] + 0.02 * torch.randn(
            RANK, IN, generator=torch.Generator().manual_seed(50 + number)
        )
        learned = learned + _product(method.delta(_used(factors, dtype))) - kept


# ---------------------------------------------------------------------- components from the gradient


@every_shape
@every_alpha
@every_dtype
def test_components_from_a_gradient_are_its_leading_directions_of_descent(shape, alpha, dtype):
    method = _method(refill="gradient", alpha=alpha)
    gradient = _weight(shape, seed=7) * 1e-4
    new = method.new_components(_layer(gradient, dtype), magnitude=0.3, count=3)
    assert new.left.shape == (shape[0], 3) and new.right.shape == (3, shape[1])
    assert new.left.dtype == new.right.dtype == dtype
    u, _, vt = torch.linalg.svd(-gradient.double(), full_matrices=False)
    expected = 0.3 * u[:, :3] @ vt[:3]
    tolerance = 1e-4 if dtype == torch.float32 else 1e-2
    assert (method.scaling * _product(new) - expected).norm() < tolerance * expected.norm()
    assert float((gradient.double() * _product(new)).sum()) < 0  # downhill, to first order
    torch.testing.assert_close(
        new.left.float().norm(dim=0), new.right.float().norm(dim=1), rtol=tolerance, atol=0
    )


def test_components_from_a_gradient_leave_it_alone_and_are_deterministic(monkeypatch):
    monkeypatch.setattr("distlora.maths.linalg.EXACT_SIDE", 0)
    gradient = _weight((150, 131))
    before = gradient.clone()
    first, again = (_method(refill="gradient").new_components(_layer(gradient), 1.0, 3) for _ in range(2))
    assert torch.equal(gradient, before)
    assert torch.equal(first.left, again.left) and torch.equal(first.right, again.right)
