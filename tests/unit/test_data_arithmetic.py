"""The embedded problems: right answers, the same for everyone, and a test part that training never shows."""

import re

import pytest

from distlora.errors import UserError
from distlora.tasks.arithmetic import SIZES, STORIES, is_held_out, problem, rows

TRAIN = [problem("train", index) for index in range(SIZES["train"])]
TEST = [problem("test", index) for index in range(SIZES["test"])]


def test_problems_are_a_function_of_split_seed_and_index():
    assert problem("train", 7) == problem("train", 7)
    assert len({problem(split, 7, seed).question for split in SIZES for seed in range(3)}) == 6
    assert rows("test")[7] == {"question": TEST[7].question, "answer": TEST[7].answer}


def test_known_problem_stays_as_it_is():
    """Figures quoted for one version of the data must hold for the next."""
    assert rows("test")[1] == {
        "question": "Julia has 35 books and gives 18 to Frank. How many books does Julia have left?",
        "answer": "17",
    }


def test_operands_of_the_test_split_never_occur_in_training():
    train, test = ({tuple(sorted(each.operands)) for each in split} for split in (TRAIN, TEST))
    assert len(test) > 50 and not train & test
    assert not {each.question for each in TRAIN} & {each.question for each in TEST}
    assert is_held_out((12, 13)) == is_held_out((13, 12))


def test_test_problems_hardly_repeat():
    assert len({each.question for each in TEST}) > 0.95 * len(TEST)


def test_answers_are_small_and_not_negative():
    assert {int(each.answer) for each in TRAIN + TEST} <= set(range(100))


ANSWERS = [
    ("buys", lambda a, b: a + b),
    ("together", lambda a, b: a + b),
    ("walks", lambda a, b: a + b),
    ("both cost", lambda a, b: a + b),
    ("gives \\d+ to", lambda a, b: a - b),
    ("takes", lambda a, b: a - b),
    ("How many more", lambda a, b: a - b),
    ("boxes", lambda a, b: a * b),
    ("an hour", lambda a, b: a * b),
    ("equally", lambda a, b: a / b),
    ("finds", lambda a, b, c: a - b + c),
    ("bags", lambda a, b, c: a * b + c),
]


def test_every_story_occurs_and_its_answer_follows_from_its_text():
    seen = set()
    for each in TRAIN + TEST:
        (kind,) = [kind for kind in range(len(ANSWERS)) if re.search(ANSWERS[kind][0], each.question)]
        numbers = [int(number) for number in re.findall(r"\d+", each.question)]
        assert ANSWERS[kind][1](*numbers) == int(each.answer), each
        seen.add(kind)
    assert len(seen) == len(STORIES)


def test_unknown_split_is_an_error():
    with pytest.raises(UserError, match="choose train or test"):
        rows("validation")
