"""Programs within the launch scripts: they call the library as it is."""

import ast
import importlib
import inspect
import re

import pytest

from tests.e2e.program import REPOSITORY

PROGRAMS = [
    pytest.param(text, id=f"{path.name}-{number}")
    for path in sorted((REPOSITORY / "launch").iterdir())
    for number, text in enumerate(re.findall(r"python -c '\n?([^']+)'", path.read_text()))
    if "from distlora" in text
]


def test_there_are_such_programs():
    assert PROGRAMS


@pytest.mark.parametrize("text", PROGRAMS)
def test_what_is_called_takes_its_arguments(text):
    tree = ast.parse(text)
    names = {
        name.name: getattr(importlib.import_module(node.module), name.name)
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module.startswith("distlora")
        for name in node.names
    }
    calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and getattr(n.func, "id", None) in names]
    assert calls
    for call in calls:
        keywords = {keyword.arg: None for keyword in call.keywords}
        inspect.signature(names[call.func.id]).bind(*call.args, **keywords)
