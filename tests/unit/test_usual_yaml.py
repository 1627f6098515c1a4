"""What people write into recipes: it is read, or the sentence says what to do."""

import pytest

from distlora.errors import UserError
from distlora.recipe.load import load_recipe
from tests.fuzz.rule import problem_with

RECIPE = """\
model: {path: some/model}
method: {name: lora, rank: 4}
data: {task: arithmetic}
output_dir: runs/x
"""


@pytest.fixture
def load(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def load(text):
        (tmp_path / "x.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
        return load_recipe("x.yaml")

    return load


@pytest.mark.parametrize(
    "text",
    [
        "\ufeff" + RECIPE,
        RECIPE.replace("\n", "\r\n"),
        "%YAML 1.2\n---\n" + RECIPE + "...\n",
        "# a comment\n\n" + RECIPE.replace("runs/x", "runs/x\t# behind a tab"),
        RECIPE.replace("runs/x", '"runs/x"').replace("lora", "'lora'"),
        RECIPE.replace("output_dir: runs/x", "output_dir: >-\n  runs/x"),
        RECIPE + "train: {clip: ~}\n",
        '{\n\t"model": {"path": "some/model"},\n\t"method": {"name": "lora", "rank": 4},\n'
        '\t"data": {"task": "arithmetic"},\n\t"output_dir": "runs/x"\n}\n',
    ],
    ids=["mark", "crlf", "directive", "comments", "quotes", "folded", "null", "json"],
)
def test_what_is_usual_is_read(load, text):
    recipe = load(text)
    assert (recipe.output_dir, recipe.method.name, recipe.method.rank) == ("runs/x", "lora", 4)


@pytest.mark.parametrize(
    ("old", "new", "place", "advice"),
    [
        ("model: {path", "model:\n\t{path", "line 2, column 1", "; it is a tab: write spaces"),
        ("runs/x\n", "runs/x\n\t\n", "line 5, column 1", "; it is a tab: write spaces"),
        ("runs/x", "@x", "line 4, column 13", "; put a text that begins with @ in quotes"),
        ("runs/x", "`x`", "line 4, column 13", "; put a text that begins with ` in quotes"),
        ("runs/x", "%x", "line 4, column 13", "; put a text that begins with % in quotes"),
        ("runs/x", "x\ntargets: *.q_proj", "line 5, column 11",
         "; put a text that begins with * or & in quotes"),
        ("output_dir: ", "output_dir:", "line 4, column 1", "; write a colon and a space behind a key"),
        ("output_dir: ", "output_dir:\u00a0", "line 4, column 1", "; write a colon and a space behind a key"),
        ("runs/x", r'"C:\Users\me"', "line 4, column 18", "; put a text with backslashes in single quotes"),
        ("runs/x", r'"runs\day"', "line 4, column 18", "; put a text with backslashes in single quotes"),
        ("runs/x", "a: b", "line 4, column 14", "; put a text that holds a colon and a space in quotes, "
         "or indent keys below their section"),
        ("{path: some/model}", "\n  path: x\n dtype: y", "line 3, column 2",
         "; begin all keys and entries of a section in the same column"),
        ("{path: some/model}", "\n- path: x\n  dtype: y\n a: b", "line 4, column 2",
         "; begin all keys and entries of a section in the same column"),
        ("runs/x", "{home} x", "line 4, column 20",
         "; put the whole text in quotes, and write a quote within single quotes twice"),
        ("runs/x", "'don't'", "line 4, column 18",
         "; put the whole text in quotes, and write a quote within single quotes twice"),
        ("runs/x", '"x', "line 4, column 13", "; close the quotes that begin there"),
        ("lora, rank: 4}", "lora, rank: 4", "line 3, column 5",
         "; close the brackets, or put a text with brackets or commas in quotes"),
        ("runs/x", "- x", "line 4, column 13", "; begin a list on a line of its own, or put a text "
         "that begins with - in quotes"),
    ],
)  # fmt: skip
def test_what_breaks_the_parser_is_told_with_what_to_do(load, old, new, place, advice):
    with pytest.raises(UserError) as refused:
        load(RECIPE.replace(old, new))
    said = str(refused.value)
    assert said.startswith("x.yaml is not YAML: ") and said.endswith(f" at {place}{advice}"), said
    assert problem_with(said) is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (RECIPE + "train: {<<: {steps: 5}}\n",
         "x.yaml: line 5, column 9: << merges a mapping that is elsewhere, which is not read; "
         "write its keys out"),
        (RECIPE + "train.lr: 1e-3\n",
         "x.yaml: train.lr: unknown key; write lr as a key of train, as in train: {lr: …}"),
        (RECIPE + "train: {optimizer.name: sgd}\n",
         "x.yaml: train.optimizer.name: unknown key; write name as a key of optimizer, "
         "as in optimizer: {name: …}"),
        (RECIPE + "train:\n",
         "x.yaml: train: found null, wanted a mapping "
         "(no key stands below it: remove it, or write its keys)"),
        (RECIPE + "train: {clip: None}\n",
         'x.yaml: train.clip: found "None", wanted a number (None is written null)'),
        (RECIPE.encode("utf-16"), "x.yaml cannot be read as a recipe: line 1 is not utf-8; save it as UTF-8"),
        (RECIPE.replace("runs/x", "runs/é").encode("latin-1"),
         "x.yaml cannot be read as a recipe: line 4 is not utf-8; save it as UTF-8"),
        (RECIPE.replace("arithmetic}", "arithmetic, template: {question}}"),
         'x.yaml: data.template: found {"question": null}, wanted a text (put it in quotes)'),
        (RECIPE + "\x0c\n", "x.yaml is not YAML: it holds the character U+000C at line 5; remove it"),
    ],
)  # fmt: skip
def test_what_is_usual_elsewhere_is_told_with_what_to_do(load, text, expected):
    with pytest.raises(UserError) as refused:
        load(text)
    assert str(refused.value) == expected
