"""What makes a training loss another one than an evaluation's: smoothed targets and noise on embeddings."""

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F
from transformers.integrations.neftune import neftune_post_forward_hook

from distlora.data import micro_batches
from distlora.engine.comm import Topology
from distlora.errors import Preempted, UserError
from distlora.models.cross_entropy import OutputHead, cross_entropy, label_cross_entropy
from distlora.models.embedding_noise import EmbeddingNoise
from distlora.models.targets import IGNORE
from distlora.recipe.combination import check_combination
from distlora.training import train
from distlora.training.objective import objective_of
from tests.tiny_models import tiny_model_dir
from tests.unit.test_train import short_recipe

ALONE = Topology()


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny_model_dir("llama", tmp_path_factory.mktemp("models"))


# ---------------------------------------------------------------------- smoothed targets


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.6])
@pytest.mark.parametrize("blockwise", [True, False])
def test_the_smoothed_loss_and_its_gradient_are_torchs(smoothing, softcap, blockwise):
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(9, 6, generator=generator, requires_grad=True)
    linear = torch.nn.Linear(6, 31)
    targets = torch.randint(31, (9,), generator=generator)
    head = OutputHead(linear) if blockwise else linear
    cross_entropy(head, hidden, targets, torch.ones(9), softcap, smoothing).backward()
    found = [hidden.grad, linear.weight.grad, linear.bias.grad]
    loss = cross_entropy(head, hidden, targets, torch.ones(9), softcap, smoothing)
    hidden.grad, linear.weight.grad, linear.bias.grad = None, None, None
    logits = linear(hidden) if softcap is None else softcap * torch.tanh(linear(hidden) / softcap)
    wanted = F.cross_entropy(logits, targets, reduction="sum", label_smoothing=smoothing)
    wanted.backward()
    torch.testing.assert_close(loss, wanted, rtol=1e-6, atol=1e-6)
    for mine, theirs in zip(found, [hidden.grad, linear.weight.grad, linear.bias.grad]):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


def test_smoothed_labels_are_torchs_and_rows_without_one_have_no_loss():
    logits, labels = torch.randn(5, 3), torch.tensor([0, 2, IGNORE, 1, 1])
    wanted = F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum", label_smoothing=0.2)
    torch.testing.assert_close(label_cross_entropy(logits, labels, smoothing=0.2), wanted)


def test_what_is_trained_is_smoothed_and_what_is_evaluated_is_not(model, tmp_path):
    make = short_recipe(model, tmp_path)
    objective = objective_of(make("train.label_smoothing=0.3"))
    loaded, _ = objective.load_model(objective.check_sizes())
    ids = torch.arange(5, 17)[None]
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    logits = loaded(ids).logits[0, :-1]
    for loss, smoothing in ((objective.training_loss, 0.3), (objective.loss, 0.0)):
        wanted = F.cross_entropy(logits, ids[0, 1:], reduction="sum", label_smoothing=smoothing)
        torch.testing.assert_close(loss(loaded, batch)[0], wanted)
    plain = objective_of(make())
    assert plain.training_loss is plain.loss


# ---------------------------------------------------------------------- noise on embeddings


def mask_of(*lengths: int) -> torch.Tensor:
    return torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]


def test_the_noise_has_the_size_of_transformers():
    """Of one text, whose length is the padded one that transformers counts."""
    length, width, alpha = 40, 32, 5.0
    mine = EmbeddingNoise(alpha, 1).noise(mask_of(length), width, 0, [0])
    module = SimpleNamespace(training=True, neftune_noise_alpha=alpha)
    theirs = neftune_post_forward_hook(module, None, torch.zeros(1, length, width))
    largest = alpha / math.sqrt(length * width)
    for noise in (mine, theirs):
        assert 0.99 * largest < noise.abs().max() <= largest and abs(noise.mean()) < 0.1 * largest
        assert abs(noise.std() / (largest / math.sqrt(3)) - 1) < 0.05


def test_padding_has_no_noise_and_lengthens_no_text():
    noise = EmbeddingNoise(5.0, 1)
    alone, padded = noise.noise(mask_of(3), 8, 2, [4]), noise.noise(mask_of(3, 7), 8, 2, [4, 5])
    assert torch.equal(padded[0, :3], alone[0]) and not padded[0, 3:].any() and padded[1].all()


@pytest.mark.parametrize(("world", "micro"), [(1, 1), (1, 3), (2, 1), (2, 2), (3, 2)])
def test_the_noise_of_a_text_is_the_same_on_any_ranks_and_in_any_passes(world, micro):
    """As the passes of a global batch of six texts are cut."""
    embedding = torch.nn.Embedding(10, 4)
    model = SimpleNamespace(get_input_embeddings=lambda: embedding)
    found: dict[int, torch.Tensor] = {}
    for rank in range(world):
        passes = micro_batches(range(6), rank, world, micro, -(-6 // (world * micro)))
        noisy = EmbeddingNoise(5.0, 1).of_step(
            lambda model, batch: (model.get_input_embeddings()(batch["input_ids"]), 0), 7, rank, world, micro
        )
        for indices in filter(None, passes):
            ids = torch.zeros(len(indices), 5, dtype=torch.int64)
            embedded, _ = noisy(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
            found |= dict(zip(indices, embedded - embedding(ids), strict=True))
    assert not embedding._forward_hooks
    wanted = EmbeddingNoise(5.0, 1).noise(mask_of(*[5] * 6), 4, 7, range(6))
    for index in range(6):
        torch.testing.assert_close(found[index], wanted[index], rtol=0, atol=1e-6)
    assert not torch.equal(wanted, EmbeddingNoise(5.0, 1).noise(mask_of(*[5] * 6), 4, 8, range(6)))


def test_a_resumed_run_with_noise_ends_with_the_same_bytes_and_another_run_does_not(model, tmp_path):
    make = short_recipe(model, tmp_path)
    noisy = [make("train.neftune_alpha=5", "train.steps=2", f"output_dir={tmp_path / name}") for name in "ab"]
    train.train(noisy[0], ALONE)
    asked = iter([False] * 12 + [True] * 1000)
    with pytest.raises(Preempted):
        train.train(noisy[1], ALONE, asked_to_stop=lambda: next(asked))
    train.train(noisy[1], ALONE)
    quiet = make("train.steps=2", f"output_dir={tmp_path / 'c'}")
    train.train(quiet, ALONE)
    first, second, third = (
        (tmp_path / name / "checkpoint-2" / "adapter.safetensors").read_bytes() for name in "abc"
    )
    assert first == second != third


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["train.label_smoothing=1"], "label_smoothing: found 1, wanted a number below 1"),
        (["train.label_smoothing=-0.1"], "wanted a number of at least 0"),
        (["train.neftune_alpha=-1"], "neftune_alpha: found -1, wanted a number of at least 0"),
        (["data.task=stsb", "train.label_smoothing=0.1"], "the task stsb has scores; set it to 0"),
        (["data.task=mnist", "data.max_length=512", "train.neftune_alpha=5"], "images have none"),
    ],
)
def test_mistakes_end_in_a_sentence(model, tmp_path, overrides, says):
    make = short_recipe(model, tmp_path)
    with pytest.raises(UserError) as refused:
        objective_of(make("data.template=null", *overrides))
    assert says in str(refused.value) and "\n" not in str(refused.value)


def test_noise_and_packed_rows_exclude_each_other(model, tmp_path):
    make = short_recipe(model, tmp_path)
    check_combination(make("train.neftune_alpha=5"), {})
    with pytest.raises(UserError, match="data.packing puts several texts into a row"):
        check_combination(make("train.neftune_alpha=5", "data.packing=true"), {})
