"""docs/models.md says of every class of models what a tiny one of it does."""

import re

import pytest

from tests.model_matrix.columns import COLUMNS, YES, trains
from tests.model_matrix.ranks import cell
from tests.model_matrix.table import COMMAND, DOCUMENT, matrix, page

#: Classes that differ in how they are adapted: a wrapper, experts, transposed weights, a weight that is read
#: without a call, an encoder, images.
DIFFERENT = ("llama", "gemma3", "mixtral+experts", "gpt2", "mamba", "deberta", "vit")


def rows_of(text: str) -> dict[str, list[str]]:
    """The cells of every row by the model's name, with the notes in place of their numbers."""
    notes = dict(re.findall(r"^(\d+)\. (.+)$", text, re.MULTILINE))
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    rows = [line for line in lines if len(line) == 2 + len(COLUMNS)]
    return {
        name: [re.sub(r"(?<=\()\d+(?=\))", lambda found: notes[found[0]], cell) for cell in cells]
        for name, _, *cells in rows
    }


def test_rows_of_different_classes_say_what_is_found():
    found, said = rows_of(page(matrix(DIFFERENT))), rows_of(DOCUMENT.read_text())
    assert len(found) == 1 + len(DIFFERENT) and found == {name: said[name] for name in found}


@pytest.mark.long
def test_the_table_of_models_says_what_is_found(tmp_path):
    found = page(matrix())
    (tmp_path / "models.md").write_text(found)
    if found != DOCUMENT.read_text():
        pytest.fail(
            f"docs/models.md is not what {tmp_path / 'models.md'} is; write it anew: {COMMAND}", pytrace=False
        )


def test_what_is_no_yes_is_explained_once_below_the_table():
    refused = {"all-linear": "refused: too small"}
    good = dict.fromkeys(COLUMNS, YES)
    lines = page({"llama": good, "opt": refused, "gpt2": refused | {"loss": "no: off by 2"}}).splitlines()
    rows = [line for line in lines if line.startswith("| ") and "model" in line][-3:]
    assert [row.split(" | ")[2:4] for row in rows] == [
        ["yes", "yes"],
        ["refused (1)", "–"],
        ["refused (1)", "no (2)"],
    ]
    assert lines[-2:] == ["1. too small", "2. off by 2"]


def test_a_tensor_that_never_had_a_gradient_does_not_train():
    assert trains(set(), [2.0, 1.0]) == YES
    assert trains(set(), [1.0, 2.0]) == "no: the loss goes from 1.0000 to 2.0000"
    found = trains({"layers.0.q.A", "layers.1.q.A"}, [2.0, 1.0])
    assert found == "no: without a gradient in 2 steps: layers.*.q.A (2 layers)"


@pytest.mark.parametrize(
    ("losses", "said"),
    [
        ([2.0, 1.0], YES),
        ([2.0, 1.1], "no: the losses differ by 1.0e-01"),
        ("no: the ranks ended before", None),
    ],
)
def test_losses_of_two_ranks_are_held_to_those_of_one_process(losses, said):
    assert cell(losses, [2.0, 1.0]) == (said or losses)
