"""The pictures of a report. Needs matplotlib."""

import textwrap
from collections.abc import Collection, Sequence
from pathlib import Path

from distlora.errors import UserError
from distlora.report.compare import Group, Setting, unique
from distlora.report.curves import EVALUATION, TRAINING, Curve, curves, limits, panels
from distlora.report.numbers import is_share, less_is_better
from distlora.report.scores import Row, column_names, score_columns, score_rows

#: Colours that people with every kind of colour blindness can tell apart on white (Okabe and Ito), without
#: yellow, which is too pale for a line; and the line styles that go with them on a print without colour.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#56B4E9", "#E69F00", "#7F7F7F")
STYLES = ("-", "--", "-.", (0, (1, 1)), "-", "--", "-.", (0, (1, 1)))
MARKERS = "osD^pP*X"
#: Curves in a panel.
MOST = len(COLOURS)
#: Recompositions of a curve up to which their marks are large.
FEW = 12
DPI = 120


def require_matplotlib() -> None:
    """Raises UserError where it is missing."""
    _figure(1.0, 1.0)


def _figure(width: float, height: float):
    """A figure that no window shows. width, height: in inches."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("a report needs the package matplotlib; pip install 'distlora[plot]'") from None
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.08)
    FigureCanvasAgg(figure)
    return figure


def draw_losses(group: Group, path: Path, smooth: int | None) -> bool:
    """Training and evaluation losses of all settings side by side, small multiples where there are many.

    smooth: see `curves`. Returns whether there was anything to draw.
    """
    by_samples = len({run.batch for run in group.runs}) > 1
    tags = [
        (title, tag, found)
        for title, tag, width in (("Training loss", TRAINING, smooth), ("Evaluation loss", EVALUATION, 1))
        if (found := curves(group.settings, tag, width, by_samples))
    ]
    if not tags:
        return False
    parts = panels(group.settings, MOST)
    many = len(parts) > 1
    figure = _figure((11 if len(tags) == 2 else 7.5) + 2 * many, 1 + 2.9 * len(parts) if many else 4.6)
    grid = figure.subplots(len(parts), len(tags), squeeze=False, sharex=True, sharey="col")
    for column, (title, tag, found) in enumerate(tags):
        by_label = {curve.label: curve for curve in found}
        for row, (part, settings) in enumerate(parts):
            axes = grid[row][column]
            _panel(axes, settings, by_label, points=tag == EVALUATION)
            axes.set_title(f"{title}: {part}" if part else title)
            axes.set_ylabel("cross-entropy, nats")
            if many and column == 0:
                handles = axes.get_legend_handles_labels()
                place = {"loc": "upper left", "bbox_to_anchor": (1.02, 1.0), "borderaxespad": 0.0}
                grid[row][-1].legend(*handles, **place, fontsize="small", frameon=False)
        if limits(found):
            grid[0][column].set_ylim(*limits(found))
        grid[-1][column].set_xlabel("training samples" if by_samples else "optimizer steps")
    if not many:
        _legend(figure, grid[0][0], len(group.settings))
    figure.savefig(path, dpi=DPI)
    return True


def _panel(axes, settings: Sequence[Setting], by_label: dict[str, Curve], points: bool) -> None:
    """points: every value is marked, since there are few."""
    marked = False
    lines = sum(len(by_label[setting.label].raw) for setting in settings if setting.label in by_label)
    for place, setting in enumerate(settings):
        curve = by_label.get(setting.label)
        if curve is None:
            continue
        colour = COLOURS[place % MOST]
        for x, y in curve.raw:
            axes.plot(x, y, color=colour, alpha=0.3 if lines <= 4 else 0.16, linewidth=0.7, zorder=1)
        axes.plot(
            curve.x, curve.mean, color=colour, linestyle=STYLES[place % MOST], linewidth=2.0, zorder=3,
            label=setting.label, marker=MARKERS[place % MOST] if points else None, markersize=4,
        )  # fmt: skip
        if curve.marks and not points:
            marked = True
            _marks(axes, curve, colour)
    if marked:
        axes.plot([], [], "v", color="0.35", markersize=6, label="recomposition")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _marks(axes, curve: Curve, colour: str) -> None:
    """The recompositions, on the curve."""
    import numpy as np

    x = np.array([mark for mark in curve.marks if len(curve.x) and curve.x[0] <= mark <= curve.x[-1]])
    y = np.interp(x, curve.x, curve.mean)
    size = 7 if len(x) <= FEW else 4.5
    axes.plot(
        x, y, "v", color=colour, markersize=size, markeredgecolor="white", markeredgewidth=0.6, zorder=4
    )  # fmt: skip


def _legend(figure, axes, count: int) -> None:
    """One for all panels, below them."""
    handles, labels = axes.get_legend_handles_labels()
    longest = max(map(len, labels))
    columns = max(1, min(count + 1, 4, 110 // (longest + 8)))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize="small", frameon=False)


# ---------------------------------------------------------------------- scores


def draw_scores(group: Group, path: Path, tasks: Collection[str]) -> bool:
    """The scores of finished runs over their trained parameters, one panel a score. Where there are more
    settings than colours, those of a method look alike. Returns whether there was enough to draw: settings
    with different numbers of trained parameters, and no more methods than can be told apart.
    """
    columns = [column for column in score_columns(group, tasks) if not less_is_better(column.metric)]
    rows = [row for row in score_rows(group, columns) if row.whole and row.setting.runs[0].trained]
    names = [row.setting.label if len(rows) <= MOST else row.setting.method for row in rows]
    kinds = len(set(names))
    if not columns or len({row.setting.runs[0].trained for row in rows}) < 2 or kinds > MOST:
        return False
    wide = min(len(columns), 3)
    high = -(-len(columns) // wide)
    figure = _figure(3.0 + 3.4 * wide, 0.9 + 3.1 * high)
    grid = figure.subplots(high, wide, squeeze=False).flatten()
    for axes in grid[len(columns) :]:
        axes.set_visible(False)
    for place, (axes, name) in enumerate(zip(grid, column_names(columns))):
        _score_panel(axes, rows, names, place, 100 if is_share(columns[place].metric) else 1)
        task, _, metric = name.partition(": ")
        axes.set(title=task, xscale="log", xlabel="trained parameters")
        axes.set_ylabel("\n".join(textwrap.wrap(metric, 34)))
        axes.margins(x=0.15, y=0.15)
    _legend(figure, grid[0], kinds)
    figure.savefig(path, dpi=DPI)
    return True


def _score_panel(axes, rows: Sequence[Row], names: Sequence[str], place: int, factor: float) -> None:
    """names: of the rows in the legend. place: of the score among the columns. Points with equally many
    parameters are moved a little apart.
    """
    kinds = unique(names)
    for kind, name in enumerate(kinds):  # also what has no score in this panel
        axes.plot([], [], MARKERS[kind], color=COLOURS[kind], label=name)
    sizes = [row.setting.runs[0].trained for row in rows]
    apart = max(1.03, (max(sizes) / min(sizes)) ** 0.035)
    for number, (row, size) in enumerate(zip(rows, sizes)):
        found, kind = row.found[place], kinds.index(names[number])
        if found is None:
            continue
        beside = sizes[:number].count(size) - (sizes.count(size) - 1) / 2
        axes.errorbar(
            [size * apart**beside], [found.mean * factor],
            yerr=None if found.deviation is None else [found.deviation * factor],
            color=COLOURS[kind], marker=MARKERS[kind], markersize=7, capsize=3, linestyle="",
        )  # fmt: skip
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
