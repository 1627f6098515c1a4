"""The table of scores: by method, rank and task, the mean over seeds and its standard deviation."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields

from distlora.report.compare import Group, Setting, unique
from distlora.report.numbers import Spread, best, count_text, is_share, less_is_better, score_text, spread
from distlora.report.page import Table
from distlora.report.runs import Measured, RunRecord, Score

AFTER = "after steps"


@dataclass(frozen=True)
class Row:
    """setting: None stands for all runs before training. step: of the measurement, where the runs had not
    reached their last one. found: by column.
    """

    setting: Setting | None
    step: int | None
    found: tuple[Spread | None, ...]

    @property
    def whole(self) -> bool:
        """Whether the scores are those of finished runs, which alone are compared."""
        return self.setting is not None and self.step is None

    @property
    def count(self) -> int:
        return max(item.count for item in self.found if item)


def score_columns(group: Group, tasks: Collection[str] = ()) -> list[Measured]:
    """All that was measured of the group's runs, losses last. tasks: only these; by default all."""
    measured = unique(score.measured for run in group.runs for score in run.scores)
    chosen = [column for column in measured if not tasks or column.task in tasks]
    return sorted(chosen, key=lambda column: less_is_better(column.metric))


def score_rows(group: Group, columns: Sequence[Measured]) -> list[Row]:
    """Before training, where that was measured; then every setting, once more for unfinished runs."""
    before = tuple(
        spread(score.value for run in group.runs for score in _scores(run, column) if score.step == 0)
        for column in columns
    )
    rows = [Row(None, None, before)] if any(before) else []
    for setting in group.settings:
        by_column = [_after(setting, column) for column in columns]
        steps = {step for values in by_column for step in values}
        for step in sorted(steps, key=lambda step: (step is not None, step)):
            rows.append(Row(setting, step, tuple(spread(values.get(step, [])) for values in by_column)))
    return rows


def _scores(run: RunRecord, column: Measured) -> list[Score]:
    return [score for score in run.scores if score.measured == column]


def _after(setting: Setting, column: Measured) -> dict[int | None, list[float]]:
    """The newest score of every run, by the step at which it was measured; None for the run's last step."""
    found: dict[int | None, list[float]] = {}
    for run in setting.runs:
        trained = [score for score in _scores(run, column) if score.step]
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
    texts = [*group.columns, *([AFTER] if by_step else [])]
    header = [*texts, "trained parameters", "n", *column_names(columns)]
    cells = [[*_about(row, group, by_step), *_values(row, columns)] for row in rows]
    first = len(header) - len(columns)
    bold = {
        (places[top], first + column)
        for places in [[place for place, row in enumerate(rows) if row.whole]]
        for column, measured in enumerate(columns)
        for top in best([rows[place].found[column] for place in places], measured.metric)
    }
    return Table(header, cells, frozenset(bold), len(texts))


def _about(row: Row, group: Group, by_step: bool) -> list[str]:
    """The cells before the scores."""
    setting = row.setting
    if setting is None:
        return ["before training", *[""] * (len(group.columns) - 1 + by_step), "", ""]
    whole = count_text(run.steps for run in setting.runs)
    step = whole if row.step is None else f"{row.step:,} of {whole}"
    trained = count_text(run.trained for run in setting.runs)
    return [*setting.values, *([step] if by_step else []), trained, str(row.count)]


def _values(row: Row, columns: Sequence[Measured]) -> list[str]:
    """The scores; one of another n than the row's says so."""
    texts = []
    for item, measured in zip(row.found, columns):
        text = score_text(item, measured.metric)
        other = item is not None and row.setting is not None and item.count != row.count
        texts.append(f"{text} (n = {item.count})" if other else text)
    return texts


def column_names(columns: Sequence[Measured]) -> list[str]:
    """Task, metric and unit; of columns that would have the same name also that in which they differ."""
    names = []
    for column in columns:
        rivals = [c for c in columns if (c.task, c.metric) == (column.task, column.metric)]
        keys = [f.name for f in fields(Measured) if len({getattr(rival, f.name) for rival in rivals}) > 1]
        told = [text for text in (_told(column, key) for key in keys) if text]
        unit = ", %" if is_share(column.metric) else " ↓" if less_is_better(column.metric) else ""
        more = f" ({', '.join(told)})" if told else ""
        names.append(f"{column.task}: {column.metric.replace('_', ' ')}{unit}{more}")
    return names


def _told(column: Measured, key: str) -> str:
    value = getattr(column, key)
    if key == "samples":
        return "all samples" if value is None else f"{value} samples"
    return f"by {value}" if key == "by" and value else str(value)
