"""A task is one file: the one that the README shows is put beside the others, and is a task like them."""

import json
import re
import sys
from pathlib import Path

import pytest

from distlora import tasks
from distlora.data import load_questions, load_split
from distlora.recipe.sections import DataSection
from distlora.tasks import get_task, is_correct, registry, scored_tasks
from tests.unit.test_data_encode import make_tokenizer

README = Path(__file__).parents[2] / "README.md"
NAME = "svamp"
#: Lines of the file that the README promises to be short.
SHORT = 20


@pytest.fixture
def svamp(tmp_path, monkeypatch) -> str:
    """The name of the example's task, after its file was found in the folder of tasks."""
    fences = re.findall(r"^```python\n(.*?)^```$", README.read_text(encoding="utf-8"), re.M | re.S)
    (source,) = (fence for fence in fences if f'"{NAME}"' in fence)
    assert len(source.splitlines()) < SHORT
    (tmp_path / f"{NAME}.py").write_text(source)
    monkeypatch.setattr(tasks, "__path__", [*tasks.__path__, str(tmp_path)])
    monkeypatch.setitem(sys.modules, f"distlora.tasks.{NAME}", None)
    del sys.modules[f"distlora.tasks.{NAME}"]  # the fixture takes away what is imported now
    monkeypatch.setitem(registry.TASKS, NAME, registry.find("TASKS")[NAME])
    yield NAME
    delattr(tasks, NAME)


def test_it_is_trained_and_asked(svamp, tmp_path):
    row = {"Body": "Tom has 5 pens and loses 2.", "Question": "How many are left?", "Answer": 3}
    (tmp_path / "test.json").write_text(json.dumps([row]))
    data, tokenizer = DataSection(task=svamp, path=str(tmp_path)), make_tokenizer()
    (sample,) = load_split(data, "test", tokenizer).samples
    text = "Q: Tom has 5 pens and loses 2. How many are left?\nA: 3<eos>"
    assert tokenizer.decode(sample.input_ids) == text
    questions = load_questions(data, get_task(svamp).eval_split, tokenizer)
    (item,) = questions.items
    assert (item.prompt, item.answer) == (text.removesuffix(" 3<eos>"), "3") and questions.stops == ("\nQ:",)
    assert item.prompt_ids == sample.prompt_ids
    assert is_correct(svamp, " 5 - 2 = 3", item.answer) and not is_correct(svamp, " 2", item.answer)
    assert scored_tasks([svamp, "rte"]) == [svamp, "rte"]
