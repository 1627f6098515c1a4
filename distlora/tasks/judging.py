"""Judges: functions of (output, expected answer) that say whether the output gives that answer.

The expected answer may be a full reference response, too. An empty one is never given.
"""

import re
from collections.abc import Callable

from distlora.tasks import answers
from distlora.tasks.reading.equivalence import equivalent
from distlora.tasks.reading.final_answer import Marked, final_answer, first_sentence, reference
from distlora.tasks.reading.options import chosen, label_of
from distlora.tasks.reading.plain_text import plain
from distlora.tasks.reading.quantities import equal, quantity

Judge = Callable[[str, str], bool]


def by_number(output: str, expected: str) -> bool:
    """GSM8K: by the first complete quantity behind the last mark. Without a mark nothing is right."""
    marked, expected = final_answer(output), reference(expected)
    return marked is not None and bool(expected) and _same_number_or_text(marked, expected)


def by_mathematics(output: str, expected: str) -> bool:
    """MATH, MetaMathQA: by what stands behind the last mark, as `by_number` or as equal mathematics."""
    marked, expected = final_answer(output), first_sentence(reference(expected))
    if marked is None or not expected:
        return False
    found = first_sentence(marked.text)
    if _factorial(found) == _factorial(expected) and _same_number_or_text(marked, expected):
        return True
    return equivalent(found, expected)


def by_option(kind: str) -> Judge:
    """By the label that is chosen. kind: "answer" for answer1, answer2, …; "solution", "ending", "option"; or
    "truth" for true and false. An expected single letter is looked for as a letter.
    """

    def judge(output: str, expected: str) -> bool:
        label = label_of(expected)
        wanted = label[1] if label else chosen(expected, kind)
        looked_for = "letter" if label and label[0] == "letter" else kind
        return wanted is not None and chosen(output, looked_for) == wanted

    return judge


by_truth = by_option("truth")


def by_kind(output: str, expected: str) -> bool:
    """Of any kind: an expected label as `by_option`, anything else as a number or as a text."""
    label = label_of(reference(expected))
    if label and label[0] != "letter":
        return by_option(label[0])(output, reference(expected))
    return answers.same(answers.choice_or_text(output), answers.choice_or_text(expected))


def by_first_number(output: str, expected: str) -> bool:
    """The project's own arithmetic: by the number that `answers.number` finds."""
    return answers.same(answers.number(output), answers.number(expected))


def by_text(output: str, expected: str) -> bool:
    """The whole text, but for case, spaces and a full stop at the end."""
    return answers.same(answers.exact_text(output), answers.exact_text(expected))


def _same_number_or_text(marked: Marked, expected: str) -> bool:
    found, wanted = quantity(f"{marked.text} {marked.rest}"), quantity(expected)
    if found and wanted:
        return equal(found, wanted)
    return _bare(marked.text) == _bare(expected) != ""


def _factorial(text: str) -> bool:
    return bool(re.search(r"[\dn)]\s*!", text))


def _bare(text: str) -> str:
    return re.sub(r"[\s$\"']+", "", plain(first_sentence(text))).strip(".,;:!")
