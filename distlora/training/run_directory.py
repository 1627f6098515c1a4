"""A run directory: who it belongs to, what is in it, and how a run is continued or begun anew."""

import logging
import shutil
from datetime import date as Date
from pathlib import Path
from typing import Any

from distlora.checkpoints.best import BEST
from distlora.checkpoints.directory import Checkpoint, newest
from distlora.checkpoints.soundness import MARK, soundness
from distlora.checkpoints.stored import MANIFEST
from distlora.cluster.environment import ENVIRONMENT
from distlora.cluster.lease import clear_drafts, make_run_dir
from distlora.cluster.logs import LOGS
from distlora.cluster.status import STATUS
from distlora.errors import UserError
from distlora.exports.draft import refuse_others
from distlora.exports.peft import ADAPTER_CONFIG, ADAPTER_FILES
from distlora.files.atomic import remove, write_text
from distlora.files.problems import dangling_link
from distlora.methods import TrainsWeight
from distlora.recipe.load import dump_recipe, load_run_recipe, run_identity
from distlora.recipe.sections import Recipe

log = logging.getLogger(__name__)

RECIPE, METRICS, RECOMPOSITIONS, ADAPTER = "recipe.yaml", "metrics.jsonl", "recompositions.jsonl", "adapter"
RATE_SEARCH, SUMMARY, EVALUATIONS, DATA = "lr_search.json", "summary.json", "eval", "data.json"
BAD_STEPS = "bad_steps"


def check_run_dir(recipe: Recipe, resume: bool | None) -> None:
    """Raises UserError if the directory holds another recipe's run, no checkpoint where one is demanded, or
    in the adapter's place what an export would not replace.

    resume: True demands a checkpoint, None takes one if it is there, False begins anew. Reads only.
    """
    run_dir = Path(recipe.output_dir)
    link = dangling_link(run_dir)
    if link:
        raise UserError(f"output_dir: {link}; name another directory, or make what the link leads to")
    if run_dir.exists() and not run_dir.is_dir():
        raise UserError(f"output_dir: {run_dir} is a file; name a directory")
    if resume is not False and not isinstance(recipe.method, TrainsWeight):
        refuse_others(run_dir / ADAPTER, ADAPTER_FILES)  # and not only after the last step
    if not (run_dir / RECIPE).exists():
        if resume:
            raise UserError(f"--resume: {run_dir} holds no run; start it without --resume")
        if run_dir.exists() and any(run_dir.glob("checkpoint-*")):
            raise UserError(
                f"output_dir: {run_dir} holds checkpoints but no {RECIPE}; name another directory"
            )
        return
    if not _was_begun(run_dir):
        return
    difference = first_difference(run_identity(load_run_recipe(run_dir / RECIPE)), run_identity(recipe))
    if difference:
        raise UserError(
            f"output_dir: {run_dir} holds the run of another recipe ({difference}); name another directory"
        )


def _was_begun(run_dir: Path) -> bool:
    """Whether the directory holds a run. A start that was refused leaves a recipe, which binds nobody."""
    begun = (run_dir / METRICS).exists() or any(run_dir.glob("checkpoint-*"))
    return begun and (run_dir / RECIPE).exists()


def with_format_of_run(recipe: Recipe, resume: bool | None = None) -> Recipe:
    """The recipe in the format that its run was begun with, and with the day that its chat template sees. A
    run that begins keeps the recipe's own format, and sees the day on which it begins.

    Raises UserError if the recipe names another day than that of the run.
    """
    run_dir, day = Path(recipe.output_dir), recipe.data.chat_date
    if resume is False or not _was_begun(run_dir):
        return _on_day(recipe, day or Date.today().isoformat()) if recipe.format >= 4 else recipe
    begun = load_run_recipe(run_dir / RECIPE)
    if day is not None and day != begun.data.chat_date:
        raise UserError(
            f"data.chat_date={day}: the run in {run_dir} was begun with {begun.data.chat_date}; "
            "leave it out, or name another output_dir"
        )
    return _on_day(recipe.in_format(begun.format), begun.data.chat_date)


def _on_day(recipe: Recipe, day: str | None) -> Recipe:
    """The recipe as it is on a day, where a chat template could look at the calendar."""
    if recipe.data.chat_date == day or not recipe.shows_chats:
        return recipe
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"chat_date": day})})


def find_checkpoint(recipe: Recipe, resume: bool | None) -> Checkpoint | None:
    """The checkpoint to continue from. For rank 0; changes nothing.

    Raises UserError where there is nothing whole to continue from, though the run was begun or a checkpoint
    is demanded.
    """
    run_dir = Path(recipe.output_dir)
    if resume is False:
        return None
    found = newest(run_dir)
    if found is None and resume:
        raise UserError(f"--resume: {run_dir} holds no complete checkpoint; start it without --resume")
    if found is None and any(run_dir.glob("checkpoint-*")):
        refuse_without_checkpoint(run_dir)
    return found


def refuse_without_checkpoint(run_dir: Path) -> None:
    """Raises UserError for a run that was begun and has no checkpoint to continue from."""
    broken = "every checkpoint is broken"
    if any(soundness(path) == "bad" for path in run_dir.glob("checkpoint-*")):
        broken = f"every checkpoint is broken, or marked bad in its {MARK}"
    raise UserError(f"{run_dir}: {broken}; --no-resume removes them and begins anew")


def claim_run_dir(recipe: Recipe, resume: bool | None) -> None:
    """Writes the recipe into the directory, which from now on is this run's; forgets an earlier one that is
    not resumed.
    """
    run_dir, recipe = Path(recipe.output_dir), with_format_of_run(recipe, resume)
    make_run_dir(run_dir)
    _clear_drafts(run_dir)
    if resume is False:
        _forget(run_dir)
    write_text(run_dir / RECIPE, dump_recipe(recipe))


def _clear_drafts(run_dir: Path) -> None:
    """Removes what a kill has left amid the writing of a file; of checkpoints the next save does."""
    texts = (RECIPE, METRICS, RECOMPOSITIONS, RATE_SEARCH, SUMMARY, ENVIRONMENT, BEST)
    for name in (*texts, f"{STATUS}.*", ADAPTER):
        for draft in run_dir.glob(f".{name}.partial"):
            remove(draft)
    clear_drafts(run_dir)


def why_no_run(path: Path) -> str:
    """What a path without a run's recipe is, as the end of a sentence that says what to give instead."""
    if not path.is_dir():
        return "it is a file; name a run's directory" if path.exists() else "there is no such directory"
    if (path / MANIFEST).is_file():
        return f"it is a checkpoint; name the directory of its run, {path.absolute().parent}"
    if (path / ADAPTER_CONFIG).is_file():
        return f"it has no {RECIPE}; it is an adapter, which `distlora eval --model BASE --adapter DIR` takes"
    return f"it has no {RECIPE}"


def _forget(run_dir: Path) -> None:
    # Killed between two renames, one lies under another name, from which runs go on too.
    for checkpoint in [*run_dir.glob("checkpoint-*"), *run_dir.glob(".checkpoint-*")]:
        log.info("beginning anew: removing %s", checkpoint)
        shutil.rmtree(checkpoint)
    # An export takes the adapter if it is of a later step than every checkpoint.
    # Predictions and scores are of the checkpoints that are removed.
    for name in (ADAPTER, LOGS, EVALUATIONS, BAD_STEPS):
        shutil.rmtree(run_dir / name, ignore_errors=True)
    for name in (METRICS, RECOMPOSITIONS, RATE_SEARCH, SUMMARY, ENVIRONMENT, STATUS, DATA, BEST):
        (run_dir / name).unlink(missing_ok=True)


def first_difference(there: Any, here: Any, key: str = "") -> str | None:
    """The first value in which two nested dictionaries differ, in words; None if they are equal."""
    if isinstance(there, dict) and isinstance(here, dict):
        for name in there | here:
            found = first_difference(there.get(name), here.get(name), f"{key}.{name}" if key else name)
            if found:
                return found
        return None
    return None if there == here else f"{key} is {there} there and {here} here"
