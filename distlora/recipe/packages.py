"""Packages that a recipe needs and that this machine lacks: all of them in one sentence."""

import importlib.metadata
import re
from typing import Any

from distlora.adapter.packed import library
from distlora.engine.optimizers import OptimizerSpec
from distlora.errors import UserError
from distlora.files.packages import is_installed
from distlora.recipe.sections import Recipe

#: DeepSpeed's monitors that need a package: its name, and the oldest version that will do.
_MONITORS = {
    "tensorboard": ("tensorboard", None),
    "wandb": ("wandb", None),
    "comet": ("comet_ml", "3.41.0"),
}


def check_packages(recipe: Recipe, config: dict[str, Any]) -> None:
    """Raises UserError for the packages that are not there. config: the resolved DeepSpeed config, {} without
    DeepSpeed.
    """
    problems = [OptimizerSpec(recipe.train.optimizer.name).problem(), _of_monitors(recipe, config)]
    if recipe.model.quantization is not None:
        try:
            library()
        except UserError as error:
            problems.append(str(error))
    found = [problem for problem in problems if problem]
    if found:
        raise UserError("; and ".join(found))


def _of_monitors(recipe: Recipe, config: dict[str, Any]) -> str | None:
    on = [name for name in _MONITORS if config.get(name, {}).get("enabled")]
    lacking = {name: wanted for name in on if (wanted := _lacking(*_MONITORS[name]))}
    if not lacking:
        return None
    needs = ", ".join(f"{name} needs the package {wanted}" for name, wanted in lacking.items())
    are = "is" if len(lacking) == 1 else "are"
    return (
        f"{recipe.deepspeed_source}: {needs}, which {are} not installed; "
        f"pip install {' '.join(map(_quoted, lacking.values()))}, or set enabled to false"
    )


def _quoted(requirement: str) -> str:
    return f"'{requirement}'" if ">" in requirement else requirement


def _lacking(package: str, oldest: str | None) -> str | None:
    """What pip has to be asked for; None if the package is there."""
    if is_installed(package) and (oldest is None or _version(package) >= _numbers(oldest)):
        return None
    return package if oldest is None else f"{package}>={oldest}"


def _version(package: str) -> list[int]:
    try:
        return _numbers(importlib.metadata.version(package))
    except importlib.metadata.PackageNotFoundError:  # a folder of this name
        return []


def _numbers(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version)[:3]]
