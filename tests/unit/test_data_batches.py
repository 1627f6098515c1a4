"""Order, shares and padding: deterministic, complete, and the same number of passes on every rank."""

import numpy as np
import pytest
import torch

from distlora.data import Sample, TrainOrder, collate, micro_batches, shard
from distlora.models.targets import IGNORE


@pytest.mark.parametrize("n, size", [(50, 8), (50, 50), (50, 64), (48, 8), (1, 4)])
def test_every_epoch_takes_every_sample_once(n, size):
    order = TrainOrder(n, size, seed=3)
    assert order.steps_per_epoch == -(-n // size)
    for epoch in range(2):
        steps = range(epoch * order.steps_per_epoch, (epoch + 1) * order.steps_per_epoch)
        batches = [order.indices(step) for step in steps]
        assert sorted(sum(batches, [])) == list(range(n))
        assert [len(batch) for batch in batches[:-1]] == [size] * (len(batches) - 1)
        assert len(batches[-1]) == n - size * (len(batches) - 1), "the last, smaller batch is trained"


def test_order_is_a_function_of_seed_and_step():
    order = TrainOrder(50, 8, seed=3)
    forward = [order.indices(step) for step in range(21)]
    assert [TrainOrder(50, 8, seed=3).indices(step) for step in reversed(range(21))] == forward[::-1]
    assert TrainOrder(50, 8, seed=4).indices(0) != forward[0]
    assert sum(forward[:7], []) != sum(forward[7:14], []), "epochs differ"


def test_order_leaves_global_generators_alone():
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    TrainOrder(50, 8, seed=3).indices(9)
    assert torch.equal(torch.get_rng_state(), before[0]) and np.random.get_state()[1].tolist() == before[1]


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("micro", [1, 2])
def test_ranks_share_each_batch_of_an_epoch(world_size, micro):
    accumulation = 3
    order = TrainOrder(50, world_size * micro * accumulation, seed=0)
    for step in range(order.steps_per_epoch):
        batch = order.indices(step)
        ranks = [micro_batches(batch, rank, world_size, micro, accumulation) for rank in range(world_size)]
        assert [len(passes) for passes in ranks] == [accumulation] * world_size
        assert all(len(each) <= micro for passes in ranks for each in passes)
        shares = [sum(passes, []) for passes in ranks]
        assert sorted(sum(shares, [])) == sorted(batch)
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_missing_samples_make_empty_passes():
    assert micro_batches([7, 8, 9], 1, 2, 2, 3) == [[8], [], []]
    assert micro_batches([7], 2, 3, 1, 2) == [[], []]


def test_batch_that_does_not_fit_is_refused_rather_than_cut():
    with pytest.raises(ValueError, match="do not fit"):
        micro_batches(list(range(9)), 0, 2, 2, 2)


@pytest.mark.parametrize("batch_size", [1, 2, 4])
@pytest.mark.parametrize("n, world_size", [(50, 3), (50, 1), (2, 3), (0, 2)])
def test_shard_covers_all_with_equal_passes(n, world_size, batch_size):
    ranks = [shard(n, rank, world_size, batch_size) for rank in range(world_size)]
    assert sorted(i for passes in ranks for each in passes for i in each) == list(range(n))
    assert len({len(passes) for passes in ranks}) == 1
    assert all(any(passes[i] for passes in ranks) for i in range(len(ranks[0]))), (
        "no pass is empty on all ranks"
    )


SAMPLES = [
    Sample([5, 6, 0], [IGNORE, 6, 0], [5]),
    Sample([5, 7, 8, 9, 0], [IGNORE, IGNORE, IGNORE, 9, 0], [5, 7, 8]),
]


def test_collate_pads_on_the_right_and_keeps_an_eos_equal_to_pad():
    batch = collate(SAMPLES, pad_id=0)
    assert batch["input_ids"].tolist() == [[5, 6, 0, 0, 0], [5, 7, 8, 9, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    assert batch["labels"].tolist() == [[IGNORE, 6, 0, IGNORE, IGNORE], [IGNORE, IGNORE, IGNORE, 9, 0]]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


def test_empty_batch_can_be_passed_through_a_model_and_has_no_loss():
    batch = collate([], pad_id=4, device="meta")
    assert {tuple(tensor.shape) for tensor in batch.values()} == {(1, 2)} and batch[
        "labels"
    ].device.type == "meta"
    batch = collate([], pad_id=4)
    assert batch["labels"].tolist() == [[IGNORE, IGNORE]] and batch["input_ids"].tolist() == [[4, 4]]
    assert batch["attention_mask"].tolist() == [[1, 1]], "a row that attends to nothing can give NaN"
