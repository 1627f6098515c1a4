"""Reads a DeepSpeed config from its JSON file."""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from distlora.errors import UserError
from distlora.files.user_paths import is_file, user_path
from distlora.files.user_texts import parse_json, read_user_text

#: Words that YAML once read as truth values, and that DeepSpeed would take for texts, which are true.
_WORDS = ("yes", "no", "on", "off", "y", "n")


def read_deepspeed(
    path: str, folders: Iterable[Path] = (Path(),), place: str = "deepspeed"
) -> tuple[dict, str]:
    """The DeepSpeed config in a JSON file, and the name of the file that was read.

    path: absolute, or relative to the first of `folders` that has it. place: what messages call the path.
    Raises UserError that names the file.
    """
    wanted = user_path(path, place)
    found = next((folder / wanted for folder in folders if is_file(folder / wanted)), None)
    if found is None:
        raise UserError(
            f"{place}: no file {path} in the current folder, the recipe's or one above it; give a JSON file"
        )
    config = parse_json(read_user_text(found, "a DeepSpeed config"), str(found))
    if not isinstance(config, dict):
        raise UserError(f"{found} is no DeepSpeed config: a JSON object is wanted")
    return config, str(found)


def refuse_words(section: Any, key: str, place) -> None:
    """Raises UserError for what a DeepSpeed config in a recipe can hold and one in JSON cannot: words such as
    yes and no, meant as truth values, and numbers that are not finite.
    """
    if isinstance(section, dict | list):
        for name, value in section.items() if isinstance(section, dict) else enumerate(section):
            refuse_words(value, f"{key}.{name}", place)
    if isinstance(section, str) and section.lower() in _WORDS:
        raise UserError(f"{place(key)}: found {section}, wanted true or false")
    if isinstance(section, float) and not math.isfinite(section):
        raise UserError(f"{place(key)}: found {section}, wanted a finite number")
