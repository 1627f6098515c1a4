"""A search for the learning rate that meets bad rows, or bad rates, says which."""

import math

import pytest

from distlora.errors import TrainingError
from distlora.training import train
from distlora.training.objective import Responses
from distlora.training.rate_search import told_of_rows
from tests.unit import test_bad_steps

model, recipe, ALONE = test_bad_steps.model, test_bad_steps.recipe, test_bad_steps.ALONE
WORDS = ["method={name: lora, rank: 2}", "train.lr=search", "train.steps=2", "train.global_batch_size=1"]


@pytest.fixture
def bad_token(monkeypatch):
    """Makes the loss of rows with a text no number; they are known by their tokens."""

    def mark(row: int, value: float) -> None:
        loss = Responses.loss

        def poisoned(model, batch, weights=None):
            total, count = loss(model, batch, weights)
            wanted = [list(each) for each in batch["labels"].tolist()]
            return (total * value if any(_is_of(each, row) for each in wanted) else total), count

        monkeypatch.setattr(Responses, "loss", staticmethod(poisoned))

    return mark


def _is_of(labels: list[int], row: int) -> bool:
    """Whether these are the labels of `It is <row>`, by the token before the end."""
    told = [label for label in labels if label >= 0]
    return len(told) > 1 and told[-2] == TOKENS[row]


TOKENS: dict[int, int] = {}


@pytest.fixture(autouse=True)
def tokens(model):
    from distlora.models.loading import load_tokenizer
    from distlora.recipe.sections import ModelSection

    tokenizer = load_tokenizer(ModelSection(path=str(model)))
    TOKENS.update({row: tokenizer.encode(f"It is {row}")[-1] for row in range(6)})


def search(made) -> str:
    with pytest.raises(TrainingError) as ended:
        train.train(made, ALONE)
    return str(ended.value)


@pytest.mark.parametrize("row", (0, 2))
def test_a_bad_row_is_named_wherever_the_search_meets_it(row, recipe, bad_token):
    """Among those that decide, or in a step."""
    bad_token(row, math.nan)
    said = search(recipe(*WORDS, "train.lr_search={steps: 5, samples: 3, rates: 2}"))
    assert said.startswith("train.lr=search: ") and f"in train, counted from 0, row {row} is to blame" in said


def test_rates_that_all_diverge_are_named_and_the_rows_are_not_to_blame(recipe):
    said = search(recipe(*WORDS, "train.lr_search={lowest: 2e+37, highest: 3e+37, rates: 2, steps: 3}"))
    assert "training diverges at every learning rate from 2e+37 to 3e+37" in said
    assert said.endswith("each of the 6 rows of train that it reads has a finite loss before the first step")


def test_a_bad_rate_among_good_ones_is_not_chosen(recipe):
    made = recipe(*WORDS, "train.lr_search={lowest: 1e-3, highest: 3e+37, rates: 2, steps: 3}")
    assert train.train(made, ALONE).found_rate < 1


@pytest.mark.parametrize(
    ("found", "told"),
    [
        ([], "each of the 8 rows of train has"),
        ([3], "row 3 is to blame"),
        ([1, 2], "rows 1, 2 are to blame"),
        ([0, 1, 2, 3, 4, 5], "rows 0, 1, 2, 3, 4 and 1 others are to blame"),
        (list(range(8)), "the loss of all 8 rows of train"),
    ],
)
def test_what_is_told_of_rows(found, told):
    assert told.replace("train has", "train that it reads has") in told_of_rows(found, 8, "train")
