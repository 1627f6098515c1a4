"""When components are replaced: at the promised steps,
and for the promised reasons on made-up loss curves.
"""

import json

import pytest

from distlora.maths.recomposition_schedule import (
    AdaptiveSchedule,
    Decision,
    FixedSchedule,
    every_steps,
    fixed_steps,
    freeze_start,
)


def _no_share():
    raise AssertionError("the share of the lower half was not to be asked for")


def _walk(switching, losses, share=lambda: 0.1, first=1):
    """Every decision of a run with these losses, by step. share: what `low_share` answers, or a function of
    nothing.
    """
    made = ((done, switching.after_step(done, loss, share)) for done, loss in enumerate(losses, first))
    return {done: decision for done, decision in made if decision is not None}


def _recompositions(decisions):
    return [done for done, decision in decisions.items() if decision.recompose]


# ---------------------------------------------------------------------- fixed


@pytest.mark.parametrize(
    ("total", "count", "steps"),
    [(100, 4, (20, 40, 60, 80)), (10, 3, (2, 5, 7)), (4, 3, (1, 2, 3)), (9, 0, ())],
)
def test_fixed_steps_are_spread_evenly(total, count, steps):
    assert fixed_steps(total, count) == steps


def test_fixed_steps_are_distinct_and_inside_the_run():
    for total in range(1, 60):
        for count in range(total):
            steps = fixed_steps(total, count)
            assert len(set(steps)) == count and list(steps) == sorted(steps)
            assert all(1 <= step < total for step in steps)


@pytest.mark.parametrize(
    ("total", "interval", "steps"), [(10, 3, (3, 6, 9)), (9, 3, (3, 6)), (3, 3, ()), (3, 5, ())]
)
def test_every_steps_leaves_out_the_last_step(total, interval, steps):
    assert every_steps(total, interval) == steps


def test_a_fixed_schedule_recomposes_at_its_steps_and_counts():
    decisions = _walk(FixedSchedule((2, 5, 7)), [1.0] * 10, _no_share)
    assert decisions == {
        2: Decision(True, "recomposition 1 of 3"),
        5: Decision(True, "recomposition 2 of 3"),
        7: Decision(True, "recomposition 3 of 3"),
    }


def test_a_fixed_schedule_stops_at_its_most_and_says_so_once():
    decisions = _walk(FixedSchedule((2, 4, 6, 8), most=2), [1.0] * 10, _no_share)
    assert _recompositions(decisions) == [2, 4] and list(decisions) == [2, 4, 6]
    assert decisions[4].reason == "recomposition 2 of 2"
    assert "all 2 recompositions" in decisions[6].reason


def test_a_fixed_schedule_counts_right_after_a_resume():
    later = FixedSchedule((2, 5, 7))
    later.restore(json.loads(json.dumps(FixedSchedule((2, 5, 7)).state())))
    assert _walk(later, [1.0] * 6, _no_share, first=5)[5].reason == "recomposition 2 of 3"


# ---------------------------------------------------------------------- adaptive

WINDOW = 5
FLAT = [1.0] * 100


def _adaptive(
    total=100, most=10, window=WINDOW, improvement=0.01, share=0.25, freeze_fraction=0.1, interval=0
):
    return AdaptiveSchedule(total, most, window, improvement, share, freeze_fraction, interval)


def _falling(count=100, factor=0.99):
    """Falls by 5 % a window."""
    return [factor**step for step in range(count)]


def test_a_flat_loss_and_an_idle_half_lead_to_a_recomposition_with_both_numbers_in_the_reason():
    decisions = _walk(_adaptive(), FLAT[:10])
    assert list(decisions) == [10] and decisions[10].recompose
    for part in (
        "recomposition 1 of at most 10",
        "mean loss 1 → 1",
        "two windows of 5 steps",
        "0.01",
        "carries 0.1 ",
        "below 0.25",
    ):
        assert part in decisions[10].reason


def test_a_loss_that_still_improves_is_left_alone_and_the_share_is_not_asked_for():
    decisions = _walk(_adaptive(), _falling()[:89], _no_share)
    assert _recompositions(decisions) == []
    assert list(decisions) == list(range(10, 90, WINDOW))  # reconsidered every window
    assert all(
        decision.reason.startswith("keep") and "still improving" in decision.reason
        for decision in decisions.values()
    )


def test_a_busy_half_prevents_the_recomposition():
    decisions = _walk(_adaptive(), FLAT[:40], lambda: 0.3)
    assert _recompositions(decisions) == [] and list(decisions) == [10, 15, 20, 25, 30, 35, 40]
    assert all("carries 0.3 " in d.reason and "not below 0.25" in d.reason for d in decisions.values())


def test_a_recomposition_comes_once_the_loss_stops_falling():
    losses = _falling(30) + [_falling(30)[-1]] * 60
    decisions = _walk(_adaptive(), losses)
    first = _recompositions(decisions)[0]
    assert 35 <= first <= 45
    assert all(not decisions[done].recompose for done in decisions if done < first)


def test_the_improvement_that_counts_is_the_given_one():
    """5 % a window: enough at 4 %, too little at 6 %."""
    assert not _recompositions(_walk(_adaptive(improvement=0.04), _falling(20)))
    assert _recompositions(_walk(_adaptive(improvement=0.06), _falling(10))) == [10]


def test_means_are_compared_not_single_losses():
    """A loss that swings by half of itself, around a falling mean, still improves."""
    swinging = [loss * (1.5 if step % 2 else 0.5) for step, loss in enumerate(_falling(60, 0.97))]
    assert not _recompositions(_walk(_adaptive(window=6), swinging))


def test_a_recomposition_that_did_no_harm_keeps_the_interval():
    decisions = _walk(_adaptive(interval=20), FLAT[:85])
    assert _recompositions(decisions) == [20, 40, 60, 80]
    assert [done for done in decisions if "recovered" in decisions[done].reason] == [25, 45, 65, 85]


@pytest.mark.parametrize("rise", [0.05, 1.0])
def test_a_recomposition_that_did_harm_doubles_the_interval(rise):
    losses = [1.0] * 20 + [1.0 + rise] * 80
    decisions = _walk(_adaptive(total=1000, interval=20), losses)
    assert _recompositions(decisions)[:2] == [20, 60]
    assert not decisions[25].recompose
    for part in ("back off", "mean loss 1 before the recomposition at step 20", "doubles to 40"):
        assert part in decisions[25].reason
    assert "stays 40" in decisions[65].reason  # at its new level the loss is flat
    assert _recompositions(decisions)[2:] == [100]


def test_each_failure_doubles_again():
    steps, rising = range(1, 400), []
    for step in steps:  # after every recomposition the loss is a tenth higher, for good
        rising.append(1.0 + 0.1 * sum(step > recomposition for recomposition in (10, 30, 70, 150, 310)))
    assert _recompositions(_walk(_adaptive(total=1000), rising)) == [10, 30, 70, 150, 310]


def test_a_loss_that_rises_within_the_tolerance_counts_as_recovered():
    for rise, expected in ((0.009, "recovered"), (0.011, "back off")):
        decisions = _walk(_adaptive(), [1.0] * 10 + [1.0 + rise] * 5)
        assert decisions[15].reason.startswith(expected)


def test_a_decision_never_compares_losses_from_both_sides_of_a_recomposition():
    """The loss jumps down at the recomposition and is flat again:
    over both sides that would look like an improvement.
    """
    decisions = _walk(_adaptive(), [1.0] * 10 + [0.5] * 20)
    assert _recompositions(decisions) == [10, 20, 30]


@pytest.mark.parametrize("interval", [1, 9, 10, 11, 25])
def test_the_first_decision_comes_after_the_interval_and_two_windows(interval):
    assert next(iter(_walk(_adaptive(interval=interval), FLAT))) == max(interval, 10)


def test_there_are_no_more_recompositions_than_allowed_and_that_is_said_once():
    decisions = _walk(_adaptive(most=2), FLAT)
    assert _recompositions(decisions) == [10, 20]
    assert list(decisions) == [10, 15, 20, 25, 26]  # the last recomposition is judged as well
    assert "all 2 recompositions" in decisions[26].reason


@pytest.mark.parametrize(("fraction", "start"), [(0.1, 90), (0.35, 65), (0.29, 71), (0.0, 100), (0.999, 1)])
def test_nothing_is_replaced_in_the_frozen_end_and_that_is_said_once(fraction, start):
    assert freeze_start(100, fraction) == start
    decisions = _walk(_adaptive(freeze_fraction=fraction), FLAT)
    assert all(done < start for done in _recompositions(decisions))
    assert list(decisions)[-1] == start and decisions[start].reason.startswith("frozen")
    assert f"from step {start} of 100" in decisions[start].reason


def test_the_last_step_is_never_followed_by_a_recomposition():
    for total in range(10, 60):
        assert total not in _recompositions(_walk(_adaptive(total=total, freeze_fraction=0.0), FLAT[:total]))


def _varied(count=300):
    """Falls, stays, jumps: every kind of decision occurs."""
    return [
        2 * 0.99 ** min(step, 60) + (0.3 if 116 <= step < 180 else 0.0) + 0.01 * (step * 7919 % 13)
        for step in range(count)
    ]


def test_all_kinds_of_decisions_occur_in_the_curve_used_below():
    decisions = _walk(_adaptive(total=300, most=30, improvement=0.02), _varied())
    kinds = {decision.reason.split()[0].rstrip(":") for decision in decisions.values()}
    assert kinds == {"keep", "recomposition", "recovered", "back", "frozen"}


@pytest.mark.parametrize("cut", [*range(0, 300, 13), 270, 299])
def test_a_resumed_run_decides_the_same(cut):
    def make():
        return _adaptive(total=300, most=30, improvement=0.02)

    losses = _varied()
    whole = _walk(make(), losses)
    before, after = make(), make()
    first = _walk(before, losses[:cut])
    after.restore(json.loads(json.dumps(before.state())))
    second = _walk(after, losses[cut:], first=cut + 1)
    assert {**first, **second} == whole


def test_a_state_is_a_copy():
    switching = _adaptive()
    _walk(switching, FLAT[:7])
    state = switching.state()
    kept = json.dumps(state)
    _walk(switching, FLAT[7:30], first=8)
    assert json.dumps(state) == kept


def test_a_schedule_is_finished_with_its_last_recomposition():
    fixed = FixedSchedule((4, 8, 12), most=2)
    assert [fixed.finished(done) for done in (0, 4, 7, 8, 20)] == [False, False, False, True, True]
    assert FixedSchedule(()).most == 0 and FixedSchedule(()).finished(0)
