"""A sweep as a YAML file.

recipe: configs/recipes/smollm2-gsm8k.yaml
common: {train.steps: 60}                                       # of all points
grid: {train.seed: [1, 2], method.rank: [16, 32]}               # every combination
list:                                                           # each of these with each combination
- {method.name: lora, train.lr: 1e-3}
- {method.name: lora_sb, train.lr: 4e-3}
evaluate: [gsm8k]                       # after training: `distlora eval RUN --tasks gsm8k`
"""

import itertools
import math
import os
import re
import shutil
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from distlora.errors import UserError
from distlora.files.user_paths import is_file, user_path
from distlora.files.user_texts import read_user_text
from distlora.recipe.shipped import file_or_shipped
from distlora.recipe.strict import show, validate
from distlora.recipe.yaml_text import DEEPEST, parse_yaml
from distlora.sweeps.points import Point, override_of, point_of
from distlora.sweeps.quoting import words_of
from distlora.tasks import SUITES, scored_tasks

Text = Annotated[str, Field(min_length=1)]
Words = list[Text]
Overrides = dict[str, Any]
Entries = list[Overrides]


class Evaluation(BaseModel):
    """`evaluate: [gsm8k]` stands for `{tasks: [gsm8k]}`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    tasks: Annotated[Words, Field(min_length=1)] = Field(description="that every trained point is scored on")
    limit: Annotated[int, Field(ge=1)] | None = Field(None, description="questions of each task; null: all")
    batch_size: Annotated[int, Field(ge=1)] | None = Field(None, description="rows of a batch at most")
    data: dict[str, Text] = Field({}, description="task -> its data, where that is not the task's own")

    @property
    def words(self) -> list[str]:
        """The options of `distlora eval`."""
        numbers = {"--limit": self.limit, "--batch-size": self.batch_size}
        given = [word for name, number in numbers.items() if number for word in (name, str(number))]
        data = [word for task, path in self.data.items() for word in ("--data", f"{task}={path}")]
        return ["--tasks", ",".join(self.tasks), *given, *data]

    @property
    def settings(self) -> dict[str, str]:
        """What decides the predictions of each task, by task: `distlora eval` goes on with no others."""
        paths = {task: path for name, path in self.data.items() for task in SUITES.get(name, [name])}
        limit = "" if self.limit is None else self.limit
        return {task: f"limit={limit} data={paths.get(task, '')}" for task in scored_tasks(self.tasks)}


def _tasks_alone(given: Any) -> Any:
    return given if isinstance(given, dict) or given is None else {"tasks": given}


class SweepFile(BaseModel):
    """The keys of the file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    recipe: Text = Field(
        description="that the points change; looked up here, then beside the sweep and above"
    )
    name: Text | None = Field(None, description="null: the name of the file")
    output: Text | None = Field(None, description="the points' directories are in it; null: runs/NAME")
    common: Overrides = Field({}, description="overrides of all points, which a point's own win over")
    grid: dict[str, Annotated[list[Any], Field(min_length=1)]] = Field(
        {}, description="key -> its values; every combination is a point"
    )
    list: Entries = Field(
        [], description="the own keys of a point each; with a grid, each joins every combination"
    )
    evaluate: Annotated[Evaluation | None, BeforeValidator(_tasks_alone)] = Field(
        None, description="tasks, or {tasks: [...], limit: N}"
    )
    launcher: Text | Words | None = Field(
        None, description="the words that start the program; null: this Python, `python -m distlora`"
    )


@dataclass(frozen=True)
class Sweep:
    """A sweep that can be run. launcher: its words; None for this Python."""

    path: Path
    recipe: Path
    output: Path
    points: tuple[Point, ...]
    evaluation: Evaluation | None
    launcher: tuple[str, ...] | None

    def command(self, verb: str, *arguments: str) -> list[str]:
        """The words that start the program with a verb: in the place of the word {verb}, or at the end."""
        launcher = self.launcher or (sys.executable, "-m", "distlora")
        placed = [verb if word == "{verb}" else word for word in launcher]
        return [*placed, *([] if "{verb}" in launcher else [verb]), *arguments]


def read_sweep_file(
    path: str | os.PathLike[str], overrides: Sequence[str] = (), launcher: str | None = None
) -> Sweep:
    """The sweep in a YAML file.

    path: of a file, or the name of a sweep that comes with distlora. overrides: of all points, after the
    file's `common`. launcher: replaces the file's. Raises UserError for a file that is none, for a mistake in
    its keys, and for points that contradict each other.
    """
    path = file_or_shipped(path, "sweeps")
    content = _content(path)
    file = validate(SweepFile, content, "", lambda key: f"{path}: {key}" if key else str(path))
    if file.name and not re.fullmatch(r"[\w+-][\w.+-]*", file.name, re.ASCII):
        raise UserError(f"{path}: name: found {show(file.name)}, wanted letters, digits and . _ + -")
    output = user_path(file.output or os.path.join("runs", file.name or path.stem), f"{path}: output")
    shared = (*(override_of(key, value) for key, value in file.common.items()), *overrides)
    points = _points(file, path, shared, overrides, output)
    words = (
        _words(launcher, "--launcher") if launcher is not None else _words(file.launcher, f"{path}: launcher")
    )
    return Sweep(path, _recipe(file.recipe, path), output, tuple(points), file.evaluate, words)


def _content(path: Path) -> dict[str, Any]:
    content = parse_yaml(read_user_text(path, "a sweep"), str(path))
    if isinstance(content, dict) and "recipe" not in content and {"model", "method"} & content.keys():
        raise UserError(f"{path} is a recipe and no sweep; give it to `distlora train`")
    if not isinstance(content, dict):
        raise UserError(
            f"{path} is no sweep: wanted a mapping with the keys {', '.join(SweepFile.model_fields)}"
        )
    return content


def _recipe(name: str, path: Path) -> Path:
    for folder in (Path(), *path.absolute().parents):
        if is_file(folder / name):
            return folder / name
    shipped = file_or_shipped(name)
    if is_file(shipped):
        return shipped
    raise UserError(f"{path}: recipe: no file {name} here, beside the sweep or in a folder above it")


def _words(given: str | Sequence[str] | None, name: str) -> tuple[str, ...] | None:
    """The launcher's words."""
    if given is None:
        return None
    words = words_of(given, name) if isinstance(given, str) else given
    if not words:
        raise UserError(f"{name} has no words; leave it out for this Python")
    if shutil.which(words[0]) is None:
        raise UserError(f"{name}: there is no program {words[0]} here")
    return tuple(words)


# ---------------------------------------------------------------------- points

#: Points of a sweep.
MOST = 10_000


def _points(
    file: SweepFile, path: Path, shared: tuple[str, ...], overrides: Sequence[str], output: Path
) -> Iterable[Point]:
    if math.prod(map(len, file.grid.values())) * len(file.list or [{}]) > MOST:
        raise UserError(f"{path} has more than {MOST:,} points; make several sweeps of it")
    if not file.grid and not file.list:
        raise UserError(f"{path} has no points; give a grid (key: [value, …]) or a list of mappings")
    for number, entry in enumerate(file.list):
        if not entry:
            raise UserError(f"{path}: list.{number} is empty; give it a key that makes it a point")
        _refuse_overlap(entry, file.grid, f"{path}: list.{number}", "the grid")
    _refuse_overlap(file.grid, file.grid, f"{path}: grid", "the grid")
    given = [override.partition("=")[0].strip() for override in overrides]
    if "output_dir" in (*file.common, *given):
        raise UserError(f"{path}: output_dir is a point's own; set output, which holds them all")
    for entry in (file.grid, *file.list):
        _refuse_overlap(entry, given, str(path), "the command line")
    return [
        point_of(number, {**dict(zip(file.grid, values)), **entry}, shared, output)
        for number, (values, entry) in enumerate(
            itertools.product(itertools.product(*file.grid.values()), file.list or [{}])
        )
    ]


def _refuse_overlap(keys: Iterable[str], others: Iterable[str], place: str, where: str) -> None:
    """Raises UserError where one key sets what another, or a section of it, sets as well."""
    same, names = keys is others, set(others)
    within = {section: other for other in names for section in _sections(other)}
    for key in keys:
        around = (*_sections(key), *([] if same else [key]))
        other = within.get(key) or next((section for section in around if section in names), None)
        if other is not None:
            raise UserError(f"{place} sets {key}, and {where} sets {other}; leave one of them out")


def _sections(key: str) -> list[str]:
    """Those that a key lies in: a and a.b for a.b.c."""
    parts = key.split(".")[:DEEPEST]
    return [".".join(parts[:count]) for count in range(1, len(parts))]
