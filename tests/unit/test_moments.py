"""Adam after a swap: the rule must give replaced components the updates of a fresh Adam, and leave all others
alone.
"""

import pytest
import torch

from distlora.maths.moments import AGE_LIMIT, own_age

BETA1, BETA2 = 0.9, 0.999
RATE = 0.01
BEFORE = 600  # steps taken before the swap
SIZE = 8


def _optimizer(parameter):
    return torch.optim.AdamW([parameter], RATE, betas=(BETA1, BETA2), eps=1e-300, weight_decay=0.0)


def _run(gradients, rule=True, before=BEFORE, dtype=torch.float64):
    """Trains `before` steps, forgets all moments of the second half of the elements, and goes on with these
    gradients (SIZE,).

    Yields after each step: its number k after the swap, |update| / rate (SIZE,), and the optimizer's state.
    """
    generator = torch.Generator().manual_seed(0)
    parameter = torch.nn.Parameter(torch.zeros(SIZE, dtype=dtype))
    optimizer = _optimizer(parameter)
    for _ in range(before):
        parameter.grad = torch.randn(SIZE, generator=generator, dtype=torch.float64).to(dtype)
        optimizer.step()
    state = optimizer.state[parameter]
    for key in ("exp_avg", "exp_avg_sq"):
        state[key][SIZE // 2 :] = 0
    for k, gradient in enumerate(gradients, 1):
        parameter.grad = gradient.to(dtype)
        if rule:
            ages = torch.where(torch.arange(SIZE) < SIZE // 2, 0, k)
            own_age(state["exp_avg_sq"], parameter.grad, ages, before + k, BETA2)
        with torch.no_grad():
            parameter.zero_()  # so that the update is read off without rounding
        optimizer.step()
        yield k, parameter.detach().abs() / RATE, state


def _largest(gradients, steps=None, **arguments):
    """The largest update over the rate among the replaced elements, in the first `steps` steps."""
    return max(
        float(update[SIZE // 2 :].max())
        for k, update, _ in _run(gradients, **arguments)
        if steps is None or k <= steps
    )


def _constant(scale, count=AGE_LIMIT + 200):
    return [torch.full((SIZE,), scale, dtype=torch.float64)] * count


def _random(count=42, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randn(count, SIZE, generator=generator, dtype=torch.float64))


def _growing(count=42):
    """The sequence with the largest update at step `count` (Cauchy–Schwarz on Σ a_i g_i over √Σ b_i g_i²)."""
    return [torch.full((SIZE,), (BETA2 / BETA1) ** k, dtype=torch.float64) for k in range(1, count + 1)]


# ---------------------------------------------------------------------- the size of updates


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("before", [1, BEFORE])
def test_constant_gradients_never_move_a_new_component_by_more_than_the_rate(scale, before):
    assert _largest(_constant(scale), before=before) <= 1 + 1e-6


@pytest.mark.parametrize(
    "gradients", [_random(), _random(seed=2), _growing()], ids=["random", "random again", "growing"]
)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_no_gradients_move_a_new_component_by_more_than_one_and_a_half_rates(gradients, scale):
    assert _largest([scale * gradient for gradient in gradients]) <= 1.5


def test_without_the_rule_both_bounds_break():
    assert _largest(_constant(1.0), rule=False) > 4
    assert _largest(_random(), rule=False) > 1.5
    assert _largest(_growing(), rule=False) > 4


def test_updates_do_not_depend_on_the_scale_of_the_gradient():
    small, large = ([u for _, u, _ in _run([scale * g for g in _random()])] for scale in (1e-6, 1e6))
    for a, b in zip(small, large):
        torch.testing.assert_close(a[SIZE // 2 :], b[SIZE // 2 :], rtol=1e-9, atol=0)


def test_float32_is_close_enough():
    assert _largest(_constant(1.0), dtype=torch.float32) <= 1 + 1e-5
    assert _largest(_random(), dtype=torch.float32) <= 1.5


# ---------------------------------------------------------------------- a fresh Adam's second moments


def test_second_moments_are_those_of_a_fresh_adam():
    gradients = _random(AGE_LIMIT)
    parameter = torch.nn.Parameter(torch.zeros(SIZE, dtype=torch.float64))
    fresh = _optimizer(parameter)
    for (k, _, state), gradient in zip(_run(gradients), gradients):
        parameter.grad = gradient.clone()
        fresh.step()
        expected = fresh.state[parameter]["exp_avg_sq"] / (1 - BETA2**k)
        found = state["exp_avg_sq"] / (1 - BETA2 ** (BEFORE + k))
        torch.testing.assert_close(found[SIZE // 2 :], expected[SIZE // 2 :], rtol=1e-12, atol=0)


def test_what_was_not_replaced_trains_on_as_if_nothing_had_happened():
    with_rule, without = (list(_run(_random(), rule=rule)) for rule in (True, False))
    for (_, a, _), (_, b, _) in zip(with_rule, without):
        assert torch.equal(a[: SIZE // 2], b[: SIZE // 2]) and not torch.equal(a[SIZE // 2 :], b[SIZE // 2 :])


# ---------------------------------------------------------------------- elements


def _moments(count=60, seed=3):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, generator=generator), torch.randn(count, generator=generator)


def test_only_young_elements_are_changed_and_the_others_keep_every_bit():
    moments, gradient = _moments(count=4)
    ages = torch.tensor([0, 1, AGE_LIMIT, AGE_LIMIT + 1])
    gradient[[0, 3]] = 1e30  # its square is infinite: no multiple of it may be added, not even none
    after = moments.clone()
    own_age(after, gradient, ages, 1000, BETA2)
    changed = after.view(torch.int32) != moments.view(torch.int32)
    assert changed.tolist() == [False, True, True, False]


def test_the_first_step_takes_the_gradient_alone():
    """k = 1: v ← C_{t−1}·g², whatever v was."""
    moments, gradient = _moments()
    own_age(moments, gradient, torch.ones(60, dtype=torch.int64), 7, BETA2)
    torch.testing.assert_close(moments, gradient.square() * (1 - BETA2**6), rtol=1e-6, atol=0)


def test_parts_are_changed_as_the_whole():
    moments, gradient = _moments()
    ages = torch.arange(60) % 7
    whole, parts = moments.clone(), moments.clone()
    own_age(whole, gradient, ages, 50, BETA2)
    for part in (slice(0, 13), slice(13, 14), slice(14, 60), slice(60, 60)):
        own_age(parts[part], gradient[part], ages[part], 50, BETA2)
    assert torch.equal(whole, parts) and not torch.equal(whole, moments)


def test_the_gradient_and_the_ages_are_not_changed():
    moments, gradient = _moments()
    ages = torch.full((60,), 3)
    before = gradient.clone()
    own_age(moments, gradient, ages, 50, BETA2)
    assert torch.equal(gradient, before) and (ages == 3).all()


def test_second_moments_never_become_negative():
    """Differences of near numbers: at k = t − 1, when the swap came after the first step, nearly nothing is
    added.
    """
    for step in (2, 3, 50, AGE_LIMIT + 1, 10**6):
        for age in {1, min(step - 1, AGE_LIMIT)}:
            moments, gradient = _moments()
            own_age(moments, gradient, torch.full((60,), age), step, BETA2)
            assert (moments >= 0).all() and moments.isfinite().all()


def test_a_swap_before_the_first_step_is_refused():
    with pytest.raises(ValueError, match="step 1"):
        own_age(torch.zeros(3), torch.ones(3), torch.ones(3, dtype=torch.int64), 1, BETA2)


def test_without_memory_there_is_nothing_to_correct():
    moments, gradient = _moments()
    after = moments.clone()
    own_age(after, gradient, torch.ones(60, dtype=torch.int64), 5, 0.0)
    assert torch.equal(after, moments)
