"""Answers and their scores, with a model whose answers are known: it looks the next token up in a table."""

from dataclasses import replace

import pytest
import torch

from distlora.adapter.attach import attach
from distlora.data import Question, Questions
from distlora.engine.local import LocalEngine
from distlora.engine.optimizers import OptimizerSpec
from distlora.errors import UserError
from distlora.evaluation.answering import Generation, Likelihood
from distlora.evaluation.scoring import answer_questions, exact_match, ready_to_answer
from distlora.methods import registry
from distlora.models import generation
from distlora.models.generation import end_tokens, generate
from distlora.models.likelihood import option_likelihoods
from distlora.models.loading import load_model, load_tokenizer
from distlora.recipe.sections import ModelSection
from tests.distributed.cases import solo
from tests.tiny_models import tiny_model_dir

#: The last letter of a prompt decides the answer. `f` is answered at length.
ANSWERS = {"a": "1", "b": "2", "c": "3", "d": "4", "e": "5", "f": "6"}


@pytest.fixture(scope="module")
def lookup(tmp_path_factory):
    """(engine, tokenizer): a Mistral that answers a prompt ending in `a` with 1, `b` with 2, …, and then
    stops; but after 6 there come 7, 8, 9, 6, 7, …
    """
    section = ModelSection(
        path=str(tiny_model_dir("mistral", tmp_path_factory.mktemp("models"))),
        dtype="float32",
        gradient_checkpointing=False,
    )
    tokenizer = load_tokenizer(section)
    model, _ = load_model(section)
    attached = attach(model, registry()["lora"](rank=2), "all-linear")
    digits = {digit: tokenizer.encode(digit)[0] for digit in "123456789"}
    following = {tokenizer.encode(letter)[0]: digits[digit] for letter, digit in ANSWERS.items()}
    following |= {digits[digit]: tokenizer.eos_token_id for digit in "12345"}
    following |= {digits[digit]: digits[after] for digit, after in ("67", "78", "89", "96")}
    with torch.no_grad():
        # Every block adds nothing, so a token's embedding reaches the head.
        for layer in attached.layers.values():
            layer.weight.zero_()
        embeddings, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
        embeddings.zero_(), head.zero_()
        for place, (token, successor) in enumerate(following.items()):
            embeddings[token, place] = 1.0
            head[successor, place] += 10.0
    engine = LocalEngine(solo())
    engine.start(model, OptimizerSpec())
    return engine, tokenizer


def problems(tokenizer, pairs, stops=()):
    """(text of the prompt, expected answer) as questions."""
    items = [Question(prompt, tokenizer.encode(prompt), answer) for prompt, answer in pairs]
    return Questions(items, stops, "here", 0, "")


def mixed(tokenizer, right, wrong):
    """Prompts of different length, of which `right` expect what the model answers."""
    letters = ["abcde"[i % 5] for i in range(right + wrong)]
    texts = ["x" * (i % 4) + letter for i, letter in enumerate(letters)]
    expected = [ANSWERS[letter] if i < right else "9" for i, letter in enumerate(letters)]
    return problems(tokenizer, zip(texts, expected, strict=True))


def share_of(lookup, questions, max_new_tokens=4, batch_size=None):
    engine, tokenizer = lookup
    return exact_match(engine, tokenizer, "arithmetic", questions, max_new_tokens, batch_size)


def outputs_of(lookup, questions, max_new_tokens):
    way = Generation(*lookup, "arithmetic", questions, max_new_tokens)
    indices = range(len(questions.items))
    return [way.record(index, said)["output"] for index, said in zip(indices, way.answer(indices, None))]


# ---------------------------------------------------------------------- the score


@pytest.mark.parametrize(("right", "wrong"), [(5, 0), (0, 5), (3, 4), (1, 0)])
def test_the_share_is_that_of_the_right_answers(right, wrong, lookup):
    assert share_of(lookup, mixed(lookup[1], right, wrong)) == right / (right + wrong)


def test_answers_are_judged_as_the_task_does(lookup):
    questions = problems(lookup[1], [("a", "1.0"), ("b", "2.5"), ("c", None), ("d", "04")])
    assert share_of(lookup, questions) == 0.5  # 1 = 1.0 and 4 = 04 as numbers; no answer is never right


def test_training_goes_on_in_training_mode_without_gradients(lookup):
    engine, tokenizer = lookup
    engine.train_mode(True)
    share_of(lookup, mixed(tokenizer, 2, 1))
    assert all(module.training for module in engine.module.modules())
    assert all(parameter.grad is None for parameter in engine.module.parameters())


@pytest.mark.parametrize("count", [1, 5, 11])
def test_batches_of_any_size_give_the_same_share(count, lookup):
    questions = mixed(lookup[1], count // 2, count - count // 2)
    assert {share_of(lookup, questions, 4, size) for size in (1, 3, None)} == {(count // 2) / count}


class RankOf:
    """One of several ranks, which hears nothing of the others."""

    device, is_main = torch.device("cpu"), True

    def __init__(self, rank, world_size):
        self.rank, self.world_size, self.rounds = rank, world_size, 0

    def gather(self, value):
        return [value]

    def agree(self, error):
        if error is not None:
            raise error

    def sum_or_stop(self):
        self.rounds += 1


@pytest.mark.parametrize(("count", "world"), [(10, 3), (2, 3), (7, 2), (1, 4)])
def test_every_question_is_answered_once_and_every_rank_makes_equally_many_rounds(
    count, world, lookup, monkeypatch
):
    engine, tokenizer = lookup
    questions = mixed(tokenizer, count - count // 3, count // 3)
    way, found, rounds = Generation(engine, tokenizer, "arithmetic", questions, 4), [], set()
    for rank in range(world):
        monkeypatch.setattr(engine, "comm", RankOf(rank, world))
        answer_questions(way, range(count), None, found.extend, batch_size=2)
        rounds.add(engine.comm.rounds)
    assert sorted(record["index"] for record in found) == list(range(count))
    assert len(rounds) == 1
    assert way.scores(found) == {"exact_match": (count - count // 3) / count}


def test_what_a_judge_raises_is_told_to_all_ranks_before_they_gather(lookup, monkeypatch):
    engine, tokenizer = lookup
    told = []

    class Told(RankOf):
        def agree(self, error):
            told.append(error)
            super().agree(error)

        def gather(self, value):
            assert not isinstance(value, list), "the others wait here for this rank"
            return [value]

    def broken(self, index, said):
        raise ArithmeticError("no such judge")

    way = Generation(engine, tokenizer, "arithmetic", mixed(tokenizer, 2, 1), 4)
    monkeypatch.setattr(engine, "comm", Told(0, 2))
    monkeypatch.setattr(Generation, "record", broken)
    with pytest.raises(ArithmeticError):
        answer_questions(way, range(3), None, told.extend)
    assert [type(error) for error in told] == [ArithmeticError]


# ---------------------------------------------------------------------- generated answers


def test_an_answer_ends_at_the_end_token_and_at_the_limit(lookup):
    questions = problems(lookup[1], [("a", "1"), ("f", "6")])
    assert outputs_of(lookup, questions, 1) == ["1", "6"]
    assert outputs_of(lookup, questions, 6) == ["1", "678967"]


def test_an_answer_ends_before_a_stop_text_and_generates_no_further(lookup, monkeypatch):
    questions = problems(lookup[1], [("f", "6"), ("a", "1")], stops=("89",))
    passes, forward = [], generation._Greedy._next_tokens
    monkeypatch.setattr(
        generation._Greedy, "_next_tokens", lambda self: passes.append(len(self.rows)) or forward(self)
    )
    assert outputs_of(lookup, questions, 50) == ["67", "1"]
    assert passes == [2, 2, 1, 1], "a row that is done is in no further pass"


def test_all_end_tokens_end_an_answer(lookup, monkeypatch):
    engine, tokenizer = lookup
    eight = tokenizer.encode("8")[0]
    monkeypatch.setattr(engine.module.generation_config, "eos_token_id", [eight, tokenizer.eos_token_id])
    assert end_tokens(engine.module, tokenizer) == {eight, tokenizer.eos_token_id}
    assert outputs_of(lookup, problems(tokenizer, [("f", "6")]), 50) == ["67"]


def test_the_end_of_turn_of_a_chat_template_ends_an_answer(lookup):
    questions = problems(lookup[1], [("f", "6")])
    nine = frozenset(lookup[1].encode("9"))
    assert outputs_of(lookup, replace(questions, ends=nine), 50) == ["678"]


@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen2"])
def test_answers_are_those_of_transformers(name, tmp_path):
    """Prompts of different length in one batch; gemma2 has a sliding window shorter than the prompts."""
    section = ModelSection(path=str(tiny_model_dir(name, tmp_path)), dtype="float32")
    tokenizer, (model, _) = load_tokenizer(section), load_model(section)
    generator = torch.Generator().manual_seed(5)
    prompts = [torch.randint(3, 300, (length,), generator=generator).tolist() for length in (12, 3, 25, 7)]
    model.generation_config.eos_token_id = None
    alone = [
        model.generate(torch.tensor([prompt]), max_new_tokens=9, do_sample=False)[0, len(prompt) :].tolist()
        for prompt in prompts
    ]
    assert generate(model, prompts, 9, set(), tokenizer.pad_token_id) == alone
    ends = {alone[0][2], alone[2][5]}  # rows leave at different times
    until = [answer[: next((i for i, t in enumerate(answer) if t in ends), 9)] for answer in alone]
    assert generate(model, prompts, 9, ends, tokenizer.pad_token_id) == until


def test_a_rank_that_is_done_goes_on_until_all_are(lookup):
    engine, tokenizer = lookup
    others = iter([True] * 5 + [False])  # until then another rank has rows left
    told = []

    def agree(goes_on):
        told.append(goes_on)
        return goes_on | next(others)

    prompt = tokenizer.encode("a")
    assert generate(engine.module, [prompt], 9, {tokenizer.eos_token_id}, 0, agree=agree) == [
        tokenizer.encode("1")
    ]
    assert told == [True, True, False, False, False, False]


# ---------------------------------------------------------------------- chosen answers


def choice(tokenizer, prompt, options, correct):
    tokens = tuple(tuple(tokenizer.encode(option)) for option in options)
    return Question(prompt, tokenizer.encode(prompt), options[correct], tokens, correct)


def test_likelihoods_are_those_of_the_whole_text(tmp_path):
    section = ModelSection(path=str(tiny_model_dir("gemma2", tmp_path)), dtype="float32")
    tokenizer, (model, _) = load_tokenizer(section), load_model(section)
    rows = [([5, 6, 7], [8]), ([9, 10], [11, 12, 13, 14]), ([20], [21, 22]), ([3], [])]
    for (prompt, option), found in zip(rows, option_likelihoods(model, rows, tokenizer.pad_token_id)):
        with torch.no_grad():
            logs = model(torch.tensor([prompt + option])).logits[0].log_softmax(-1)
        wanted = sum(float(logs[len(prompt) - 1 + i, token]) for i, token in enumerate(option))
        assert found == pytest.approx(wanted, abs=1e-4)
    assert option_likelihoods(model, [], tokenizer.pad_token_id) == []


def test_options_are_compared_by_their_sums_and_by_token(lookup):
    engine, tokenizer = lookup
    items = [
        choice(tokenizer, "a", ["1", "2"], 0),
        choice(tokenizer, "b", ["1", "2"], 0),
        choice(tokenizer, "c", ["2", "341"], 1),  # one of one token is unlikely, and two of three
    ]
    way = Likelihood(engine, tokenizer, "text", Questions(items, (), "here", 0, ""))
    with ready_to_answer(engine) as agree:
        records = [way.record(index, said) for index, said in zip([2, 0, 1], way.answer([2, 0, 1], agree))]
    assert [record["index"] for record in records] == [2, 0, 1]
    assert [record["output"] for record in records][1:] == ["1", "2"]
    for record in records:
        question = items[record["index"]]
        sums = record["log_likelihoods"]
        means = [total / len(option) for total, option in zip(sums, question.options)]
        assert record["right"] == (max(sums) == sums[question.correct])
        assert record["right_norm"] == (max(means) == means[question.correct])
    assert records[0]["right"] != records[0]["right_norm"]
    assert way.scores(records) == {"accuracy": 1 / 3, "accuracy_norm": 2 / 3}


def test_a_question_without_options_cannot_be_chosen(lookup):
    with pytest.raises(UserError, match="the task arithmetic has none to choose from"):
        Likelihood(*lookup, "arithmetic", mixed(lookup[1], 1, 0))
