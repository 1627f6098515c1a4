"""Arithmetic word problems: a data set that needs no file and no network.

A problem is a function of (split, seed, index) alone, so every process has the same data. The test split
holds out *operands*: the numbers of a test problem are, in any order, those of no training problem, whatever
the story and the operation. So the exact match on the test split measures arithmetic and not memory.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from zlib import crc32

from distlora.errors import UserError
from distlora.tasks import answers, judging
from distlora.tasks.base import ResponseTask

SIZES = {"train": 4096, "test": 512}

#: One of so many combinations of operands belongs to the test split.
_HELD_OUT_SHARE = 4

_NAMES = "Anna Ben Carla David Emma Frank Grace Henry Julia Kevin Laura Mark Nina Paul Sara Tom".split()
_ITEMS = "apples books cards coins cookies eggs flowers marbles oranges pencils shells stamps".split()


@dataclass(frozen=True)
class Operation:
    """An operation on `count` operands of `low` … `high`.

    shown: from the operands to the numbers in the story. answer: from the operands to the answer, 0 … 99.
    """

    count: int
    low: int
    high: int
    shown: Callable[..., tuple[int, ...]]
    answer: Callable[..., int]


# Subtractions and divisions are built from their answers, so that these are never negative and always whole.
SUM = Operation(2, 1, 20, lambda a, b: (a, b), lambda a, b: a + b)
DIFFERENCE = Operation(2, 1, 20, lambda a, b: (a + b, b), lambda a, b: a)
PRODUCT = Operation(2, 2, 9, lambda a, b: (a, b), lambda a, b: a * b)
QUOTIENT = Operation(2, 2, 9, lambda a, b: (a * b, b), lambda a, b: a)
LESS_THEN_MORE = Operation(3, 1, 12, lambda a, b, c: (a + c, c, b), lambda a, b, c: a + b)
PRODUCT_AND_REST = Operation(3, 2, 6, lambda a, b, c: (a, b, c), lambda a, b, c: a * b + c)

#: Stories with their operations. All are equally likely, so that most problems take one easy step.
STORIES: list[tuple[str, Operation]] = [
    ("{name} has {0} {items}. {name} buys {1} more. How many {items} does {name} have now?", SUM),
    ("{name} has {0} {items} and {friend} has {1}. How many {items} do they have together?", SUM),
    ("{name} walks {0} km in the morning and {1} km in the evening. How many km does {name} walk?", SUM),
    ("A pen costs {0} dollars and a bag costs {1} dollars. How many dollars do both cost?", SUM),
    ("{name} has {0} {items} and gives {1} to {friend}. How many {items} does {name} have left?", DIFFERENCE),
    ("There are {0} {items} on a table. {name} takes {1} away. How many {items} are left?", DIFFERENCE),
    ("{name} has {0} {items} and {friend} has {1}. How many more {items} does {name} have?", DIFFERENCE),
    ("{name} has {0} boxes with {1} {items} in each. How many {items} does {name} have?", PRODUCT),
    ("{name} drives {0} km an hour for {1} hours. How many km does {name} drive?", PRODUCT),
    ("{name} shares {0} {items} equally among {1} friends. How many {items} does each friend get?", QUOTIENT),
    (
        "{name} has {0} {items}, gives {1} away and then finds {2}. How many {items} does {name} have now?",
        LESS_THEN_MORE,
    ),
    (
        "{name} has {0} bags with {1} {items} in each and {2} more. How many {items} does {name} have?",
        PRODUCT_AND_REST,
    ),
]


@dataclass(frozen=True)
class Problem:
    """A question in one line, its answer in digits, and the operands that decide its split."""

    question: str
    answer: str
    operands: tuple[int, ...]


def is_held_out(operands: tuple[int, ...]) -> bool:
    """Whether these operands, in any order, belong to the test split."""
    return crc32(repr(sorted(operands)).encode()) % _HELD_OUT_SHARE == 0


def problem(split: str, index: int, seed: int = 0) -> Problem:
    """The problem with this index in a split ("train" or "test"). It depends on the arguments alone."""
    draw = random.Random(f"{split}/{seed}/{index}")
    story, operation = draw.choice(STORIES)
    while True:
        operands = tuple(draw.randint(operation.low, operation.high) for _ in range(operation.count))
        if is_held_out(operands) == (split == "test"):
            break
    name, friend = draw.sample(_NAMES, 2)
    items = draw.choice(_ITEMS)
    question = story.format(*operation.shown(*operands), name=name, friend=friend, items=items)
    return Problem(question, str(operation.answer(*operands)), operands)


def rows(split: str, seed: int = 0) -> list[dict[str, str]]:
    """All rows of a split, with the columns `question` and `answer`. Raises UserError for an unknown
    split.
    """
    if split not in SIZES:
        raise UserError(f"data: the arithmetic task has no split {split!r}; choose train or test")
    problems = (problem(split, index, seed) for index in range(SIZES[split]))
    return [{"question": each.question, "answer": each.answer} for each in problems]


TASKS = {
    "arithmetic": ResponseTask(
        columns={"prompt": "question", "response": "answer"},
        template="Q: {prompt}\nAnswer:",
        extract=answers.number,
        judge=judging.by_first_number,
        stops=("\nQ:",),
        rows=rows,
    )
}
