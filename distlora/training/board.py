"""What TensorBoard shows of a run beside its curves: the recipe, the environment, and a line in the table of
hyperparameters with the final scores.
"""

import json
import os
import socket
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from distlora.cluster.environment import ENVIRONMENT
from distlora.engine.protocol import Engine
from distlora.files.confidential import hidden
from distlora.files.json_files import read_json
from distlora.recipe.load import run_identity
from distlora.recipe.sections import Recipe
from distlora.training.run_directory import RECIPE

#: Settings that the table has in any case. Of the method and of training it has also those that decide what a
#: run learns and are not at their defaults.
ALWAYS = (
    "method.name", "method.rank", "train.lr", "train.global_batch_size", "train.steps", "train.seed",
    "model.path", "data.task",
)  # fmt: skip


def begin_board(engine: Engine, run_dir: Path, step: int) -> None:
    """At the beginning of a start, before its first scalar. step: from which it goes on."""
    engine.on_board(lambda writer: _begin(writer, run_dir, step))


def _begin(writer: Any, run_dir: Path, step: int) -> None:
    if step == 0:
        _remove_earlier_runs(writer, run_dir)
    _forget_later_steps(writer, step)
    for tag, text in (("recipe", _recipe(run_dir)), ("environment", _environment(run_dir))):
        if text:
            writer.add_text(tag, _verbatim(text), step)


def begin_table(engine: Engine, recipe: Recipe, scores: Iterable[str]) -> None:
    """The run's line in the table of hyperparameters. scores: the names of those that evaluations find, of
    which the table shows the newest values.
    """
    engine.on_board(lambda writer: [_add(writer, part) for part in _hparams(recipe, scores)[:2]])


def end_table(engine: Engine, recipe: Recipe) -> None:
    """The run is done: so says the table."""
    engine.on_board(lambda writer: _add(writer, _hparams(recipe, ())[2]))


def _add(writer: Any, summary: Any) -> None:
    writer.file_writer.add_summary(summary)


def _remove_earlier_runs(writer: Any, run_dir: Path) -> None:
    """The event files of other processes, of a run that begins anew. What lies outside of the run directory
    stays: others may write there.
    """
    folder = Path(writer.log_dir)
    if folder.resolve().is_relative_to(run_dir.resolve()):
        own = f".{socket.gethostname()}.{os.getpid()}."
        for path in folder.glob("events.out.tfevents.*"):
            if own not in path.name:
                path.unlink()


def _forget_later_steps(writer: Any, step: int) -> None:
    """Points of later steps, by a start that did not save them, are hidden: this one makes them again."""
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog

    first = step + 1 if step else 0
    writer.file_writer.add_event(Event(step=first, session_log=SessionLog(status=SessionLog.START)))


def _recipe(run_dir: Path) -> str:
    """As it stands in the run directory, so that no secret is in it."""
    path = run_dir / RECIPE
    return path.read_text(encoding="utf-8") if path.exists() else ""


def _environment(run_dir: Path) -> str:
    """Of this start, as it stands in the run directory, so that no secret is in it."""
    path = run_dir / ENVIRONMENT
    starts = read_json(path) if path.exists() else []
    return json.dumps(starts[-1], indent=2) if starts else ""


def _verbatim(text: str) -> str:
    """A block of code in Markdown, which nothing in the text can end."""
    return "".join(f"    {line}\n" for line in text.splitlines())


def _hparams(recipe: Recipe, scores: Iterable[str]) -> tuple[Any, Any, Any]:
    """The three records of a run in the table. A score is named by its curve, whose last value is shown."""
    from torch.utils.tensorboard.summary import hparams

    metrics = dict.fromkeys(["train/loss", *(f"eval/{name}" for name in scores)], 0.0)
    return hparams(hyperparameters(recipe), metrics)


def hyperparameters(recipe: Recipe) -> dict[str, bool | int | float | str]:
    """The settings of a run that decide what it learns, by dotted key."""
    changed = dict(_flat(recipe.model_dump(mode="json", exclude_defaults=True)))
    return {
        key: hidden(value) if isinstance(value, str) else value
        for key, value in _flat(run_identity(recipe))
        if value is not None and (key in ALWAYS or (key in changed and key.startswith(("method.", "train."))))
    }


def _flat(content: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(content, dict):
        for name, value in content.items():
            yield from _flat(value, f"{key}.{name}" if key else name)
    elif isinstance(content, list):
        yield key, ", ".join(map(str, content))
    else:
        yield key, content
