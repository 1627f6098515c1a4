"""Tokens and models that do not fit each other: vocabularies in other files, ids without an embedding, and
padding that the config does not know.
"""

import json
from fnmatch import fnmatch

import pytest
import sentencepiece
import torch
from transformers import (
    AlbertConfig,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    T5Config,
    XLMRobertaConfig,
)

from distlora.data import LabelledSample, Question, Questions, collate_labelled
from distlora.errors import UserError
from distlora.models.hub import VOCABULARY_FILES, WANTED_FILES
from distlora.models.loading import load_model, load_tokenizer
from distlora.models.losses import label_logits
from distlora.recipe.load import load_recipe
from distlora.recipe.sections import ModelSection
from distlora.training.objective import objective_of
from distlora.training.train import check_run
from tests.tiny_models import VOCAB_SIZE, _draw_parameters, tiny_model_dir, tiny_tokenizer
from tests.tiny_zoo import zoo_model_dir

LABELS = ("red", "green", "blue")


def section(directory) -> ModelSection:
    return ModelSection(path=str(directory), dtype="float32", gradient_checkpointing=False)


def objective(directory, folder, task="text", **data):
    """What a recipe of this task asks of the model."""
    rows = [
        {"prompt": f"What is {n}?", "response": "It is 4", "text": "It is", "label": n % 2} for n in range(4)
    ]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    content = {
        "model": {"path": str(directory), "dtype": "float32", "gradient_checkpointing": False},
        "method": {"name": "lora", "rank": 4},
        "data": {"task": task, "path": str(folder / "rows.jsonl"), "max_length": 32} | data,
        "train": {"steps": 1},
        "output_dir": str(folder / "run"),
    }
    (folder / "recipe.yaml").write_text(json.dumps(content))
    return objective_of(load_recipe(folder / "recipe.yaml"))


# ---------------------------------------------------------------------- files


@pytest.mark.parametrize(
    "name",
    [
        "spm.model", "spiece.model", "sentencepiece.bpe.model", "tokenizer.model", "tokenizer.model.v3",
        "qwen.tiktoken", "source.spm", "vocab.bpe", "bpe.codes",
    ],
)  # fmt: skip
def test_vocabularies_are_fetched_under_all_their_names(name):
    assert any(fnmatch(name, pattern) for pattern in VOCABULARY_FILES)
    assert set(VOCABULARY_FILES) <= set(WANTED_FILES)


@pytest.mark.parametrize(
    ("config", "file", "tokenizer", "pieces", "shift", "ends"),
    [
        (T5Config, "spiece.model", "T5Tokenizer", ("<pad>", "</s>", "<unk>"), 0, ([], [1])),
        (
            AlbertConfig, "spiece.model", "AlbertTokenizer", ("<pad>", "<unk>", "[CLS]", "[SEP]"), None,
            ([2], [3]),
        ),
        (
            XLMRobertaConfig, "sentencepiece.bpe.model", "XLMRobertaTokenizer", ("<unk>", "<s>", "</s>"), 1,
            ([0], [2]),
        ),
        (LlamaConfig, "tokenizer.model", "LlamaTokenizer", ("<unk>", "<s>", "</s>"), 0, ([], [])),
    ],
)  # fmt: skip
def test_a_vocabulary_alone_is_a_tokenizer(tmp_path, config, file, tokenizer, pieces, shift, ends):
    """As T5, ALBERT, XLM-R and Llama were published; `shift` is how far XLM-R's ids lie from the file's."""
    (tmp_path / "texts").write_text("Tom has three apples and buys four more. How many apples?\n" * 20)
    names = {"<pad>": "pad", "</s>": "eos", "[SEP]": "eos", "<unk>": "unk", "<s>": "bos", "[CLS]": "bos"}
    roles = {"pad_id": -1, "bos_id": -1}
    for number, piece in enumerate(pieces):
        roles |= {f"{names[piece]}_id": number, f"{names[piece]}_piece": piece}
    prefix = tmp_path / "trained"
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "texts"),
        model_prefix=str(prefix),
        vocab_size=28,
        model_type="bpe" if config is LlamaConfig else "unigram",
        minloglevel=2,
        **roles,
    )
    prefix.with_suffix(".model").rename(tmp_path / file)
    config(vocab_size=64).save_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": tokenizer, "extra_ids": 0})
    )
    found = load_tokenizer(section(tmp_path))
    ids = found("Tom buys apples")["input_ids"]
    before, after = ends
    if shift is not None:
        own = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / file)).encode("Tom buys apples")
        assert ids == [*before, *(number + shift for number in own), *after]
    assert found.decode(ids, skip_special_tokens=True).lower().replace(" ", "") == "tombuysapples"


# ---------------------------------------------------------------------- ids


@pytest.fixture
def grown(tmp_path):
    """A model whose tokenizer has got a token more than the embedding has rows, which ends its texts."""
    directory = tiny_model_dir("llama", tmp_path)
    tokenizer = tiny_tokenizer("llama")
    tokenizer.add_tokens([f"<extra {i}>" for i in range(VOCAB_SIZE - len(tokenizer))])
    tokenizer.add_special_tokens({"eos_token": "<|im_end|>"})
    assert tokenizer.eos_token_id == VOCAB_SIZE
    tokenizer.save_pretrained(directory)
    return directory


SENTENCE = f"the token '<|im_end|>' with the id {VOCAB_SIZE}, and the model's embedding has {VOCAB_SIZE} rows"


def test_an_end_token_without_an_embedding_is_refused(grown, tmp_path):
    """It follows every response."""
    responses = objective(
        grown, tmp_path, fields={"prompt": "prompt", "response": "response"}, template="{prompt}"
    )
    tokenizer = load_tokenizer(section(grown))
    samples = responses.read("train", tokenizer).samples
    with pytest.raises(UserError) as caught:
        responses.check_samples(samples, tokenizer)
    assert SENTENCE in str(caught.value)


def test_ids_without_an_embedding_in_texts_and_prompts_are_refused(grown, tmp_path):
    tokenizer = load_tokenizer(section(grown))
    labels = objective(
        grown, tmp_path, "classification", labels=["no", "yes"], fields={"text": "text", "label": "label"}
    )
    with pytest.raises(UserError) as caught:
        labels.check_samples([LabelledSample([5, VOCAB_SIZE, 6], None, 0)], tokenizer)
    assert SENTENCE in str(caught.value)
    labels.check_samples([LabelledSample([5, VOCAB_SIZE - 1, 6], None, 0)], tokenizer)
    for question in (
        Question("?", [5, VOCAB_SIZE], "1"),
        Question("?", [5], "1", options=((6,), (VOCAB_SIZE,)), correct=0),
    ):
        with pytest.raises(UserError) as caught:
            labels.check_questions(Questions([question], (), "rows", 0, ""), tokenizer, 4)
        assert SENTENCE in str(caught.value)


# ---------------------------------------------------------------------- positions


@pytest.mark.parametrize("name", ["opt", "gpt_neo", "gpt_bigcode"])
def test_texts_beyond_a_table_of_positions_are_refused(tmp_path, name):
    """Before anything is loaded: the weights are not there."""
    directory = zoo_model_dir(name, tmp_path)
    (directory / "model.safetensors").unlink()
    fields = {"prompt": "prompt", "response": "response"}
    for length, is_refused in ((128, False), (129, True)):
        made = objective(directory, tmp_path, fields=fields, template="{prompt}", max_length=length)
        if is_refused:
            with pytest.raises(UserError, match="data.max_length=129 is beyond the 128 positions of"):
                check_run(made.recipe, 1, None)
        else:
            check_run(made.recipe, 1, None)


def test_a_sample_beyond_the_positions_is_refused_whatever_made_it(tmp_path):
    """An evaluation may have another length than the run."""
    directory = zoo_model_dir("bert", tmp_path)
    fields = {"text": "text", "label": "label"}
    made = objective(
        directory, tmp_path, "classification", labels=["no", "yes"], fields=fields, max_length=80
    )
    tokenizer = load_tokenizer(section(directory))
    made.check_samples([LabelledSample([9] * 64, None, 0)], tokenizer)
    with pytest.raises(UserError, match="data.max_length=80 is beyond the 64 positions of"):
        made.check_samples([LabelledSample([9] * 65, None, 0)], tokenizer)


def test_answers_that_could_run_over_the_end_are_refused(tmp_path):
    made = objective(zoo_model_dir("gpt2", tmp_path), tmp_path)
    asked = Questions([Question("?", [5] * 100, "1"), Question("?", [5], "1")], (), "rows", 0, "")
    made.check_questions(asked, None, 28)
    with pytest.raises(
        UserError, match="max_new_tokens=29: with a prompt of 100 tokens that is beyond the 128"
    ):
        made.check_questions(asked, None, 29)


def test_options_that_run_over_the_end_are_refused_where_they_are_read(tmp_path):
    made = objective(zoo_model_dir("gpt2", tmp_path), tmp_path)
    options = Question("?", [5] * 100, "1", options=((6,), (7,) * 29), correct=0)
    asked = Questions([Question("?", [5] * 110, "1", options=((6,),), correct=0), options], (), "rows", 0, "")
    made.check_questions(asked, None, 4)
    with pytest.raises(UserError, match="a prompt of 100 tokens and its option of 29 are beyond the 128"):
        made.check_questions(asked, None, None)
    shorter = Question("?", [5] * 99, "1", options=((7,) * 29,), correct=0)
    made.check_questions(Questions([shorter], (), "rows", 0, ""), None, None)


# ---------------------------------------------------------------------- padding


def test_a_model_that_looks_for_ends_is_not_padded_with_them(tmp_path):
    directory = zoo_model_dir("bart", tmp_path)
    fields = {"text": "text", "label": "label"}
    made = objective(directory, tmp_path, "classification", labels=["no", "yes"], fields=fields)
    tokenizer, samples = load_tokenizer(section(directory)), [LabelledSample([5, 6, 2], None, 0)]
    made.check_samples(samples, tokenizer)
    tokenizer.pad_token = tokenizer.eos_token
    with pytest.raises(UserError, match="the tokenizer pads with .*BartForSequenceClassification looks for"):
        made.check_samples(samples, tokenizer)


def gpt2_dir(directory, tokenizer, pad):
    sizes = dict(vocab_size=VOCAB_SIZE, n_positions=64, n_embd=60, n_layer=2, n_head=6, pad_token_id=pad)
    model = GPT2ForSequenceClassification(GPT2Config(**sizes, num_labels=3))
    _draw_parameters(model, torch.Generator().manual_seed(4))
    model.save_pretrained(directory)
    tiny_tokenizer(tokenizer).save_pretrained(directory)
    return directory


@pytest.mark.parametrize("pad", [None, 0, 300])
@pytest.mark.parametrize("tokenizer", ["llama", "qwen2"])
def test_a_decoder_classifies_a_text_alike_whatever_else_is_in_the_batch(tmp_path, pad, tokenizer):
    """Whether the config names no padding, another one than the tokenizer, or the same; and with the end
    token as padding (llama), also if a text contains it."""
    directory = gpt2_dir(tmp_path, tokenizer, pad)
    model, _ = load_model(section(directory), LABELS)
    own = load_tokenizer(section(directory)).pad_token_id
    texts = [[9, 10, own, 11, 12], [20, 300, 21, 0, 22, 23, 24], [30, 31]]
    rows = [LabelledSample(ids, None, 0) for ids in texts]
    with torch.no_grad():
        together = label_logits(model, collate_labelled(rows, own))
        hidden = [model.transformer(input_ids=torch.tensor([ids])).last_hidden_state[:, -1] for ids in texts]
        torch.testing.assert_close(together, torch.cat([model.score(last) for last in hidden]))


def test_an_encoder_keeps_the_padding_of_its_config(tmp_path):
    """RoBERTa counts positions from behind it."""
    directory = zoo_model_dir("roberta", tmp_path)
    tokenizer = load_tokenizer(section(directory))
    tokenizer.pad_token = "Ġ"
    tokenizer.save_pretrained(directory)
    assert load_tokenizer(section(directory)).pad_token_id != 1
    model, _ = load_model(section(directory), LABELS)
    assert model.config.pad_token_id == 1 == model.get_input_embeddings().padding_idx
