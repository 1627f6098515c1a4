"""The loss is defined once: the token mean over the global batch, however the batch is cut up."""

import pytest
import torch

from distlora.data import Sample, collate, micro_batches, shard
from distlora.engine.local import LocalEngine
from distlora.errors import TrainingError
from distlora.models.losses import response_loss
from distlora.models.targets import count_targets
from distlora.training.step import accumulate, evaluation_loss
from tests.distributed.cases import solo
from tests.distributed.world import build, samples, write_random_factors
from tests.stepping import train_step
from tests.tiny_models import tiny_model_dir

COUNT = 12
SPLITS = [1, 2, 3, 5, COUNT]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tiny_model_dir("qwen2", tmp_path_factory.mktemp("models"))


@pytest.fixture
def engine(directory):
    engine = LocalEngine(solo())
    write_random_factors(engine, build(engine, directory))
    return engine


def rows():
    """Responses of 1 to 24 tokens."""
    return samples(COUNT, 3)


def cut(size, order=None, empty=0):
    """The global batch in micro-batches of `size`, and empty ones behind them."""
    taken = list(range(COUNT)) if order is None else order
    parts = micro_batches(taken, 0, 1, size, -(-COUNT // size) + empty)
    return [collate([rows()[i] for i in part], 0) for part in parts]


def whole_loss(engine):
    """The definition, in one pass: the sum over all response tokens divided by their number."""
    total, tokens = response_loss(engine.module, collate(rows(), 0))
    return total / tokens


def gradients(engine):
    return {name: p.grad.clone() for name, p in engine.module.named_parameters() if p.requires_grad}


def forget(engine):
    for parameter in engine.module.parameters():
        parameter.grad = None


# ---------------------------------------------------------------------- the training loss


@pytest.mark.parametrize("empty", [0, 3], ids=["full", "with empty batches"])
@pytest.mark.parametrize("size", SPLITS)
def test_every_cut_has_the_same_loss_and_gradient(size, empty, engine):
    wanted = whole_loss(engine)
    wanted.backward()
    exact = gradients(engine)
    forget(engine)
    assert accumulate(engine, cut(size, empty=empty), response_loss) == pytest.approx(wanted.item(), rel=1e-6)
    for name, gradient in gradients(engine).items():
        torch.testing.assert_close(
            gradient, exact[name], rtol=0, atol=1e-5 * float(exact[name].abs().max()), msg=name
        )


def test_the_order_of_the_samples_changes_nothing(engine):
    assert accumulate(engine, cut(2, order=list(reversed(range(COUNT)))), response_loss) == pytest.approx(
        accumulate(engine, cut(3), response_loss), rel=1e-6
    )


@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_mean_of_means_would_be_another_number(size, engine):
    """On this data the customary average of micro-batch means is far off: the tests above could not pass with
    it.
    """
    losses = [response_loss(engine.module, batch) for batch in cut(size)]
    average = sum(loss.item() / tokens for loss, tokens in losses) / len(losses)
    wanted = whole_loss(engine).item()
    assert abs(average - wanted) / wanted > 1e-3


def test_the_count_is_of_predicted_tokens_only():
    full = Sample([1, 2, 3], [1, 2, 3], [1], None)  # nothing predicts the first token
    none = Sample([1, 2, 3], [-100] * 3, [1, 2, 3], None)
    assert count_targets(collate([full, none], 0)) == 2
    assert count_targets(collate([], 0)) == 0
    assert count_targets(collate(rows(), 0)) == sum(
        label != -100 for row in rows() for label in row.labels[1:]
    )


def test_the_loss_is_the_one_before_the_step_and_the_rate_is_used(engine):
    before, factors = (
        whole_loss(engine).item(),
        {n: p.detach().clone() for n, p in engine.module.named_parameters()},
    )
    loss, info = train_step(engine, cut(2), response_loss, rate=0.0)
    assert loss == pytest.approx(before, rel=1e-6) and info.grad_norm > 0 and not info.skipped
    assert all(torch.equal(factors[n], p) for n, p in engine.module.named_parameters())
    assert all(p.grad is None for p in engine.module.parameters())
    train_step(engine, cut(2), response_loss, rate=1e-2)
    moved = {n for n, p in engine.module.named_parameters() if not torch.equal(factors[n], p)}
    assert moved == set(engine.trained_shapes())
    assert whole_loss(engine).item() < before


def test_the_reported_norm_is_that_of_the_whole_gradient(engine):
    accumulate(engine, cut(3), response_loss)
    norm = torch.cat([gradient.flatten() for gradient in gradients(engine).values()]).norm().item()
    forget(engine)
    assert train_step(engine, cut(1), response_loss, 1e-2)[1].grad_norm == pytest.approx(norm, rel=1e-5)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_the_run(value, engine):
    def broken(model, batch):
        loss, tokens = response_loss(model, batch)
        return loss * value, tokens

    with pytest.raises(TrainingError, match=f"the training loss is {value}"):
        train_step(engine, cut(3), broken, 1e-2)
    with pytest.raises(TrainingError):  # one broken micro-batch among good ones is enough
        calls = iter([response_loss, broken, response_loss, response_loss])
        accumulate(engine, cut(3), lambda model, batch: next(calls)(model, batch))


# ---------------------------------------------------------------------- the evaluation loss


@pytest.mark.parametrize("size", SPLITS)
def test_the_evaluation_loss_is_the_token_mean_over_the_whole_set(size, engine):
    parts = shard(COUNT, 0, 1, size)
    batches = [collate([rows()[i] for i in part], 0) for part in parts] + [collate([], 0)]
    assert evaluation_loss(engine, batches, response_loss) == pytest.approx(
        whole_loss(engine).item(), rel=1e-6
    )


def test_evaluation_is_without_dropout_and_gradients_and_training_goes_on(directory):
    engine = LocalEngine(solo())
    write_random_factors(engine, build(engine, directory, dropout=0.5))
    modes = []

    def loss(model, batch):
        modes.append((model.training, torch.is_grad_enabled()))
        return response_loss(model, batch)

    first, second = (evaluation_loss(engine, cut(3), loss) for _ in range(2))
    assert first == second and set(modes) == {(False, False)}
    assert all(module.training for module in engine.module.modules())
    assert all(p.grad is None for p in engine.module.parameters())


def test_batches_may_come_one_at_a_time(engine):
    """An evaluation set need not lie in memory."""
    assert evaluation_loss(engine, iter(cut(3)), response_loss) == evaluation_loss(
        engine, cut(3), response_loss
    )


# ---------------------------------------------------------------------- several ranks


class OneOf:
    """What step.py needs of a group of ranks, played by one rank after another: `sum` adds up what all would
    bring.
    """

    is_main, world_size, device = True, 3, torch.device("cpu")

    def __init__(self, sums):
        self._sums = sums

    def sum(self, *values):
        return tuple(self._sums.pop(0)) if self._sums else values

    sum_or_stop = sum


def test_each_ranks_share_is_divided_by_the_tokens_of_all(engine):
    """The shares of three ranks, two with samples and one with nothing but empty passes,
    add up to the loss.
    """
    wanted = whole_loss(engine).item()
    tokens = count_targets(collate(rows(), 0))
    shares = []
    for rank in range(3):
        parts = micro_batches(range(COUNT), rank, 3, 2, 2)
        engine.comm = OneOf([[tokens]])
        shares.append(
            accumulate(engine, [collate([rows()[i] for i in part], 0) for part in parts], response_loss)
        )
    assert sum(shares) == pytest.approx(wanted, rel=1e-6)
