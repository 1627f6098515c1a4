"""A run draws its own random numbers and leaves the program's alone."""

import random

import numpy as np
import pytest
import torch

from distlora.engine.random_state import own_random_state, reseed

CPU = torch.device("cpu")


def draws(seed, count=4):
    with own_random_state(seed, CPU):
        return torch.rand(count).tolist()


def test_equal_seeds_draw_the_same_whatever_was_drawn_before():
    first = draws(1)
    torch.rand(5)
    assert draws(1) == first != draws(2)


def test_the_programs_generators_go_on_as_if_nothing_had_been():
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    draws(1)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states[1:]


def test_after_an_error_too():
    state = torch.get_rng_state()
    with pytest.raises(RuntimeError), own_random_state(1, CPU):
        torch.rand(3)
        raise RuntimeError
    assert torch.equal(torch.get_rng_state(), state)


def test_reseeding_starts_the_same_stream_at_any_point():
    with own_random_state(1, CPU):
        torch.rand(7)
        reseed(5, CPU)
        assert torch.rand(4).tolist() == draws(5)
        reseed(6, CPU)
        assert torch.rand(4).tolist() != draws(5)


def test_dropout_is_decided_by_the_seed():
    def kept():
        with own_random_state(3, CPU):
            return torch.nn.functional.dropout(torch.ones(50), 0.5, True).tolist()

    assert kept() == kept() and 0.0 in kept() and 2.0 in kept()


@pytest.mark.parametrize("seed", [0, 2**63 - 1])
def test_every_seed_that_a_recipe_allows(seed):
    assert len(set(draws(seed))) == 4
