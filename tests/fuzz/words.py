"""Words of the command line, and files of answers."""

import contextlib
import io
import json
import re
from pathlib import Path

from hypothesis import strategies as st

import distlora.report.build  # noqa: F401 (what verbs import when they are run is no part of an example)
import distlora.sweeps.check  # noqa: F401
from distlora.cli.main import main
from distlora.errors import UserError
from distlora.evaluation.judge_file import judge_file
from tests.fuzz.damage import HOSTILE, damaged, damaged_text, written
from tests.fuzz.recipes import RECIPE, SWEEP
from tests.fuzz.rule import Loader

ANSWERS = [{"output": "It is 2.\n#### 2", "answer": "2"}, {"output": "x = 1,000.5", "answer": 7}]
COMMANDS = (
    ("sweep", "sweep.yaml", "--point", "1", "--check"), ("sweep", "sweep.yaml", "--line", "0"),
    ("sweep", "lines", "recipe.yaml", "--line", "0"), ("status", "recipe.yaml", "--since", "1e3"),
    ("status", "run"), ("eval", "run", "--limit", "5"),
    ("eval", "run", "--tasks", "gsm8k", "--batch-size", "2"),
    ("eval", "--task", "gsm8k", "--predictions", "answers.jsonl", "--out", "judged.jsonl"),
    ("export", "run", "--format", "peft", "--out", "out", "--step", "3", "--max-error", "0.1"),
    ("report", "run", "--out", "out", "--smooth", "3"),
)  # fmt: skip
FILES = {
    "recipe.yaml": RECIPE,
    "sweep.yaml": SWEEP,
    "lines": "train.lr=1 output_dir=a\n",
    "answers.jsonl": "".join(json.dumps(row) + "\n" for row in ANSWERS),
}


def _is_a_word(text: str) -> bool:
    """Whether the system can hand it to a program."""
    return "\0" not in text and not any("\ud800" <= sign <= "\udbff" for sign in text)


def _judged(content: bytes, folder: Path) -> None:
    judge_file("gsm8k", written(folder, content, "answers.jsonl"), folder / "judged.jsonl")


def _command(given: tuple[tuple[str, ...], list[tuple[int, str]]], folder: Path) -> None:
    """The last line of what the program says is its sentence."""
    words, changes = list(given[0]), given[1]
    for place, word in changes:
        words[1 + place % (len(words) - 1)] = word
    for name, content in FILES.items():
        written(folder, content, name)
    (folder / "link").symlink_to("gone")
    (folder / "loop").symlink_to("loop")
    (folder / "run").mkdir()
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        try:
            code = main(words)
        except SystemExit as end:
            code = end.code
    lines = said.getvalue().rstrip("\n").split("\n")
    if code == 2:
        raise UserError(re.sub(r"^distlora[a-z ]*: (error: )?", "", lines[-1]))
    assert code in (0, 1, 75), (code, lines)


_PLACES = ("link", "loop", "recipe.yaml/x", "link/x", ".", "/dev/zero", "/", "-1", "7", "x=1", "a" * 300)
_WORDS = st.one_of(
    st.sampled_from(HOSTILE), st.sampled_from(_PLACES), damaged_text(["7", "1e3", "run"], most=2)
).filter(_is_a_word)
_CHANGES = st.lists(st.tuples(st.integers(0, 9), _WORDS), min_size=1, max_size=2)
LOADERS = (
    Loader("answers", damaged([FILES["answers.jsonl"].encode()], [b'"output": ']), _judged),
    Loader("command line", st.tuples(st.sampled_from(COMMANDS), _CHANGES), _command),
)
