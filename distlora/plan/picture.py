"""The plan as a picture: memory of a GPU and traffic of a step, over the number of GPUs. Needs matplotlib."""

import os
from pathlib import Path

from distlora.errors import UserError
from distlora.plan.columns import Plan
from distlora.plan.memory import GIB
from distlora.plan.traffic import over_links

#: Fields of `Memory` that make a bar.
PARTS = ("weights", "adapters", "gradients", "optimizer", "activations", "gathered")


def check_picture(path: Path) -> None:
    """Raises UserError where `draw` could not write to `path`. The plans, which take a while, come later."""
    if path.suffix.lstrip(".").lower() not in _figure().canvas.get_supported_filetypes():
        raise UserError(f"--plot {path}: wanted a name that ends in .png, .svg or .pdf")
    if path.is_dir():
        raise UserError(f"--plot {path} is a directory; give the name of a file")
    if not path.parent.is_dir():
        raise UserError(f"--plot {path}: there is no directory {path.parent}")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise UserError(f"--plot {path}: cannot be written; give a place that you may write to")


def _figure():
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("--plot needs the package matplotlib; pip install 'distlora[plot]'") from None
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def draw(plans: list[Plan], gpu_memory: float, path: Path) -> None:
    """Writes the picture to `path`, in the format of its suffix. Raises UserError where it cannot.

    gpu_memory: GiB of one GPU.
    """
    figure = _figure()
    memory, traffic = figure.subplots(1, 2)
    places, names = range(len(plans)), [str(plan.world_size) for plan in plans]
    bottom = [0.0] * len(plans)
    for part in PARTS:
        heights = [getattr(plan.memory, part) / GIB for plan in plans]
        memory.bar(places, heights, bottom=bottom, label=part)
        bottom = [low + height for low, height in zip(bottom, heights)]
    memory.plot(
        places,
        [plan.memory.peak / GIB for plan in plans],
        "k_",
        markersize=18,
        label="largest peak of the run",
    )
    highest = max(plan.memory.peak for plan in plans) / GIB
    if highest > gpu_memory / 3:  # a line far above the bars would make them flat
        memory.axhline(gpu_memory, color="red", linestyle="--", label=f"memory of a GPU, {gpu_memory:g} GiB")
    memory.set(
        xlabel="GPUs", ylabel="GiB", title=f"Memory of a GPU in a training step, of {gpu_memory:g} GiB"
    )
    links = [over_links(plan.step, plan.nodes, plan.gpus, plan.setup.group) for plan in plans]
    traffic.plot(places, [link.inter / GIB for link in links], "o-", label="out of a node")
    traffic.plot(places, [link.intra / GIB for link in links], "s--", label="out of a GPU within its node")
    traffic.set(xlabel="GPUs", ylabel="GiB", title="Traffic of an optimizer step", ylim=(0, None))
    for axes in (memory, traffic):
        axes.set_xticks(places, names)
        axes.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=3)
        axes.grid(axis="y", alpha=0.3)
    try:
        figure.savefig(path, dpi=120)
    except OSError as error:
        raise UserError(f"--plot {path}: cannot be written ({error.strerror})") from error
