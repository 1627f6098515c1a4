"""What quickstart.sh makes of the recipe's batch for a number of ranks."""

from pathlib import Path

import pytest

from distlora.cli.quickstart import batch_overrides, main
from distlora.errors import UserError
from distlora.recipe.deepspeed_config import plan_batches
from distlora.recipe.load import load_recipe

RECIPE = str(
    Path(__file__).parents[2] / "configs" / "recipes" / "quickstart.yaml"
)  # 32 samples a step, 16 a pass
WHOLE, MICRO = "train.global_batch_size", "train.micro_batch_size"


@pytest.mark.parametrize(
    ("ranks", "given", "expected"),
    [
        (2, [], []),
        (1, [f"{WHOLE}=48"], []),
        (3, [], [f"{MICRO}=10", f"{WHOLE}=30"]),
        (3, [f"{WHOLE}=24"], [f"{MICRO}=8"]),
        (2, [f"{WHOLE}=100"], [f"{MICRO}=10"]),
        (3, [f"{MICRO}=4"], [f"{WHOLE}=36"]),
        (3, [f"{MICRO}=40"], [f"{WHOLE}=120"]),
        (40, [], [f"{MICRO}=1", f"{WHOLE}=40"]),
    ],
)  # fmt: skip
def test_what_the_user_has_not_set_is_chosen_so_that_the_batch_divides(ranks, given, expected):
    chosen = batch_overrides(RECIPE, ranks, given)
    assert chosen == expected
    plan_batches(load_recipe(RECIPE, [*chosen, *given]), ranks)


@pytest.mark.parametrize("given", [[f"{WHOLE}=25"], [f"{WHOLE}=24", f"{MICRO}=5"]])
def test_what_cannot_be_is_told_in_the_numbers_that_were_given(given):
    chosen = batch_overrides(RECIPE, 3, given)
    with pytest.raises(UserError, match=given[0]):
        plan_batches(load_recipe(RECIPE, [*chosen, *given]), 3)


def test_mistakes_are_left_to_the_run():
    assert batch_overrides(RECIPE, 3, ["train.nonsense=1"]) == batch_overrides("nowhere.yaml", 3, []) == []


def test_one_override_a_line(capsys):
    assert main([RECIPE, "3", "train.lr=1e-3"]) == 0
    assert capsys.readouterr().out == f"{MICRO}=10\n{WHOLE}=30\n"
