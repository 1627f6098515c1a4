"""Commonsense reasoning as LLM-Adapters (arXiv 2304.01933) puts it: a question, its options, and the right
one. `commonsense` is the training set made of all eight, CommonSense170K; the others are its eight tests, of
which the hub's own rows give the same texts.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from distlora.sentences import counted
from distlora.tasks import alpaca, judging
from distlora.tasks.base import Layout, ResponseTask, Row
from distlora.tasks.instruct import INSTRUCT

_FORMAT = "Answer format: "


def _response(name: str) -> str:
    return f"the correct answer is {name}"


def options(prompt: str) -> dict[str, str]:
    """The answers that an instruction names at its end, as in `Answer format: true/false`."""
    _, mark, names = prompt.rpartition(_FORMAT)
    return {name: _response(name) for name in names.strip().split("/")} if mark else {}


def _row(instruction: str, names: Sequence[str], right: str, between: str = "\n\n") -> Row:
    """A row of LLM-Adapters. names: of the options. right: the name of the right one."""
    text = f"{instruction}{between}{_FORMAT}{'/'.join(names)}"
    return {"instruction": text, "input": "", "output": _response(right), "answer": right}


def _choice(kind: str, texts: Sequence[str], separator: str = " ") -> tuple[str, list[str]]:
    """`Answer1: … Answer2: …`, and the names `answer1`, `answer2`, …; kind: what an option is called. Raises
    ValueError for options that are no texts."""
    for number, text in enumerate(_list("options", texts), 1):
        if isinstance(text, bool) or not isinstance(text, str | int | float):
            raise ValueError(f"{text!r:.40} as its option {number}, which is no text")
    shown = separator.join(f"{kind}{number}: {text}" for number, text in enumerate(texts, 1))
    return shown, [f"{kind.lower()}{number}" for number in range(1, len(texts) + 1)]


def _list(what: str, values: object) -> Sequence[Any]:
    """The values, if they are several: a cell of a table of texts (CSV) is one text."""
    if isinstance(values, str) or not isinstance(values, Sequence) or not values:
        raise ValueError(f"{what} that are no list of texts: {values!r:.40}")
    return values


def _number(value: object, first: int, names: Sequence[str]) -> str:
    """The name of the option with this number. first: the number of the first one."""
    numbers = [str(number) for number in range(first, first + len(names))]
    if str(value).strip() not in numbers:
        raise ValueError(f"the answer {str(value)!r}, which is none of {', '.join(numbers)}")
    return names[numbers.index(str(value).strip())]


def _boolq(row: Row) -> Row:
    answer = str(row["answer"]).strip().lower()
    if answer not in ("true", "false"):
        raise ValueError(f"the answer {answer!r}, which is neither true nor false")
    question = f"Please answer the following question with true or false, question: {row['question']}?"
    return _row(question, ("true", "false"), answer)


def _piqa(row: Row) -> Row:
    shown, names = _choice("Solution", (row["sol1"], row["sol2"]), "\n\n")
    question = f"Please choose the correct solution to the question: {row['goal']}"
    return _row(f"{question}\n\n{shown}", names, _number(row["label"], 0, names))


def _siqa(row: Row) -> Row:
    shown, names = _choice("Answer", (row["answerA"], row["answerB"], row["answerC"]))
    question = f"Please choose the correct answer to the question: {row['context']} {row['question']}"
    return _row(f"{question}\n\n{shown}", names, _number(row["label"], 1, names))


def _hellaswag(row: Row) -> Row:
    shown, names = _choice("Ending", row["endings"])
    sentence = f"{row['activity_label']}: {row['ctx']}"
    question = f"Please choose the correct ending to complete the given sentence: {sentence}"
    return _row(f"{question}\n\n{shown}", names, _number(row["label"], 0, names))


def _winogrande(row: Row) -> Row:
    shown, names = _choice("Option", (row["option1"], row["option2"]))
    question = (
        "Please choose the correct answer to fill in the blank to complete the given sentence: "
        f"{row['sentence']}"
    )
    return _row(f"{question}\n\n{shown}", names, _number(row["answer"], 1, names), between=" ")


def _multiple_choice(column: str) -> Callable[[Row], Row]:
    """For ARC and OpenBookQA, whose options have letters or numbers. column: of the question."""

    def read(row: Row) -> Row:
        marks = [str(mark) for mark in _list("labels of options", row["choices"]["label"])]
        key = str(row["answerKey"]).strip()
        if key not in marks:
            raise ValueError(f"the answer {key!r}, which is none of {', '.join(marks)}")
        shown, names = _choice("Answer", row["choices"]["text"])
        if len(names) != len(marks):
            raise ValueError(f"{counted(len(names), 'option')} and {len(marks)} labels of options")
        question = f"Please choose the correct answer to the question: {row[column]}"
        return _row(f"{question}\n\n{shown}", names, names[marks.index(key)])

    return read


def _test(path: str, folder: str, layout: Layout, kind: str, eval_split: str = "validation") -> ResponseTask:
    """One of the eight. kind: what its options are called, see `judging.by_option`. LLM-Adapters calls the
    split `test` on which all are scored, whatever it is.
    """
    return replace(
        COMMONSENSE,
        path=path,
        folder=folder,
        layouts=(replace(layout, marked=True),),
        judge=judging.by_option(kind),
        eval_split=eval_split,
        local_splits={"validation": "test"},
    )


COMMONSENSE = replace(INSTRUCT, options=options, paper=alpaca.PAPER_COMMONSENSE)

EIGHT = {
    "boolq": _test(
        "google/boolq", "boolq", Layout(("question", "passage", "answer"), "answer", _boolq), "truth"
    ),
    "piqa": _test(
        "ybisk/piqa", "piqa", Layout(("goal", "sol1", "sol2", "label"), "label", _piqa), "solution"
    ),
    "siqa": _test(
        "allenai/social_i_qa",
        "social_i_qa",
        Layout(("context", "question", "answerA", "answerB", "answerC", "label"), "label", _siqa),
        "answer",
    ),
    "hellaswag": _test(
        "Rowan/hellaswag",
        "hellaswag",
        Layout(("activity_label", "ctx", "endings", "label"), "label", _hellaswag),
        "ending",
    ),
    "winogrande": _test(
        "allenai/winogrande:winogrande_xl",
        "winogrande",
        Layout(("sentence", "option1", "option2", "answer"), "answer", _winogrande),
        "option",
    ),
    "arc_easy": _test(
        "allenai/ai2_arc:ARC-Easy",
        "ARC-Easy",
        Layout(("question", "choices", "answerKey"), "answerKey", _multiple_choice("question")),
        "answer",
        eval_split="test",
    ),
    "arc_challenge": _test(
        "allenai/ai2_arc:ARC-Challenge",
        "ARC-Challenge",
        Layout(("question", "choices", "answerKey"), "answerKey", _multiple_choice("question")),
        "answer",
        eval_split="test",
    ),
    "openbookqa": _test(
        "allenai/openbookqa:main",
        "openbookqa",
        Layout(("question_stem", "choices", "answerKey"), "answerKey", _multiple_choice("question_stem")),
        "answer",
        eval_split="test",
    ),
}

TASKS = {"commonsense": COMMONSENSE} | EIGHT
SUITES = {"commonsense": tuple(EIGHT)}
