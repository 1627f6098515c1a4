"""Every loader gives a result or one sentence, whatever it is given."""

import pytest

from distlora.errors import UserError
from tests.fuzz.rule import Loader, outcome, problem_with
from tests.fuzz.run import hold
from tests.fuzz.table import BY_NAME, EXAMPLES, LOADERS, examples_of


@pytest.mark.parametrize("loader", LOADERS, ids=lambda loader: loader.name)
def test_any_input_gives_a_result_or_one_sentence(loader):
    found = hold(loader, examples_of(loader, EXAMPLES))
    assert len(found) > 1 or not loader.refuses, "the examples of this loader all end alike"


def test_every_loader_has_a_name_of_its_own():
    assert len(BY_NAME) == len(LOADERS)


# ---------------------------------------------------------------------- the rule can fail


def _raised(error: Exception):
    def read(example, folder):
        raise error

    return Loader("any", None, read)


@pytest.mark.parametrize("error", [ValueError("x"), RecursionError(), MemoryError(), OSError(2, "x")])
def test_other_errors_are_seen(error):
    with pytest.raises(type(error)):
        outcome(_raised(error), "")


def test_what_eats_memory_or_time_is_seen(monkeypatch):
    with pytest.raises(MemoryError):
        outcome(Loader("any", None, lambda example, folder: bytearray(2 << 30)), "")
    monkeypatch.setattr("tests.fuzz.rule.SECONDS", 0.01)
    with pytest.raises(AssertionError, match="took"):
        outcome(Loader("any", None, lambda example, folder: sum(range(10**7))), "")


@pytest.mark.parametrize(
    "sentence",
    [
        "",
        " ",
        "a\nb",
        "a\x1b[2J",
        "x" * 5000,
        "Traceback (most",
        "it is:",
        "'str' object has no attribute 'get'",
    ],
)
def test_what_is_no_sentence_is_seen(sentence):
    assert problem_with(sentence)
    if sentence == "it is:":
        with pytest.raises(AssertionError, match="no whole sentence"):
            outcome(_raised(UserError(sentence)), "")
