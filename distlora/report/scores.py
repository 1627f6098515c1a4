"""The table of scores: by method, rank and task, the mean over seeds and its standard deviation."""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, fields, replace

from distlora.report.compare import Group, Setting, unique
from distlora.report.numbers import (
    ABSENT,
    Spread,
    best,
    count_text,
    is_share,
    less_is_better,
    score_text,
    spread,
)
from distlora.report.page import Table
from distlora.report.runs import Measured, RunRecord, Score

RATE_FOUND = "learning rate found"
AFTER, BEFORE = "after steps", "before training"


@dataclass(frozen=True)
class Row:
    """step: of the measurement, 0 before training; None for the last one of the runs. found: by column."""

    setting: Setting
    step: int | None
    found: tuple[Spread | None, ...]

    @property
    def whole(self) -> bool:
        """Whether the scores are those of finished runs, which alone are compared."""
        return self.step is None

    @property
    def count(self) -> int:
        return max(item.count for item in self.found if item)


def score_columns(group: Group, tasks: Collection[str] = ()) -> list[Measured]:
    """All that was measured of the group's runs, losses last. tasks: only these; by default all."""
    measured = unique(score.measured for run in group.runs for score in run.scores)
    chosen = [column for column in measured if not tasks or column.task in tasks]
    return sorted(chosen, key=lambda column: less_is_better(column.metric))


def score_rows(group: Group, columns: Sequence[Measured]) -> list[Row]:
    """Of every setting: before training, where that was measured; at the end; and of unfinished runs."""
    rows = []
    for setting in group.settings:
        by_column = [_by_step(setting, column) for column in columns]
        steps = {step for values in by_column for step in values}
        for step in sorted(steps, key=lambda step: (step != 0, step is not None, step)):
            rows.append(Row(setting, step, tuple(spread(values.get(step, [])) for values in by_column)))
    return _once_before(rows)


def _once_before(rows: list[Row]) -> list[Row]:
    """With one row before training, of no setting, where several settings have begun from the same scores."""
    before = [row for row in rows if row.step == 0]
    scores = {tuple(item and (item.mean, item.deviation or 0.0) for item in row.found) for row in before}
    if len(before) < 2 or len(scores) > 1:
        return rows
    setting = replace(before[0].setting, values=(ABSENT,) * len(before[0].setting.values), runs=())
    found = [[row.found[place] for row in before] for place in range(len(before[0].found))]
    shared = Row(setting, 0, tuple(_pooled(spreads) for spreads in found))
    return [shared, *(row for row in rows if row.step != 0)]


def _pooled(spreads: Sequence[Spread | None]) -> Spread | None:
    """Equal means and deviations as one."""
    known = [item for item in spreads if item]
    return replace(known[0], count=sum(item.count for item in known)) if known else None


def _scores(run: RunRecord, column: Measured) -> list[Score]:
    return [score for score in run.scores if score.measured == column]


def _by_step(setting: Setting, column: Measured) -> dict[int | None, list[float]]:
    """Every run's score before training, at step 0, and its newest one, by the step at which it was measured;
    None for the run's last step.
    """
    found: dict[int | None, list[float]] = {}
    for run in setting.runs:
        scores = _scores(run, column)
        trained = [score for score in scores if score.step]
        for score in scores:
            if not score.step:
                found.setdefault(0, []).append(score.value)
        if trained:
            newest = max(trained, key=lambda score: score.step)
            finished = run.steps is None or newest.step >= run.steps
            found.setdefault(None if finished else newest.step, []).append(newest.value)
    return found


# ---------------------------------------------------------------------- the table


def scores_table(group: Group, tasks: Collection[str] = ()) -> Table | None:
    """Mean ± standard deviation over seeds of every score, the best of finished runs in bold; None without
    any. tasks: as in `score_columns`.
    """
    columns = score_columns(group, tasks)
    if not columns:
        return None
    rows = score_rows(group, columns)
    by_step = any(row.step is not None for row in rows)
    searched = any(run.rate_found is not None for run in group.runs)
    texts = [*group.columns, *([RATE_FOUND] if searched else []), *([AFTER] if by_step else [])]
    header = [*texts, "trained parameters", "n", *column_names(columns)]
    cells = [[*_about(row, searched, by_step), *_values(row, columns)] for row in rows]
    first = len(header) - len(columns)
    bold = {
        (places[top], first + column)
        for places in [[place for place, row in enumerate(rows) if row.whole]]
        for column, measured in enumerate(columns)
        for top in best([rows[place].found[column] for place in places], measured.metric)
    }
    return Table(header, cells, frozenset(bold), len(texts))


def _about(row: Row, searched: bool, by_step: bool) -> list[str]:
    """The cells before the scores."""
    setting = row.setting
    rates = [rates_text(setting.runs)] if searched else []
    steps = [_step_text(row)] if by_step else []
    trained = count_text(run.trained for run in setting.runs)
    return [*setting.values, *rates, *steps, trained, str(row.count)]


def rates_text(runs: Iterable[RunRecord]) -> str:
    """The learning rates that the runs have searched and found."""
    rates = unique(run.rate_found for run in runs if run.rate_found is not None)
    return " / ".join(f"{rate:g}" for rate in rates) or ABSENT


def _step_text(row: Row) -> str:
    if row.step == 0:
        return BEFORE
    whole = count_text(run.steps for run in row.setting.runs)
    return whole if row.step is None else f"{row.step:,} of {whole}"


def _values(row: Row, columns: Sequence[Measured]) -> list[str]:
    """The scores; one of another n than the row's says so."""
    texts = []
    for item, measured in zip(row.found, columns):
        text = score_text(item, measured.metric)
        other = item is not None and item.count != row.count
        texts.append(f"{text} (n = {item.count})" if other else text)
    return texts


def column_names(columns: Sequence[Measured]) -> list[str]:
    """Task, metric and unit; of columns that would have the same name also that in which they differ."""
    names = []
    for column in columns:
        rivals = [c for c in columns if (c.task, c.metric) == (column.task, column.metric)]
        keys = [f.name for f in fields(Measured) if len({getattr(rival, f.name) for rival in rivals}) > 1]
        told = [text for text in (_told(column, key, rivals) for key in keys) if text]
        unit = ", %" if is_share(column.metric) else " ↓" if less_is_better(column.metric) else ""
        more = f" ({', '.join(told)})" if told else ""
        names.append(f"{column.task}: {column.metric.replace('_', ' ')}{unit}{more}")
    return names


def _told(column: Measured, key: str, rivals: Sequence[Measured]) -> str:
    value = getattr(column, key)
    if key == "settings":
        return ", ".join(text for text in value if any(text not in rival.settings for rival in rivals))
    if key == "samples":
        return "all samples" if value is None else f"{value} samples"
    return f"by {value}" if key == "by" and value else str(value)
