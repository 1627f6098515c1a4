"""The lines of a sweep: each holds the overrides of one run.

Launch scripts read them before a run, so that this file must import quickly.
"""

import os
from collections.abc import Sequence

from distlora.errors import UserError
from distlora.files.confidential import shown_word
from distlora.files.user_texts import read_user_text
from distlora.recipe.yaml_text import parse_yaml
from distlora.sweeps.quoting import words_of


def read_sweep(path: str | os.PathLike[str]) -> list[list[str]]:
    """The words of every line, quoted as in a shell. Empty lines, and those that begin with #, do not count.

    Raises UserError for a file that cannot be read, and for a line that is not a list of overrides.
    """
    text = read_user_text(path, "a sweep")
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    if not lines:
        raise UserError(f"{path} is empty; write a line of overrides for each run")
    return [_words(line, f"{path}: line {number}") for number, line in enumerate(lines)]


def _words(line: str, name: str) -> list[str]:
    words = words_of(line, name)
    stray = next((word for word in words if "=" not in word or word.startswith("-")), None)
    if stray is not None:
        raise UserError(
            f"{name}: '{shown_word(stray)}' is no dotted.key=value; put the whole override in quotes "
            "where it has spaces"
        )
    return words


def line_of(path: str | os.PathLike[str], number: int, lines: Sequence[list[str]]) -> list[str]:
    """The words of one line, counted from 0. Raises UserError if there is no such line."""
    if not 0 <= number < len(lines):
        raise UserError(
            f"{path} has no line {number}, only {len(lines)}, counted from 0; "
            f"sbatch --array=0-{len(lines) - 1}"
        )
    return lines[number]


def check_directories(
    path: str | os.PathLike[str], lines: Sequence[list[str]], recipe: str, common: Sequence[str] = ()
) -> None:
    """Raises UserError if two lines would train into the same directory.

    common: the overrides that come before those of every line.
    """
    own, first = _own_directory(recipe), dict[str, int]()
    for index, words in enumerate(lines):
        directory = _directory([*common, *words], own)
        if directory in first:
            raise UserError(
                f"{path}: lines {first[directory]} and {index} share the output directory {directory}; "
                "give each line an output_dir of its own"
            )
        first[directory] = index


def _own_directory(recipe: str) -> object:
    """The recipe's output directory; None if it has none. The run will say what is wrong with the recipe."""
    try:
        content = parse_yaml(read_user_text(recipe, "a recipe"), recipe)
    except UserError:
        return None
    return content.get("output_dir") if isinstance(content, dict) else None


def _directory(overrides: Sequence[str], default: object) -> str:
    chosen = default
    for override in overrides:
        key, _, text = override.partition("=")
        if key.strip() == "output_dir":
            chosen = parse_yaml(text, f"override {override}")
    return os.path.abspath(str(chosen))
