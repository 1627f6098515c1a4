"""One point of a sweep: a run's overrides, and the directory that is named after them."""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distlora.errors import UserError
from distlora.recipe.yaml_text import parse_yaml

#: Characters of a directory's name. With the digest, file systems and the drafts of files have room for it.
LONGEST_NAME = 120
_DIGEST = 10
_UNSAFE = re.compile(r"[^\w.+-]", re.ASCII)


@dataclass(frozen=True)
class Point:
    """A run of a sweep.

    number: its place in the sweep, from 0 on. name: of its directory, made of its own keys; it stays the same
    when other points are added. overrides: all that change the recipe, `output_dir` last.
    """

    number: int
    name: str
    overrides: tuple[str, ...]
    run_dir: Path

    @property
    def title(self) -> str:
        """How sentences call the point."""
        return f"point {self.number} ({self.name})"


def point_of(number: int, own: Mapping[str, Any], shared: tuple[str, ...], output: Path) -> Point:
    """The point with these own keys, after overrides that all points share."""
    name = name_of(own)
    overrides = [*shared, *(override_of(key, value) for key, value in own.items())]
    run_dir = output / name
    if "output_dir" in own:
        run_dir = Path(str(own["output_dir"]))
    else:
        overrides.append(override_of("output_dir", str(run_dir)))
    return Point(number, name, tuple(overrides), run_dir)


def name_of(own: Mapping[str, Any]) -> str:
    """A directory's name, such as `method=lora_sb,train.lr=0.004`, from a point's own keys.

    A digest of the values is added where the readable part is shortened, or lost characters.
    """
    named = {key: value for key, value in own.items() if key != "output_dir"} or own
    exact = ",".join(f"{key.removesuffix('.name')}={_shown(value)}" for key, value in named.items())
    name = ",".join(
        f"{_UNSAFE.sub('_', key.removesuffix('.name'))}={_UNSAFE.sub('_', _shown(value))}"
        for key, value in named.items()
    )
    if name == exact and len(name) <= LONGEST_NAME:
        return name
    digest = hashlib.sha256(json.dumps(named, sort_keys=True, default=str).encode()).hexdigest()[:_DIGEST]
    return f"{name[: LONGEST_NAME - _DIGEST - 1]}-{digest}"


def override_of(key: str, value: Any) -> str:
    """`key=value`, from which a recipe reads the same value. It is in JSON, which is YAML, but for texts that
    need no quotation marks.
    """
    return f"{key}={_shown(value)}"


def _shown(value: Any) -> str:
    if isinstance(value, str) and _is_plain(value):
        return value
    return json.dumps(value, ensure_ascii=False, default=str)


def _is_plain(text: str) -> bool:
    """Whether YAML reads the text as itself, without quotation marks."""
    try:
        return bool(parse_yaml(text, "") == text)
    except UserError:
        return False
