"""What run directories hold, as a report needs it."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from distlora.cluster.environment import ENVIRONMENT
from distlora.cluster.status import Status, read_status
from distlora.errors import UserError
from distlora.files.problems import dangling_link
from distlora.recipe.load import load_run_recipe
from distlora.recipe.sections import Recipe
from distlora.report.inference_cost import InferenceCost, inference_cost
from distlora.report.records import as_number, has_step, is_count, metrics_problem, read_json, read_lines
from distlora.training.run_directory import (
    EVALUATIONS,
    METRICS,
    RATE_SEARCH,
    RECIPE,
    RECOMPOSITIONS,
    SUMMARY,
)

#: Who has measured a score that stands in the metrics of the run.
ITSELF = "training"
#: Settings in an evaluation's file that say which model was measured, or what other keys say as well.
NO_SETTINGS = ("model", "dtype", "checkpoint", "adapter", "by", "split", "limit")


@dataclass(frozen=True)
class Measured:
    """What a score is a score of: scores are compared only where all of this is equal.

    by: how, or by which program, it was measured. samples: their number; None: all of the split. settings:
    of the measurement, as texts.
    """

    task: str
    metric: str
    by: str = ITSELF
    data: str = ""
    split: str = ""
    samples: int | None = None
    settings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Score:
    """step: finished optimizer steps when it was measured; 0 is before training."""

    measured: Measured
    step: int
    value: float


@dataclass
class RunRecord:
    """A run as its directory tells it. Of files that are not there the content is empty.

    name: short, and different for every run of a report. starts: from environment.json, the oldest first.
    known_costs: of all runs of a report, since many share theirs.
    """

    directory: Path
    recipe: Recipe
    name: str = ""
    metrics: list[dict[str, Any]] = field(default_factory=list)
    recompositions: list[dict[str, Any]] = field(default_factory=list)
    starts: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    status: Status | None = None
    rate_search: dict[str, Any] = field(default_factory=dict)
    evaluations: list[Score] = field(default_factory=list)
    known_costs: dict[str, tuple[InferenceCost | None, str]] = field(default_factory=dict, repr=False)

    @cached_property
    def steps(self) -> int | None:
        """Optimizer steps of the whole run; None where only the length of the data says so."""
        known = (self.summary.get("steps"), self.status and self.status.steps, self.recipe.train.steps)
        return next((steps for steps in known if is_count(steps) and steps), None)

    @cached_property
    def reached(self) -> int:
        """Finished optimizer steps."""
        return max((record["step"] for record in self.metrics), default=0)

    @property
    def batch(self) -> int:
        return self.recipe.train.global_batch_size

    def curve(self, tag: str) -> tuple[list[int], list[float]]:
        """Steps and values of one tag of the metrics, ascending."""
        pairs = {record["step"]: as_number(record[tag]) for record in self.metrics if tag in record}
        return sorted(pairs), [pairs[step] for step in sorted(pairs)]

    def last(self, tag: str) -> float | None:
        _, values = self.curve(tag)
        return values[-1] if values else None

    def number(self, key: str) -> float | None:
        """A number of the summary."""
        return as_number(self.summary.get(key))

    @property
    def init_seconds(self) -> float | None:
        known = self.number("init_seconds")
        return self.last("init/seconds") if known is None else known

    def speed(self, unit: str) -> float | None:
        """Of these a second, on all ranks. unit: one of `distlora.training.summary.UNITS`."""
        known = self.number(f"{unit}_per_second")
        return self.last(f"train/{unit}_per_second") if known is None else known

    @property
    def rate_found(self) -> float | None:
        """The learning rate that `train.lr: search` has chosen."""
        known = as_number(self.rate_search.get("rate"))
        return self.last("lr_search/rate") if known is None else known

    @property
    def swaps(self) -> list[int]:
        """Steps after which components were replaced."""
        return sorted({record["step"] for record in self.recompositions if record.get("swapped")})

    @cached_property
    def cost(self) -> tuple[InferenceCost | None, str]:
        """What the run's model costs in a forward pass, or None and why it is unknown here."""
        parts = self.recipe.model_dump(mode="json", include={"model", "method", "targets", "data"})
        key = json.dumps(parts, sort_keys=True)
        if key not in self.known_costs:
            self.known_costs[key] = self._count()
        return self.known_costs[key]

    def _count(self) -> tuple[InferenceCost | None, str]:
        try:
            return inference_cost(self.recipe), ""
        except UserError as error:
            return None, str(error)

    @property
    def trained(self) -> float | None:
        """Trained parameters; counted on the model without weights where the run has left no summary."""
        known = self.number("trained")
        if known is not None:
            return known
        cost, _ = self.cost
        return cost and cost.trained

    @cached_property
    def scores(self) -> list[Score]:
        """Those of the evaluations after training, and those that the run itself has measured, unless an
        evaluation has measured just the same.
        """
        known = {(score.measured, score.step) for score in self.evaluations}
        own = self._own_scores()
        return self.evaluations + [score for score in own if (score.measured, score.step) not in known]

    def _own_scores(self) -> list[Score]:
        """The scores in the metrics: of the beginning and of the newest step."""
        data, train = self.recipe.data, self.recipe.train
        tags = {tag for record in self.metrics for tag in record if tag.startswith("eval/")}
        found = []
        for tag in sorted(tags):
            metric = tag.removeprefix("eval/")
            generated = metric == "exact_match"
            measured = Measured(
                data.task,
                metric,
                data=data.path or "",
                split=data.eval_split or "",
                samples=(train.exact_match_samples if generated else train.eval_samples) or None,
                settings=(f"max_new_tokens {data.max_new_tokens}",) if generated else (),
            )
            steps, values = self.curve(tag)
            ends = {steps[0]: values[0]} if steps[0] == 0 else {}
            ends[steps[-1]] = values[-1]
            found += [Score(measured, step, value) for step, value in ends.items()]
        return found


# ---------------------------------------------------------------------- finding


def find_runs(paths: Sequence[Path]) -> list[RunRecord]:
    """The runs in these directories; a directory that holds no run itself stands for those below it.

    Raises UserError for what is no run, and for files of a run that are broken.
    """
    found: list[Path] = []
    for path in paths:
        found += [
            place
            for place in run_directories(path)
            if os.path.realpath(place) not in {os.path.realpath(f) for f in found}
        ]
    runs = [read_run(directory) for directory in found]
    for run, name in zip(runs, names_of(found)):
        run.name, run.known_costs = name, runs[0].known_costs
    return runs


def run_directories(path: Path) -> list[Path]:
    """The directory itself where it is a run's, else those of the runs below it. Raises UserError where there
    is none.
    """
    if not path.is_dir():
        what = "it is a file" if path.is_file() else "there is no such directory"
        raise UserError(dangling_link(path) or f"{path} is no run directory: {what}")
    if (path / RECIPE).is_file():
        return [path]
    below = _below(path)
    if not below:
        raise UserError(f"{path} holds no run: neither it nor a directory below it has a {RECIPE}")
    return below


def _below(folder: Path) -> list[Path]:
    """What is within a run is part of it. A link to a folder is not followed: it may lead in a circle."""
    try:
        places = sorted(place for place in folder.iterdir() if place.is_dir())
    except OSError as error:
        raise UserError(f"{folder} cannot be read ({error.strerror})") from None
    found: list[Path] = []
    for place in places:
        if (place / RECIPE).is_file():
            found.append(place)
        elif not place.is_symlink():
            found += _below(place)
    return found


def names_of(directories: Sequence[Path]) -> list[str]:
    """As few of the last parts of each path as tell all of them apart."""
    full = [Path(os.path.realpath(directory)).parts for directory in directories]
    for count in range(1, max(map(len, full)) + 1):
        names = ["/".join(parts[-count:]) for parts in full]
        if len(set(names)) == len(names):
            return names
    raise AssertionError("two directories are the same")


# ---------------------------------------------------------------------- reading


def read_run(directory: Path) -> RunRecord:
    """Raises UserError for a broken file."""
    return RunRecord(
        directory,
        load_run_recipe(directory / RECIPE),
        directory.name,
        read_lines(directory / METRICS, metrics_problem),
        read_lines(directory / RECOMPOSITIONS, has_step),
        [start for start in read_json(directory / ENVIRONMENT, list, []) if isinstance(start, dict)],
        read_json(directory / SUMMARY, dict, {}),
        read_status(directory),
        read_json(directory / RATE_SEARCH, dict, {}),
        _evaluations(directory / EVALUATIONS),
    )


def _evaluations(folder: Path) -> list[Score]:
    return [score for path in sorted(folder.glob("*.json")) for score in _evaluation(path)]


def _evaluation(path: Path) -> list[Score]:
    content = read_json(path, dict, {})
    task, step, scores = content.get("task"), content.get("step"), content.get("scores")
    if not isinstance(task, str) or not is_count(step) or not isinstance(scores, dict):
        raise UserError(f"{path}: no evaluation: task, step or scores are missing; remove or repair it")
    found = []
    for metric, value in scores.items():
        number = as_number(value)
        if number is None:
            raise UserError(f"{path}: the score {metric} is no number; remove or repair it")
        about = {key: str(content.get(key) or "") for key in ("by", "data", "split")}
        samples = content.get("samples") if is_count(content.get("samples")) else None
        settings = tuple(
            f"{key} {value}" for key, value in sorted(_mapping(content).items()) if key not in NO_SETTINGS
        )
        found.append(Score(Measured(task, metric, **about, samples=samples, settings=settings), step, number))
    return found


def _mapping(content: dict[str, Any]) -> dict[str, Any]:
    settings = content.get("settings")
    return settings if isinstance(settings, dict) else {}
