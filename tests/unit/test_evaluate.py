"""Exact match, with a model whose answers are known: it looks the next token up in a table."""

import pytest
import torch

from distlora.adapter.attach import attach
from distlora.data import Sample
from distlora.engine.local import LocalEngine
from distlora.engine.optimizers import OptimizerSpec
from distlora.evaluation import scoring as evaluate
from distlora.evaluation.scoring import exact_match
from distlora.methods import registry
from distlora.models.loading import load_model, load_tokenizer
from distlora.recipe.sections import ModelSection
from tests.distributed.cases import solo
from tests.tiny_models import tiny_model_dir

#: The last letter of a prompt decides the answer.
ANSWERS = {"a": "1", "b": "2", "c": "3", "d": "4", "e": "5"}


@pytest.fixture(scope="module")
def lookup(tmp_path_factory):
    """(engine, tokenizer): a Mistral that answers a prompt ending in `a` with 1, `b` with 2, …, and then
    stops.
    """
    section = ModelSection(
        path=str(tiny_model_dir("mistral", tmp_path_factory.mktemp("models"))),
        dtype="float32",
        gradient_checkpointing=False,
    )
    tokenizer = load_tokenizer(section)
    model, _ = load_model(section)
    attached = attach(model, registry()["lora"](rank=2), "all-linear")
    following = {tokenizer.encode(letter)[0]: tokenizer.encode(digit)[0] for letter, digit in ANSWERS.items()}
    following |= {digit: tokenizer.eos_token_id for digit in list(following.values())}
    with torch.no_grad():
        for (
            layer
        ) in attached.layers.values():  # every block adds nothing, so a token's embedding reaches the head
            layer.weight.zero_()
        embeddings, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
        embeddings.zero_(), head.zero_()
        for place, (token, successor) in enumerate(following.items()):
            embeddings[token, place] = 1.0
            head[successor, place] += 10.0
    engine = LocalEngine(solo())
    engine.start(model, OptimizerSpec())
    return engine, tokenizer


def problems(tokenizer, pairs):
    """(text of the prompt, expected answer) as samples."""
    encoded = [(tokenizer.encode(prompt), answer) for prompt, answer in pairs]
    return [Sample(ids, [-100] * len(ids), ids, answer) for ids, answer in encoded]


def mixed(tokenizer, right, wrong):
    """Prompts of different length, of which `right` expect what the model answers."""
    letters = [list(ANSWERS)[i % len(ANSWERS)] for i in range(right + wrong)]
    texts = ["x" * (i % 4) + letter for i, letter in enumerate(letters)]
    expected = [ANSWERS[letter] if i % (right + wrong) < right else "9" for i, letter in enumerate(letters)]
    return problems(tokenizer, zip(texts, expected, strict=True))


def share_of(lookup, samples, max_new_tokens=4):
    engine, tokenizer = lookup
    return exact_match(engine, tokenizer, "arithmetic", samples, max_new_tokens)


@pytest.mark.parametrize(("right", "wrong"), [(5, 0), (0, 5), (3, 4), (1, 0)])
def test_the_share_is_that_of_the_right_answers(right, wrong, lookup):
    assert share_of(lookup, mixed(lookup[1], right, wrong)) == right / (right + wrong)


def test_answers_are_judged_as_the_task_does(lookup):
    samples = problems(lookup[1], [("a", "1.0"), ("b", "2.5"), ("c", None), ("d", "04")])
    assert share_of(lookup, samples) == 0.5  # 1 = 1.0 and 4 = 04 as numbers; no answer is never right


def test_the_end_token_ends_an_answer(lookup):
    """Without it the answer to `a` would be a 1 followed by whatever comes."""
    engine, tokenizer = lookup
    assert share_of(lookup, problems(tokenizer, [("a", "1")]), max_new_tokens=1) == 1.0
    assert share_of(lookup, problems(tokenizer, [("a", "1")]), max_new_tokens=8) == 1.0


def test_training_goes_on_in_training_mode_without_gradients(lookup):
    engine, tokenizer = lookup
    engine.train_mode(True)
    share_of(lookup, mixed(tokenizer, 2, 1))
    assert all(module.training for module in engine.module.modules())
    assert all(parameter.grad is None for parameter in engine.module.parameters())


@pytest.mark.parametrize("count", [1, 4, 5, 11])
def test_batches_of_any_size_give_the_same_share(count, lookup, monkeypatch):
    samples = mixed(lookup[1], count // 2, count - count // 2)
    whole = share_of(lookup, samples)
    monkeypatch.setattr(evaluate, "GENERATION_BATCH", 3)
    assert share_of(lookup, samples) == whole == (count // 2) / count


class RankOf:
    """One of several ranks; `sum` notes what it brings."""

    device, is_main = torch.device("cpu"), True

    def __init__(self, rank, world_size):
        self.rank, self.world_size, self.brought = rank, world_size, []

    def sum(self, *values):
        self.brought.append(values)
        return values

    sum_or_stop = sum


@pytest.mark.parametrize(("count", "world"), [(10, 3), (2, 3), (7, 2), (1, 4)])
def test_every_sample_is_answered_once_and_every_rank_generates_equally_often(
    count, world, lookup, monkeypatch
):
    engine, tokenizer = lookup
    monkeypatch.setattr(evaluate, "GENERATION_BATCH", 2)
    samples = mixed(tokenizer, count - count // 3, count // 3)
    whole = share_of(lookup, samples)
    generate, calls, correct = evaluate.generate, [], 0
    for rank in range(world):

        def counted(*arguments, rank=rank, **options):
            calls.append(rank)
            return generate(*arguments, **options)

        monkeypatch.setattr(evaluate, "generate", counted)
        monkeypatch.setattr(engine, "comm", RankOf(rank, world))
        exact_match(engine, tokenizer, "arithmetic", samples, 4)
        correct += sum(right for (right,) in engine.comm.brought)
    assert correct / count == whole == (count - count // 3) / count
    assert len({calls.count(rank) for rank in range(world)}) == 1
