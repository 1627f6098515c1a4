"""Reads a DeepSpeed config from its JSON file."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from distlora.errors import UserError
from distlora.files.user_paths import expanded


def read_deepspeed(
    path: str, folders: Iterable[Path] = (Path(),), place: str = "deepspeed"
) -> tuple[dict, str]:
    """The DeepSpeed config in a JSON file, and the name of the file that was read.

    path: absolute, or relative to the first of `folders` that has it. place: what messages call the path.
    Raises UserError that names the file.
    """
    candidates = [folder / expanded(path) for folder in folders]
    found = next((candidate for candidate in candidates if candidate.is_file()), None)
    if found is None:
        raise UserError(
            f"{place}: no file {path} in the current folder, the recipe's or one above it; give a JSON file"
        )
    try:
        config = json.loads(found.read_text(encoding="utf-8"), object_pairs_hook=_unique_keys)
    except json.JSONDecodeError as error:
        where = f"at line {error.lineno}, column {error.colno}"
        raise UserError(
            f"{found} is not JSON: {error.msg} {where} (JSON has no comments and no trailing commas)"
        ) from None
    except OSError as error:
        raise UserError(f"{found} cannot be read: {error.strerror or error}") from None
    except ValueError as error:
        raise UserError(f"{found} is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise UserError(f"{found} is no DeepSpeed config: a JSON object is wanted")
    return config, str(found)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict:
    keys = [key for key, _ in pairs]
    twice = next((key for index, key in enumerate(keys) if key in keys[:index]), None)
    if twice is not None:
        raise ValueError(f"key {twice} is given twice")
    return dict(pairs)
