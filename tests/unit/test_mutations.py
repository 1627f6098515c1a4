"""Every mutation of the list can be made in the sources as they are."""

import pytest

from tests.distributed.plan import entries
from tests.mutations import MUTATIONS, PARITY, REPOSITORY, main

KEYS = {entry.key for entry in entries()}


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_its_text_is_there_once_and_its_tests_exist(mutation):
    assert (REPOSITORY / mutation.file).read_text().count(mutation.old) == 1 and mutation.old != mutation.new
    for test in mutation.tests:
        file, _, name = test.partition("::")
        assert f"def {name.partition('[')[0]}(" in (REPOSITORY / file).read_text()
        if test.startswith(PARITY):
            assert test.removeprefix(PARITY)[1:-1] in KEYS


def test_a_word_that_names_no_mutation_runs_nothing(capsys):
    assert main(["--help"]) == 1
    assert capsys.readouterr().out == "no mutation has --help in its name\n"
