"""`distlora train --dry-run`: what a run would do, as text."""

import os
from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import Any

from distlora.errors import UserError

#: Characters of a part of a sample that are shown: of a longer one both ends.
_BEGINNING, _END = 1500, 500
#: Codes of a terminal: (trained, special) -> attributes. Special tokens are underlined.
_LOOKS = {(True, False): "32", (True, True): "32;4", (False, False): "2", (False, True): "2;4"}
#: What stands around trained tokens where there are no colours; the second where it cannot be written.
_BRACKETS, _ASCII_BRACKETS = ("⟦", "⟧"), ("[[", "]]")


def in_colour(stream) -> bool:
    """Whether a text on this stream may have colours."""
    return bool(stream.isatty()) and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def title(text: str, coloured: bool) -> str:
    line = f"── {text} "
    return f"\x1b[1m{line}\x1b[0m" if coloured else line.rstrip()


def recipe_text(recipe, world_size: int) -> str:
    """The recipe with every default, and every "auto" of its DeepSpeed config as this many ranks would have
    it. Errors: UserError."""
    from distlora.recipe.deepspeed_config import resolve_deepspeed
    from distlora.recipe.load import dump_recipe

    if recipe.deepspeed is not None:
        resolved, _ = resolve_deepspeed(recipe, world_size, _hidden_size(recipe))
        recipe = recipe.model_copy(update={"deepspeed": resolved})
    return dump_recipe(recipe).rstrip()


def _hidden_size(recipe) -> int | None:
    from distlora.models.hub import without_weights
    from distlora.training.objective import objective_of

    path = without_weights(recipe.model.path)
    config = objective_of(
        recipe.model_copy(update={"model": recipe.model.model_copy(update={"path": path})})
    ).load_config()
    return getattr(config.get_text_config(decoder=True), "hidden_size", None)


def plan_text(recipe, world_size: int) -> str:
    """The plan for this many ranks; for one, for nodes with all their GPUs. Errors: UserError."""
    import torch

    from distlora.plan import side_by_side
    from distlora.plan.table import table

    memory = torch.cuda.get_device_properties(0).total_memory / 2**30 if torch.cuda.is_available() else 80
    gpus = world_size if world_size > 1 or recipe.deepspeed is None else torch.cuda.device_count() or 8
    try:
        return table(side_by_side(recipe, [1] if world_size > 1 else [1, 2, 4], gpus), gpus, memory)
    except UserError:
        if gpus == world_size:
            raise
        return table(side_by_side(recipe, [1], 1), 1, memory)  # the batch divides among no more


def legend(coloured: bool, encoding: str | None) -> str:
    """How the loss mask is shown."""
    if coloured:
        trained, rest = _painted("trained", (True, False)), _painted("not trained", (False, False))
        return f"{trained}, {rest}; special tokens are underlined, ↵ is a line break"
    first, last = _brackets(encoding)
    return f"trained tokens stand between {first} and {last}"


def sample_text(number: int, preview, coloured: bool, encoding: str | None) -> str:
    """A `Preview` on several lines. encoding: of the stream that it is for."""
    label = "" if preview.label is None else f", label {preview.label}"
    text = "".join(_coloured(preview.parts) if coloured else _plain(preview.parts, _brackets(encoding)))
    return "\n".join(filter(None, [f"sample {number}: {preview.size}{label}", text]))


def _coloured(parts: Iterable[Any]) -> Iterator[str]:
    for part in parts:
        text = _shortened(printable(part.text).replace("\n", "↵\n"))
        for line in text.splitlines(keepends=True):  # a pager takes each line by itself
            shown, end = line.removesuffix("\n"), "\n" * line.endswith("\n")
            yield _painted(shown, (part.trained, part.special)) + end


def _painted(text: str, kind: tuple[bool, bool]) -> str:
    return f"\x1b[{_LOOKS[kind]}m{text}\x1b[0m" if text else ""


def _plain(parts: Iterable[Any], brackets: tuple[str, str]) -> Iterator[str]:
    for trained, group in groupby(parts, key=lambda part: part.trained):
        text = _shortened(printable("".join(part.text for part in group)))
        yield f"{brackets[0]}{text}{brackets[1]}" if trained else text


def _brackets(encoding: str | None) -> tuple[str, str]:
    try:
        "".join(_BRACKETS).encode(encoding or "utf-8")
    except (UnicodeEncodeError, LookupError):
        return _ASCII_BRACKETS
    return _BRACKETS


def printable(text: str) -> str:
    """The text without what a terminal would obey: control characters as escapes, but for line breaks and
    tabs."""
    return "".join(
        sign if sign.isprintable() or sign in "\n\t" else sign.encode("unicode_escape").decode()
        for sign in text
    )


def _shortened(text: str) -> str:
    left_out = len(text) - _BEGINNING - _END
    if left_out <= 0:
        return text
    return f"{text[:_BEGINNING]} … ({left_out:,} characters) … {text[-_END:]}"
