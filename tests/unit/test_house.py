"""How the library is laid out for a reader: short files, and folders that say what they are for."""

import ast
from pathlib import Path

import pytest

from distlora import errors

PACKAGE = Path(errors.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
FOLDERS = sorted({path.parent for path in FILES})
#: A file is one idea. Above this many lines it has become two.
LONGEST = 350


def _lines(source: str) -> int:
    return len(source.splitlines())


def _says_what_it_is_for(source: str) -> bool:
    return bool(ast.get_docstring(ast.parse(source)))


def _name(path: Path) -> str:
    return str(path.relative_to(PACKAGE.parent))


@pytest.mark.parametrize("file", FILES, ids=_name)
def test_no_file_is_too_long(file):
    assert _lines(file.read_text(encoding="utf-8")) <= LONGEST


@pytest.mark.parametrize("folder", FOLDERS, ids=_name)
def test_each_folder_says_what_it_is_for(folder):
    assert _says_what_it_is_for((folder / "__init__.py").read_text(encoding="utf-8"))


# ---------------------------------------------------------------------- the checks can fail


def test_a_long_file_is_seen():
    assert _lines("x = 1\n" * LONGEST) <= LONGEST < _lines("x = 1\n" * (LONGEST + 1))


@pytest.mark.parametrize(
    "source", ["", "# What it is for.\n", "from x import y\n", '""" """\n', 'x = "text"\n']
)
def test_a_folder_that_says_nothing_is_seen(source):
    assert not _says_what_it_is_for(source)


def test_files_and_folders_were_found():
    names = {_name(path) for path in (*FILES, *FOLDERS)}
    assert {
        "distlora",
        "distlora/engine/zero",
        "distlora/engine/local.py",
        "distlora/methods/lora.py",
    } <= names
