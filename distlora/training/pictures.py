"""The pictures of a run for TensorBoard. They need matplotlib; without it there is the importance alone,
without axes.

Each function is given TensorBoard's `SummaryWriter`, so that nothing is drawn where there is none.
"""

import logging
import re
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from distlora.adapter.reach import pattern_of
from distlora.recompose.report import RecompositionReport

log = logging.getLogger(__name__)

#: Size of a panel in inches, and dots per inch.
WIDTH, HEIGHT, DPI = 6.4, 3.4, 110
#: Entries of a legend that can still be read beside the panel.
MOST = 14
#: Of a recomposition, the quantities that have a panel, and what they are called there.
PANELS = {
    "low_half_share": "importance held by the lower half of components",
    "sigma": "largest singular value of the new components",
    "delta_norm": "norm of the whole update of W0",
    "effective_rank": "effective rank of the whole update",
    "rounding_loss": "share of the update lost in rounding",
}


def add_update_norms(writer: Any, norms: dict[str, float], step: int) -> None:
    """norms: ‖W − W0‖ by layer."""
    _add(
        writer,
        "method/update_norm_by_layer",
        step,
        _depths("norm of each layer's update", "‖W − W0‖, Frobenius", norms),
    )


def add_captured_energy(writer: Any, captured: dict[str, float]) -> None:
    """captured: by layer, the share of the factorised matrix that rank r holds."""
    title = "share of the factorised matrix that rank r holds"
    _add(writer, "init/captured_energy_by_layer", 0, _depths(title, "captured energy", captured))


def add_core(writer: Any, spectra: Tensor, step: int) -> None:
    """spectra: (layers, r) singular values of each layer's core, in descending order."""
    writer.add_histogram("method/core/singular_values", spectra.flatten().numpy(), step)

    def draw(figure) -> None:
        axes = _axes(figure)
        largest = float(spectra.max())
        shown = spectra.clamp(min=max(largest, 1e-30) * 1e-6).log10().T
        image = axes.imshow(shown.numpy(), aspect="auto", cmap="viridis", interpolation="nearest")
        axes.set(
            title="singular values of R", xlabel="layer, in the model's order", ylabel="from the largest on"
        )
        _whole_numbers(axes)
        figure.colorbar(image, ax=axes, label="log10 of the value")

    _add(writer, "method/core/spectra", step, draw)


def add_recomposition(writer: Any, report: RecompositionReport) -> None:
    """The importance of every component, and what was done to each layer."""
    tiles = report.picture()
    if tiles is not None and not _add(
        writer, "method/recompose/importance", report.step, _framed(report, tiles)
    ):
        writer.add_image("method/recompose/importance", tiles.numpy(), report.step, dataformats="HWC")
    known = {key: by for key, by in report.by_quantity().items() if key in PANELS and any(by.values())}
    if known:
        panels = [
            _depths(PANELS[key], "", by, named=not place) for place, (key, by) in enumerate(known.items())
        ]
        _add(writer, "method/recompose/layers", report.step, *panels)


def add_rates(writer: Any, chosen: float, tried: Sequence[tuple[float, float]]) -> None:
    """tried: (rate, loss) by rate; infinite where the steps diverged."""

    def draw(figure) -> None:
        axes = _axes(figure)
        finite = [(rate, loss) for rate, loss in tried if loss < float("inf")]
        axes.semilogx(*zip(*finite), "o-")
        axes.axvline(chosen, color="tab:red", linestyle="--", label=f"chosen: {chosen:.3g}")
        axes.set(title="search for the learning rate", xlabel="learning rate", ylabel="loss after the trial")
        axes.legend(frameon=False)
        _plain(axes)

    _add(writer, "init/lr_search/losses", 0, draw)


# ---------------------------------------------------------------------- drawing

#: Draws into a figure, or a part of one.
Draw = Callable[[Any], None]


def _add(writer: Any, tag: str, step: int, *draws: Draw) -> bool:
    """Draws panels, two beside each other, as one picture; False where matplotlib is missing."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        log.info("no picture %s: pip install 'distlora[plot]'", tag)
        return False
    import numpy as np

    columns = min(len(draws), 2)
    rows = -(-len(draws) // columns)
    figure = Figure(figsize=(WIDTH * columns, HEIGHT * rows), dpi=DPI)
    canvas = FigureCanvasAgg(figure)
    parts = figure.subfigures(rows, columns, squeeze=False).flatten()
    for part, draw in zip(parts, draws):
        draw(part)
    canvas.draw()
    writer.add_image(tag, np.asarray(canvas.buffer_rgba())[..., :3], step, dataformats="HWC")
    return True


def _depths(title: str, label: str, values: dict[str, float], named: bool = True) -> Draw:
    """A line for every kind of layer, over the number of its block; over the layer's place in the model where
    names have no numbers. Layers of one kind and block, as experts are, have one point: their mean.
    named: whether the lines have a legend.
    """

    def draw(figure) -> None:
        kinds = _kinds(values)
        axes = _axes(figure, right=0.74 if named and len(kinds) <= MOST else 0.96)
        for place, (kind, points) in enumerate(kinds.items()):
            colour, style = f"C{place % 10}", "-" if place < 10 else "--"
            axes.plot(
                list(points), list(points.values()), style, color=colour, marker="o", markersize=4, label=kind
            )
        axes.set(title=title, ylabel=label, xlabel="number of the block" if _numbered(values) else "layer")
        _whole_numbers(axes)
        if named and len(kinds) <= MOST:
            axes.legend(fontsize="x-small", loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
        _plain(axes)

    return draw


def _kinds(values: dict[str, float]) -> dict[str, dict[int, float]]:
    """By kind of layer, such as self_attn.q_proj, and by depth: the mean value."""
    found: dict[str, dict[int, list[float]]] = {}
    numbered = _numbered(values)
    for place, (name, value) in enumerate(values.items()):
        kind = pattern_of(name).partition("*.")[2] or name
        depth = int(re.findall(r"(?<![^.])\d+(?![^.])", name)[0]) if numbered else place
        found.setdefault(kind, {}).setdefault(depth, []).append(value)
    return {
        kind: {depth: sum(own) / len(own) for depth, own in sorted(by_depth.items())}
        for kind, by_depth in found.items()
    }


def _numbered(values: dict[str, float]) -> bool:
    return all("*" in pattern_of(name) for name in values)


def _framed(report: RecompositionReport, tiles: Tensor) -> Draw:
    def draw(figure) -> None:
        axes = _axes(figure)
        matrices, components = report.scores.shape
        extent = (-0.5, matrices - 0.5, components - 0.5, -0.5)
        axes.imshow(tiles.numpy(), aspect="auto", interpolation="nearest", extent=extent)
        done = "replaced" if report.recomposed else "not replaced"
        axes.set(
            title=f"importance at step {report.step}, {done}: brighter is more, each column by itself",
            xlabel="layer, in the model's order",
            ylabel="component",
        )
        axes.title.set_fontsize("medium")

    return draw


def _axes(figure, right: float = 0.96):
    """One panel in a figure, with room for its texts. right: its end, as a share of the width."""
    # Layouts that are computed draw everything several times.
    return figure.subplots(gridspec_kw={"left": 0.12, "right": right, "bottom": 0.15, "top": 0.88})


def _whole_numbers(axes) -> None:
    """Layers and blocks are counted."""
    axes.xaxis.get_major_locator().set_params(integer=True)


def _plain(axes) -> None:
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
