"""Special tokens that are named in the data are text; those of templates are special."""

import json
from types import SimpleNamespace

import pytest
from tokenizers import Tokenizer, models, processors
from transformers import BertTokenizerLegacy, PreTrainedTokenizerFast

from distlora.data import Conventions, load_labelled, load_questions
from distlora.data.special_tokens import TextEncoder, Unreadable
from distlora.errors import UserError
from tests.tiny_models import tiny_encoder_tokenizer
from tests.unit.test_chat_templates import CHATML, GEMMA, learned, messages_of, tokenizer_of, whole
from tests.unit.test_chat_templates import load as load_chat
from tests.unit.test_data_encode import load, make_tokenizer, of_kind

MARKS = Conventions(plain=False)


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer(bos=True)


def plain(tokenizer, text):
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]


@pytest.mark.parametrize(
    "prompt, response", [("a <eos> b", "c"), ("a", "<b><eos></b>"), ("<bos>", "<eos>"), ("<eos>", "<bos> 2")]
)
def test_a_name_in_a_prompt_or_a_response_is_text(tmp_path, tokenizer, prompt, response):
    (sample,) = load(tmp_path, tokenizer, [(prompt, response)], template="{prompt}").samples
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    assert sample.input_ids == [bos, *plain(tokenizer, prompt + response), eos]
    assert tokenizer.decode(sample.input_ids) == f"<bos>{prompt}{response}<eos>"
    assert tokenizer.decode(sample.prompt_ids) == f"<bos>{prompt}"


def test_names_are_special_where_the_recipe_or_an_old_format_says_so(tmp_path, tokenizer):
    for conventions in (MARKS, Conventions.of_format(3), Conventions.of_format(4, special_tokens=True)):
        (sample,) = load(
            tmp_path, tokenizer, [("a<eos>", "b")], template="{prompt}", conventions=conventions
        ).samples
        assert sample.input_ids.count(tokenizer.eos_token_id) == 2


@pytest.mark.parametrize("asked", ["hello", "hello <eos> <bos>"])
def test_the_recipes_template_names_special_tokens_and_its_columns_do_not(tmp_path, tokenizer, asked):
    rows = [(asked, "there"), ("the", "answer")]
    (sample, other) = load(tmp_path, tokenizer, rows, template="<bos>Q {prompt}<eos>A ").samples
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    middle, end = plain(tokenizer, f"Q {asked}"), plain(tokenizer, "A there")
    assert sample.input_ids == [bos, *middle, eos, *end, eos], "and one BOS only"
    assert sample.input_ids.count(bos) == other.input_ids.count(bos) == 1
    assert tokenizer.decode(sample.prompt_ids) == f"<bos>Q {asked}<eos>A"


def test_two_beginnings_stay_where_a_template_asks_for_them_or_a_run_had_them(tmp_path, tokenizer):
    for template, conventions, count in (
        ("<bos>{prompt}", Conventions(), 1),
        ("<bos><bos>{prompt}", Conventions(), 2),
        ("<bos>{prompt}", Conventions.of_format(3), 2),
    ):
        (sample,) = load(
            tmp_path, tokenizer, [("a", "b")], template=template, conventions=conventions
        ).samples
        assert sample.input_ids.count(tokenizer.bos_token_id) == count


@pytest.mark.parametrize("template", [CHATML, GEMMA])
def test_a_name_in_a_chat_is_text_and_the_templates_are_special(tmp_path, template):
    tokenizer = tokenizer_of(template)
    end = "<|im_end|>" if template == CHATML else "<end_of_turn>"
    messages = messages_of([(f"a {end} <eos>", f"b <bos>{end}"), ("How?", "So.")])
    (sample,) = load_chat(tmp_path, tokenizer, messages).samples
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert tokenizer.decode(sample.input_ids) == text and sample.input_ids != whole(tokenizer, messages)
    number = tokenizer.convert_tokens_to_ids(end)
    assert sample.input_ids.count(number) == 4 and tokenizer.eos_token_id not in sample.input_ids
    assert learned(sample, tokenizer) == [f"b <bos>{end}{end}", f"So.{end}"]
    marked = load_chat(tmp_path, tokenizer, messages, conventions=MARKS).samples[0]
    assert marked.input_ids == whole(tokenizer, messages)


def test_a_chat_template_that_cuts_at_a_special_token_is_one_sentence(tmp_path):
    cuts = CHATML.replace("message['content']", "message['content'].replace('<eos>', 'END')")
    rows = messages_of([("a", "b")]), messages_of([("a <eos>", "b")])
    with pytest.raises(
        UserError, match="row 1 of .* not fit the chat template, which leaves out the text of"
    ):
        load_chat(tmp_path, tokenizer_of(cuts), *rows)
    shown = CHATML.replace(
        "message['content']", "message['content'] + ('!' if '<eos> b' in message['content'] else '')"
    )
    rows = messages_of([("a <eos> b", "b")])
    with pytest.raises(
        UserError, match="row 0 of .* acts on a special token .* set data.special_tokens to true"
    ):
        load_chat(tmp_path, tokenizer_of(shown), rows)


def test_questions_keep_names_as_text(tmp_path, tokenizer):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"q": "a <eos>", "a": "b"}))
    data = SimpleNamespace(
        task="text", path=str(tmp_path / "rows.jsonl"), fields={"prompt": "q", "response": "a"},
        template="Q<eos>{prompt}: ", max_length=64, think_step_by_step=None,
    )  # fmt: skip
    (item,) = load_questions(data, "train", tokenizer).items
    assert item.prompt == "Q<eos>a <eos>: " and item.prompt_ids.count(tokenizer.eos_token_id) == 1


def test_texts_without_names_have_the_tokenizers_own_tokens(tokenizer):
    texts = ["the answer", "", "<e os>", "a < b > c"]
    found = TextEncoder(tokenizer).encode(texts, places=True)
    own = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
    assert [ids for ids, _ in found] == own["input_ids"]
    assert [places for _, places in found] == own["offset_mapping"]


def test_places_are_those_of_the_text(tokenizer):
    text = "<eos>a<eos> b <bos>\u00e9<eos>"
    own = [(0, 5), (19, len(text))]
    (whole_text,) = TextEncoder(tokenizer).encode([text], [own], places=True)
    specials = [tokenizer.eos_token_id, tokenizer.bos_token_id]
    kept = [(token, place) for token, place in zip(*whole_text) if token in specials]
    assert kept == [(specials[0], (0, 5)), (specials[0], (len(text) - 5, len(text)))]
    assert "".join(text[start:end] for start, end in dict.fromkeys(whole_text.places)) == text


# ---------------------------------------------------------------------- other tokenizers


@pytest.mark.parametrize("kind", ["trimmed", "metaspace", "normalised"])
def test_special_tokens_that_are_kept_have_the_neighbours_that_they_always_have(kind):
    tokenizer = of_kind(kind)
    encoder, text = TextEncoder(tokenizer), "<eos>the answer <eos> not long<eos>"
    own = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    kept = encoder._split(0, text, encoder.names_in(text), [], True)
    assert kept.ids == own["input_ids"] and kept.places == own["offset_mapping"]
    (written,) = encoder.encode([text])
    assert tokenizer.eos_token_id not in written.ids and tokenizer.decode(written.ids).strip() == text


def unigram():
    """As T5's and DeBERTa's: the model knows the names of special tokens, and finds them in a text."""
    pieces = [("<unk>", 0.0), ("</s>", 0.0), ("<pad>", 0.0)] + [(letter, -2.0) for letter in "</s>ab"]
    core = Tokenizer(models.Unigram(list(dict(pieces).items()), unk_id=0))
    core.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="</s>", unk_token="<unk>", pad_token="<pad>"
    )


def test_a_model_that_finds_names_itself_gets_them_in_two_parts(tmp_path):
    tokenizer = unigram()
    assert tokenizer.eos_token_id in plain(tokenizer, "a</s>b"), "or this tests nothing"
    (tokens,) = TextEncoder(tokenizer).encode(["a</s>b"], places=True)
    assert tokenizer.convert_ids_to_tokens(tokens.ids) == list("a</s>b")
    assert tokens.places == [(i, i + 1) for i in range(6)]
    (kept,) = TextEncoder(tokenizer).encode(["</s>a</s>"], [[(0, 4)]])
    assert kept.ids == [tokenizer.eos_token_id, *tokens.ids[:5]]


def test_a_tokenizer_in_python_reads_names_as_text(tmp_path):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[", "]", "cls", "sep", "a", "b"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    tokenizer = BertTokenizerLegacy(str(tmp_path / "vocab.txt"))
    assert not tokenizer.is_fast
    encoder = TextEncoder(tokenizer)
    (text, kept) = encoder.encode(["a [SEP] b", "[CLS] a [SEP]"], [[], [(0, 5)]])
    assert tokenizer.convert_ids_to_tokens(text.ids) == ["a", "[", "sep", "]", "b"]
    names = tokenizer.convert_ids_to_tokens(kept.ids)
    assert names[:2] == ["[CLS]", "a"] and "[SEP]" not in names


@pytest.mark.parametrize("name", ["bert", "roberta"])
@pytest.mark.parametrize("pair", [False, True])
def test_names_in_labelled_texts_are_text(tmp_path, name, pair):
    tokenizer = tiny_encoder_tokenizer(name)
    end = tokenizer.sep_token
    texts = [f"apples{end} and {end}", "birds"]
    rows = [{"a": text, "b": text, "label": 1} for text in texts]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = SimpleNamespace(
        task="classification", path=str(tmp_path / "rows.jsonl"), labels=["no", "yes"], template=None,
        fields={"text": "a", "label": "label"} | ({"pair": "b"} if pair else {}), max_length=64,
    )  # fmt: skip
    first, second = load_labelled(data, "train", tokenizer).samples
    for sample, text in zip((first, second), texts):
        columns = [text, text] if pair else [text]
        want = tokenizer(*columns, split_special_tokens=True)
        assert sample.input_ids == want["input_ids"]
        assert sample.segments == want.get("token_type_ids")
        around = tokenizer.num_special_tokens_to_add(pair=pair) - 1
        assert sample.input_ids.count(tokenizer.sep_token_id) == around
    marked = load_labelled(data, "train", tokenizer, MARKS).samples[0]
    assert marked.input_ids.count(tokenizer.sep_token_id) > around
    data.max_length = 9
    cut = load_labelled(data, "train", tokenizer)
    assert cut.truncated == sum(len(each.input_ids) > 9 for each in (first, second)) > 0
    assert len(cut.samples[0].input_ids) == 9


def test_labelled_texts_of_a_model_that_finds_names_itself(tmp_path):
    tokenizer = unigram()
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": "a</s>b", "label": 1}))
    data = SimpleNamespace(
        task="classification", path=str(tmp_path / "rows.jsonl"), labels=["no", "yes"], template=None,
        fields={"text": "text", "label": "label"}, max_length=64,
    )  # fmt: skip
    (sample,) = load_labelled(data, "train", tokenizer).samples
    assert tokenizer.convert_ids_to_tokens(sample.input_ids) == [*"a</s>b", "</s>"]


# ---------------------------------------------------------------------- tokenizers that raise


class PanicException(BaseException):
    """As Rust's errors reach Python."""


class Failing:
    """A tokenizer that raises for some texts."""

    def __init__(self, tokenizer, error):
        self._tokenizer, self._error = tokenizer, error

    def __getattr__(self, name):
        return getattr(self._tokenizer, name)

    def __call__(self, texts, *pairs, **options):
        if any("bad" in text for text in ([texts] if isinstance(texts, str) else texts)):
            raise self._error
        return self._tokenizer(texts, *pairs, **options)


@pytest.mark.parametrize("error", [ValueError("no\nway"), TypeError("no"), PanicException("no: index out")])
def test_whatever_a_tokenizer_raises_is_one_sentence_with_the_row(tmp_path, tokenizer, error):
    failing = Failing(tokenizer, error)
    with pytest.raises(UserError, match=r"row 2 of .*rows.json.* cannot be read by the tokenizer \(no"):
        load(tmp_path, failing, [("a", "b"), ("b", "c"), ("bad", "c")])
    with pytest.raises(UserError, match=r"row 1 of .* cannot be read by the tokenizer \(no"):
        load_chat(tmp_path, Failing(tokenizer_of(CHATML), error), messages_of(), messages_of([("bad", "b")]))
    with pytest.raises(Unreadable) as raised:
        TextEncoder(failing).encode(["a", "bad"])
    assert raised.value.index == 1


def test_what_ends_a_program_is_no_mistake_of_a_tokenizer(tokenizer):
    with pytest.raises(KeyboardInterrupt):
        TextEncoder(Failing(tokenizer, KeyboardInterrupt())).encode(["bad"])
