"""What the model card of an export says of a run: its method, its data and its scores."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distlora.data.sources import is_local
from distlora.exports.card import About, shown_data
from distlora.recipe.sections import Recipe
from distlora.tasks import get_task
from distlora.training.run_directory import SUMMARY


def about_run(
    recipe: Recipe, scores: Mapping[str, Mapping[str, float]], steps: int | None, folder: Path = Path()
) -> About:
    """scores: "before" and "after" training, by metric; empty where they are of another state of the run.
    steps: of the run, if that is known. folder: where relative paths of the recipe begin.
    """
    data, method, train = recipe.data, recipe.method, recipe.train
    path = data.path or get_task(data.task).path
    shown, hub = shown_data(path, path is not None and is_local(path, folder))
    return About(
        method.name,
        {
            "method": method.name, "rank": method.rank, "scaling": f"{method.scaling:g}", "steps": steps,
            "global batch": train.global_batch_size, "learning rate": train.lr, "seed": train.seed,
            "dtype in training": recipe.model.dtype,
        },
        {
            "task": data.task, "data set": shown, "split": data.split,
            "split of the evaluation": ", ".join(
                section.eval_split for section in data.evaluation_sections.values()
            )
            or None,
        },
        (hub,) if hub else (),
        scores,
    )  # fmt: skip


def scores_of(run_dir: Path, step: int) -> Mapping[str, Mapping[str, float]]:
    """The scores in a run's summary where they are those of this step; empty otherwise."""
    try:
        content: Any = json.loads((run_dir / SUMMARY).read_bytes())
        return {when: dict(content[when]) for when in ("before", "after")} if content["steps"] == step else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}
