"""Samples: which tokens, which labels, what is cut and what is dropped."""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from distlora.data import Conventions, load_split
from distlora.errors import UserError
from distlora.models.targets import IGNORE

DATA = Path(os.environ.get("DISTLORA_TEST_DATA", "../shared/data"))
TEXTS = ["Q: 1+1?\nAnswer: 2", "the answer is not long\n", "<user> hello <bot> hi there", "0123456789"] * 9


def make_tokenizer(bos=False, **options):
    """A byte-level BPE tokenizer that pads with its <eos>, as SmolLM2's; with `bos` it starts every text, as
    Llama's.
    """
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<eos>", "<bos>"]
    trainer = trainers.BpeTrainer(
        vocab_size=340, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(TEXTS, trainer)
    if bos:
        core.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<eos>", pad_token="<eos>", bos_token="<bos>", **options
    )


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def load(tmp_path, tokenizer, pairs, template=None, max_length=64, split="train", **more):
    file = tmp_path / "rows.json"
    file.write_text(json.dumps([{"q": prompt, "a": response} for prompt, response in pairs]))
    fields = {"prompt": "q", "response": "a"}
    section = SimpleNamespace(
        task="text", path=str(file), fields=fields, template=template, max_length=max_length
    )
    return load_split(section, split, tokenizer, **more)


def trained_text(sample, tokenizer):
    return tokenizer.decode([label for label in sample.labels if label != IGNORE])


def test_loss_is_on_the_response_and_the_real_end_only(tmp_path, tokenizer):
    encoded = load(tmp_path, tokenizer, [("Q: 1+1?\n", "2 <eos> 3"), ("the", "answer")])
    first, second = encoded.samples
    assert tokenizer.decode(first.input_ids) == "Q: 1+1?\n2 <eos> 3<eos>"
    assert trained_text(first, tokenizer) == "2 <eos> 3<eos>"
    assert trained_text(second, tokenizer) == " answer<eos>"
    for sample in encoded.samples:
        assert len(sample.labels) == len(sample.input_ids)
        assert sample.input_ids[: len(sample.prompt_ids)] == sample.prompt_ids
        assert sample.labels == [IGNORE] * len(sample.prompt_ids) + sample.input_ids[len(sample.prompt_ids) :]
        assert sample.labels[-1] == tokenizer.eos_token_id == tokenizer.pad_token_id
    assert (encoded.truncated, encoded.dropped) == (0, 0)
    assert second.answer == "answer"


#: Prompt, response, and the text of the prompt that generation is given: a token that spans the seam belongs
#: to the response.
SEAMS = [
    ("a\n", "\nb", "a\n"),
    ("hel", "lo", "he"),
    ("the ", " answer", "the "),
    ("the ", "answer", "the"),
    ("x", "y\u20ac", "x"),
    ("not lo", "ng", "not"),
]


@pytest.mark.parametrize("prompt, response, given", SEAMS)
def test_the_whole_text_is_tokenised_as_it_is_written(tmp_path, tokenizer, prompt, response, given):
    (sample,) = load(tmp_path, tokenizer, [(prompt, response)], template="{prompt}").samples
    assert sample.input_ids == [*tokenizer(prompt + response)["input_ids"], tokenizer.eos_token_id]
    assert tokenizer.decode(sample.prompt_ids) == given
    assert trained_text(sample, tokenizer) == (prompt + response)[len(given) :] + "<eos>"


@pytest.mark.parametrize("template, between", [(None, " "), ("{prompt}", ""), ("{prompt}:", ":")])
def test_only_a_tasks_own_template_puts_a_space_before_the_response(tmp_path, tokenizer, template, between):
    def texts(*pairs):
        samples = load(tmp_path, tokenizer, pairs, template=template).samples
        return [tokenizer.decode(sample.input_ids[:-1]) for sample in samples]

    assert texts(("the", "answer"), ("", "answer")) == [
        f"the{between}answer",
        f"{between.strip()}answer",
    ]
    assert texts(("Q\n", "a"), ("Q", "\na")) == [f"Q\n{between.strip()}a", f"Q{between.strip()}\na"]


def of_kind(kind):
    """Tokenizers that tell where their tokens stand in other ways: RoBERTa's leaves white space out of a
    token's place, Llama-2's and Gemma's put a sign before the text that is not in it.
    """
    fallback, alphabet = [f"<0x{byte:02X}>" for byte in range(256)], []
    core = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    if kind == "trimmed":
        core = Tokenizer(models.BPE())
        core.pre_tokenizer, core.decoder = (
            pre_tokenizers.ByteLevel(add_prefix_space=False),
            decoders.ByteLevel(),
        )
        core.post_processor = processors.ByteLevel(trim_offsets=True)
        fallback, alphabet = [], pre_tokenizers.ByteLevel.alphabet()
    elif kind == "metaspace":
        core.pre_tokenizer, core.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    else:
        marks = [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
        core.normalizer = normalizers.Sequence(marks)
        plain = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
        core.decoder = decoders.Sequence([*plain, decoders.Strip(" ", 1, 0)])
    special = ["<eos>", "<unk>", *fallback]
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(TEXTS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", pad_token="<eos>")


@pytest.mark.parametrize("kind", ["trimmed", "metaspace", "normalised"])
@pytest.mark.parametrize(
    "prompt, response",
    [
        ("Q:\n", "the"),
        ("Answer: ", "2"),
        ("hi", " there"),
        ("not ", "long"),
        ("hi  ", " 2"),
        ("hi", "\u20ac"),
    ],
)
def test_the_prompt_has_the_tokens_that_end_within_it_whatever_a_tokenizer_calls_their_place(
    tmp_path, kind, prompt, response
):
    tokenizer = of_kind(kind)
    (sample,) = load(tmp_path, tokenizer, [(prompt, response)], template="{prompt}").samples
    ids, length = sample.input_ids, len(sample.prompt_ids)
    assert ids == [*tokenizer(prompt + response)["input_ids"], tokenizer.eos_token_id]
    assert prompt.startswith(tokenizer.decode(ids[:length]))
    assert not prompt.startswith(tokenizer.decode(ids[: length + 1]))


class WithoutOffsets:
    """A tokenizer that does not tell where its tokens stand."""

    is_fast = False

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer

    def __getattr__(self, name):
        return getattr(self._tokenizer, name)

    def __call__(self, texts, **options):
        assert "return_offsets_mapping" not in options
        return self._tokenizer(texts, **options)


@pytest.mark.parametrize("prompt, response, given", SEAMS)
def test_a_tokenizer_without_offsets_trains_the_same_text(tmp_path, tokenizer, prompt, response, given):
    (sample,) = load(tmp_path, WithoutOffsets(tokenizer), [(prompt, response)], template="{prompt}").samples
    (fast,) = load(tmp_path, tokenizer, [(prompt, response)], template="{prompt}").samples
    assert sample.input_ids == fast.input_ids
    assert given.startswith(tokenizer.decode(sample.prompt_ids))


#: Prompt, response, and what the formats 1 and 2 trained of them.
APART = [
    ("the ", "answer", "answer"),
    ("the", "answer", " answer"),
    ("not lo", "ng", " ng"),
    ("the\n", "answer", "answer"),
    ("Q", "\nA", "\nA"),
]


@pytest.mark.parametrize("prompt, response, trained", APART)
@pytest.mark.parametrize("template", [None, "{prompt}"])
def test_runs_of_the_formats_1_and_2_keep_their_tokens(
    tmp_path, tokenizer, template, prompt, response, trained
):
    (sample,) = load(
        tmp_path, tokenizer, [(prompt, response)], template, conventions=Conventions.of_format(2)
    ).samples
    alone = tokenizer(prompt)["input_ids"]
    assert sample.prompt_ids == alone
    assert sample.input_ids[len(alone) :] == [*tokenizer(trained)["input_ids"], tokenizer.eos_token_id]


def test_bos_is_there_exactly_if_the_tokenizer_adds_it(tmp_path, tokenizer):
    assert load(tmp_path, tokenizer, [("Q", "2")]).samples[0].input_ids[0] != tokenizer.bos_token_id
    with_bos = make_tokenizer(bos=True)
    (sample,) = load(tmp_path, with_bos, [("Q", "2")]).samples
    assert sample.prompt_ids == with_bos("Q")["input_ids"]
    assert sample.input_ids.count(with_bos.bos_token_id) == 1


def test_truncation_and_dropping_are_counted_apart(tmp_path, tokenizer):
    pairs = [("the", "answer"), ("the", "answer is not long"), ("the answer is not long " * 3, "2")]
    lengths = [len(sample.input_ids) for sample in load(tmp_path, tokenizer, pairs).samples]
    encoded = load(tmp_path, tokenizer, pairs, max_length=lengths[0])
    assert (len(encoded.samples), encoded.truncated, encoded.dropped) == (2, 1, 1)
    whole, cut = encoded.samples
    assert whole.labels[-1] == tokenizer.eos_token_id
    assert len(cut.input_ids) == lengths[0] and cut.labels[-1] not in (IGNORE, tokenizer.eos_token_id)


def test_prompt_that_fills_the_length_leaves_no_response(tmp_path, tokenizer):
    (sample,) = load(tmp_path, tokenizer, [("the answer", "2")]).samples
    length = len(sample.prompt_ids)
    assert len(load(tmp_path, tokenizer, [("the answer", "2")], max_length=length + 1).samples) == 1
    with pytest.raises(UserError, match="none of the 1 samples .* within"):
        load(tmp_path, tokenizer, [("the answer", "2")], max_length=length)


def test_first_token_has_no_loss_even_without_a_prompt(tmp_path, tokenizer):
    (sample,) = load(tmp_path, tokenizer, [("", "the answer")]).samples
    assert sample.prompt_ids == [] and sample.labels == [IGNORE] + sample.input_ids[1:]


def test_chunks_do_not_show(tmp_path, tokenizer, monkeypatch):
    pairs = [(f"Q: {i}", str(i)) for i in range(10)]
    whole = load(tmp_path, tokenizer, pairs)
    monkeypatch.setattr("distlora.data.encode.CHUNK", 3)
    assert load(tmp_path, tokenizer, pairs) == whole and len(whole.samples) == 10
    assert load(tmp_path, tokenizer, pairs, split="train[2:5]").samples == whole.samples[2:5]


CHAT_TEMPLATE = (
    "<bos>{% for m in messages %}<{{m.role}}> {{m.content}} {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)


def test_chat_template_of_the_tokenizer(tmp_path):
    tokenizer = make_tokenizer(bos=True, chat_template=CHAT_TEMPLATE)
    (sample,) = load(tmp_path, tokenizer, [("hello", "hi there")], template="chat").samples
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi there"}], tokenize=False
    )
    assert tokenizer.decode(sample.input_ids) == f"{text}<eos>", "one BOS, the template's own"
    assert trained_text(sample, tokenizer) == " hi there <eos>"


def test_missing_chat_template_and_missing_eos_are_errors(tmp_path, tokenizer):
    with pytest.raises(UserError, match="data.template: the tokenizer has no chat template"):
        load(tmp_path, tokenizer, [("a", "b")], template="chat")
    endless = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(UserError, match="set its eos_token"):
        load(tmp_path, endless, [("a", "b")])


@pytest.mark.skipif(not DATA.is_dir(), reason=f"no real data in {DATA}")
@pytest.mark.parametrize(
    "task, path, rows, first_answer",
    [
        ("gsm8k", "gsm8k", 7473, "72"),
        ("metamath", "metamathqa_sample/sample.jsonl", 10, "91"),
        ("instruct", "math_instructions/math_data.json", 3260, "4.0"),
        ("commonsense", "commonsense/boolq", 9427, "true"),
    ],
)
def test_presets_read_the_real_files(tokenizer, task, path, rows, first_answer):
    section = SimpleNamespace(task=task, path=str(DATA / path), fields=None, template=None, max_length=4096)
    encoded = load_split(section, "train[:200]", tokenizer)
    assert len(encoded.samples) == min(rows, 200) and encoded.dropped == 0
    assert encoded.samples[0].answer == first_answer
    assert all(sample.answer for sample in encoded.samples)
