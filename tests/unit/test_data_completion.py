"""Continued pretraining: every token of every text is learned once, in pieces that fit."""

import json
from types import SimpleNamespace

import pytest

from distlora.data.completion import CompletionRows, load_completion, pieces_of
from distlora.data.conventions import Conventions
from distlora.errors import UserError
from distlora.models.targets import IGNORE
from tests.tiny_models import tiny_tokenizer

TEXTS = ["Tom has 3 apples.", "Anna buys apples. " * 9, "x"]


def section(tmp_path, *rows, **more):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"fields": None, "template": None, "max_length": 16}
    return SimpleNamespace(task="completion", path=str(file), **(settings | more))


def texts(tmp_path, *found, **more):
    return section(tmp_path, *({"text": text} for text in found), **more)


@pytest.mark.parametrize("length", [2, 3, 7, 16, 1000])
@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_every_token_but_the_first_of_a_text_is_learned_once(tmp_path, name, length):
    tokenizer = tiny_tokenizer(name)
    encoded = load_completion(texts(tmp_path, *TEXTS, max_length=length), "train", tokenizer)
    start = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    documents = [
        [tokenizer.bos_token_id] * start
        + tokenizer(text, add_special_tokens=False)["input_ids"]
        + [tokenizer.eos_token_id]
        for text in TEXTS
    ]
    learned = [label for sample in encoded.samples for label in sample.labels if label != IGNORE]
    assert learned == [token for document in documents for token in document[1:]]
    for sample in encoded.samples:
        assert 2 <= len(sample.input_ids) <= length and sample.prompt_ids == []
        assert sample.labels == [IGNORE, *sample.input_ids[1:]]
    assert (encoded.documents, encoded.dropped) == (3, 0)
    assert encoded.cut == sum(len(document) > length for document in documents)


def test_pieces_follow_each_other_with_one_token_of_the_one_before():
    assert pieces_of([1, 2, 3, 4, 5], 3) == [[1, 2, 3], [3, 4, 5]]
    assert pieces_of([1, 2, 3, 4], 3) == [[1, 2, 3], [3, 4]]
    assert pieces_of([1, 2], 8) == [[1, 2]] and pieces_of([1], 8) == pieces_of([], 8) == []


def test_names_of_special_tokens_are_text(tmp_path):
    tokenizer = tiny_tokenizer("llama")
    end = tokenizer.eos_token
    encoded = load_completion(texts(tmp_path, f"a {end} b", max_length=100), "train", tokenizer)
    ids = encoded.samples[0].input_ids
    assert ids.count(tokenizer.eos_token_id) == 1 and ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(ids[:-1]).endswith(f"a {end} b")


def test_special_tokens_mean_themselves_where_the_recipe_says_so(tmp_path):
    tokenizer = tiny_tokenizer("llama")
    own, conventions = texts(tmp_path, f"a {tokenizer.eos_token} b"), Conventions(plain=False)
    ids = load_completion(own, "train", tokenizer, conventions).samples[0].input_ids
    assert ids.count(tokenizer.eos_token_id) == 2


def test_empty_texts_are_left_out_and_counted(tmp_path):
    encoded = load_completion(texts(tmp_path, "", "a", " \n"), "train", tiny_tokenizer("llama"))
    assert (encoded.documents, len(encoded.samples), encoded.dropped) == (1, 1, 2)
    with pytest.raises(UserError, match="no row of .* has a text"):
        load_completion(texts(tmp_path, "", " "), "train", tiny_tokenizer("llama"))


def test_the_column_may_be_another(tmp_path):
    own = section(tmp_path, {"body": "a"}, {"body": "b"}, fields={"text": "body"})
    assert list(CompletionRows(own, "train")) == ["a", "b"]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"template": "{text}"}, "data.template: the task completion learns texts as they are"),
        ({"template": "chat"}, "data.template: the task completion learns texts as they are"),
        ({"fields": {"txt": "body"}}, "data.fields: unknown name 'txt', did you mean text?"),
        ({"fields": {"prompt": "body"}}, "data.fields: unknown name 'prompt', wanted text"),
        ({"fields": {"text": "boddy"}}, "data.fields: text: .* no column 'boddy', did you mean body?"),
        ({}, "text of the task completion: .* has no column 'text'"),
    ],
)
def test_what_is_wrong_with_the_section(tmp_path, change, expected):
    with pytest.raises(UserError, match=expected):
        CompletionRows(section(tmp_path, {"body": "a"}, **change), "train")


@pytest.mark.parametrize("value", [None, float("nan"), ["a"], "\ud83d"])
def test_what_is_no_text_is_named(tmp_path, value):
    with pytest.raises(UserError, match="row 1 of .*, counted from 0, has .* in column 'text'"):
        list(CompletionRows(section(tmp_path, {"text": "a"}, {"text": value}), "train"))
