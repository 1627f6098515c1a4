"""Whether a run goes on with the samples that it was begun with: `data.json` in its directory."""

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from distlora.data import fingerprint_of
from distlora.engine.comm import Comm
from distlora.engine.coordination import on_every_rank
from distlora.errors import UserError
from distlora.files.atomic import write_text
from distlora.files.json_files import read_json
from distlora.recipe.sections import Recipe
from distlora.training.run_directory import DATA
from distlora.training.samples import RunSamples

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SeenData:
    """For "training" and each evaluation set: the split and the fingerprint of its samples."""

    parts: Mapping[str, Mapping[str, Any]]

    def write(self, run_dir: Path) -> None:
        write_text(run_dir / DATA, json.dumps(self.parts, indent=1) + "\n")

    def compare(self, run_dir: Path, allow_changes: bool) -> None:
        """Raises UserError if the samples are others than those in the run directory, or in another order,
        unless changes are allowed; then they are told in the log. A directory that tells nothing of them is
        of an older run. For rank 0.
        """
        difference = self.difference_from(_read(run_dir))
        if difference is None:
            return
        if not allow_changes:
            raise UserError(
                f"data: {difference}; bring back those that {run_dir} was begun with, or continue with "
                "these by --allow-changed-data"
            )
        log.warning("--allow-changed-data: %s; the run goes on with these", difference)

    def difference_from(self, before: Mapping[str, Any]) -> str | None:
        """The first difference in words. Other splits are no difference: the recipe may name another one to
        evaluate on."""
        for name, now in self.parts.items():
            then = before.get(name)
            if then is None or then["split"] != now["split"] or then["ordered"] == now["ordered"]:
                continue
            what = f"the {name} samples (split {now['split']})"
            if then["unordered"] == now["unordered"] and then["count"] == now["count"]:
                return f"{what} are in another order than before"
            return f"{what} have changed ({then['count']} before, {now['count']} here)"
        return None


def _read(run_dir: Path) -> dict[str, Any]:
    file = run_dir / DATA
    if not file.exists():
        return {}
    try:
        found = read_json(file)
        keys = {"split", "count", "ordered", "unordered"}
        if all(keys <= part.keys() for part in found.values()):
            return found
    except (ValueError, AttributeError):
        pass
    raise UserError(f"{file} is damaged; remove it to continue without comparing the data")


def seen_by(comm: Comm, recipe: Recipe, data: RunSamples) -> SeenData:
    """What this run reads. Collective. Raises UserError, on all ranks, if they do not all read the same."""
    read = {"training": (recipe.data.split, data.training)}
    for each in data.evaluated:
        name = f"evaluation ({each.name})" if each.name else "evaluation"
        read[name] = (each.objective.recipe.data.eval_split, each.samples)
    parts = on_every_rank(comm, lambda: {name: _part(*what) for name, what in read.items()})
    main = comm.share(parts)

    def check() -> None:
        different = [name for name, part in parts.items() if part != main[name]]
        if different:
            raise UserError(
                f"data: the {different[0]} samples of rank {comm.rank} are others than those of rank 0; give "
                "all hosts the same files"
            )

    on_every_rank(comm, check)
    return SeenData(main)


def _part(split: str, samples: list) -> dict[str, Any]:
    return {"split": split, **asdict(fingerprint_of(samples))}
