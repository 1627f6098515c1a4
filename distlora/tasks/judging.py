"""Judges: functions of (output, expected answer) that say whether the output gives that answer.

The expected answer may be a full reference response, too. An empty one is never given.
"""

import re
from collections.abc import Callable

from distlora.tasks import answers
from distlora.tasks.reading.equivalence import equivalent
from distlora.tasks.reading.final_answer import Marked, final_answer, final_number, first_sentence, reference
from distlora.tasks.reading.options import chosen, label_of
from distlora.tasks.reading.plain_text import plain
from distlora.tasks.reading.quantities import equal, is_quantity, quantity

Judge = Callable[[str, str], bool]
#: `5 apples and 3 pears`, of which math-verify compares the first number only.
_TWO_NUMBERS = re.compile(r"\d\D*\b(?:and|or)\b\D*\d")


def by_number(output: str, expected: str) -> bool:
    """GSM8K: by the first complete quantity behind the last mark with a number. Without a mark nothing is
    right.
    """
    expected = reference(expected)
    marked = _marked(output, expected)
    return marked is not None and bool(expected) and _same_number_or_text(marked, expected)


def by_mathematics(output: str, expected: str) -> bool:
    """MATH, MetaMathQA: by what stands behind the last mark, as the same text, as the same number if the
    expected answer is nothing but a number (with a unit), or as equal mathematics (see `equivalent`).
    """
    expected = first_sentence(reference(expected))
    marked = _marked(output, expected)
    if marked is None or not expected:
        return False
    found = first_sentence(marked.text)
    if _factorial(found) == _factorial(expected) and _same_text(found, expected):
        return True
    if _same_number(marked, expected):
        return True
    two_for_one = is_quantity(expected) and _TWO_NUMBERS.search(plain(found))
    return not two_for_one and equivalent(found, expected)


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
    wanted = reference(expected)
    label = label_of(wanted)
    if label and label[0] != "letter":
        return by_option(label[0])(output, wanted)
    if quantity(wanted) and final_answer(output):
        return by_number(output, wanted)
    return answers.same(answers.choice_or_text(output), answers.choice_or_text(expected))


def by_first_number(output: str, expected: str) -> bool:
    """The project's own arithmetic: by the number that `answers.number` finds."""
    return answers.same(answers.number(output), answers.number(expected))


def by_text(output: str, expected: str) -> bool:
    """The whole text, but for case, spaces and a full stop at the end."""
    return answers.same(answers.exact_text(output), answers.exact_text(expected))


def _marked(output: str, expected: str) -> Marked | None:
    return final_number(output) if quantity(expected) else final_answer(output)


def _same_number(marked: Marked, expected: str) -> bool:
    if not is_quantity(expected) or _factorial(marked.text):
        return False
    names = _unknown(marked.text), _unknown(expected)
    if all(names) and names[0] != names[1]:
        return False
    return equal(quantity(f"{marked.text} {marked.rest}"), quantity(expected))


def _same_number_or_text(marked: Marked, expected: str) -> bool:
    found, wanted = quantity(f"{marked.text} {marked.rest}"), quantity(expected)
    if found and wanted:
        return equal(found, wanted)
    return _same_text(marked.text, expected)


def _same_text(found: str, expected: str) -> bool:
    return _bare(found) == _bare(expected) != ""


def _unknown(text: str) -> str | None:
    """The name of the unknown whose value a text gives: `x` of `x = 5`."""
    found = re.match(r"\W*?(\\?[a-z]+(?:_\w+)?)\s*=", plain(text).rpartition("⇒")[2])
    return found[1] if found and (len(found[1]) == 1 or not found[1].isalpha()) else None


def _factorial(text: str) -> bool:
    return bool(re.search(r"[\dn)]\s*!", text))


def _bare(text: str) -> str:
    return re.sub(r"[\s$\"']+", "", plain(first_sentence(text))).strip(".,;:!")
