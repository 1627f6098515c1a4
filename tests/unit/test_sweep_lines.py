"""Lines of overrides: what counts as one, how words are quoted, whose directories must differ."""

import pytest

from distlora.cli.main import main
from distlora.errors import UserError
from distlora.sweeps.lines import check_directories, line_of, read_sweep

TEXT = """# four runs
output_dir=runs/a train.lr=1e-3

output_dir='runs/b c' "data.template={x}; $(touch evil) \\"y\\""
"""


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("output_dir: runs/own\n")
    return str(path)


@pytest.fixture
def sweep(tmp_path):
    path = tmp_path / "sweep.txt"
    path.write_text(TEXT)
    return path


def test_words_are_quoted_as_in_a_shell_and_nothing_is_executed(sweep):
    lines = read_sweep(sweep)
    assert lines == [
        ["output_dir=runs/a", "train.lr=1e-3"],
        ["output_dir=runs/b c", 'data.template={x}; $(touch evil) "y"'],
    ]
    assert line_of(sweep, 1, lines) == lines[1]


@pytest.mark.parametrize("number", [-1, 2])
def test_a_line_that_is_not_there(sweep, number):
    with pytest.raises(UserError, match=rf"has no line {number}, only 2, counted from 0; sbatch --array=0-1"):
        line_of(sweep, number, read_sweep(sweep))


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("a=1\nb='2\n", "line 1 is not quoted as in a shell: no closing quotation"),
        ("a=1 b = 2\n", "line 0: 'b' is no dotted.key=value"),
        ("--no-resume a=1\n", "'--no-resume' is no dotted.key=value"),
        ("# nothing\n\n", "is empty; write a line of overrides for each run"),
    ],
)
def test_lines_that_are_none(tmp_path, text, sentence):
    (tmp_path / "sweep.txt").write_text(text)
    with pytest.raises(UserError, match=sentence.replace(".", r"\.")):
        read_sweep(tmp_path / "sweep.txt")


def test_a_missing_file(tmp_path):
    with pytest.raises(UserError, match="cannot be read as a sweep: No such file"):
        read_sweep(tmp_path / "sweep.txt")


@pytest.mark.parametrize(
    ("lines", "common", "shared"),
    [
        ([["output_dir=a"], ["output_dir=b"]], [], None),
        ([["train.lr=1"]], [], None),
        ([["train.lr=1"], ["output_dir=b"]], [], None),
        ([["train.lr=1"], ["train.lr=2"]], [], "runs/own"),
        ([["train.lr=1"], ["train.lr=2"]], ["output_dir=c"], "c"),
        ([["train.lr=1"], ["output_dir='runs/own'"]], [], "runs/own"),
        ([["output_dir=a"], ["output_dir=x/../a"]], [], "a"),
        ([["output_dir=a"], ["output_dir=b", "output_dir=a"]], [], "a"),
    ],
)
def test_every_line_has_a_directory_of_its_own(recipe, lines, common, shared):
    if shared is None:
        check_directories("sweep.txt", lines, recipe, common)
        return
    with pytest.raises(
        UserError, match=f"lines 0 and 1 share the output directory /.*{shared}; give each line an output_dir"
    ):
        check_directories("sweep.txt", lines, recipe, common)


def test_the_command(sweep, recipe, capsys):
    assert main(["sweep", str(sweep), recipe]) == 0
    assert capsys.readouterr().out.splitlines()[0] == "0 output_dir=runs/a train.lr=1e-3"
    assert main(["sweep", str(sweep), recipe, "train.steps=2", "--line", "1"]) == 0
    assert capsys.readouterr().out == 'output_dir=runs/b c\0data.template={x}; $(touch evil) "y"\0'
    assert main(["sweep", str(sweep), recipe, "--line", "7"]) == 2
