"""TensorBoard over runs, with the curves that one looks at first at the top of its page."""

import json
import logging
import urllib.parse
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from distlora.errors import UserError
from distlora.files.packages import is_installed
from distlora.files.problems import dangling_link
from distlora.recipe.load import load_run_recipe
from distlora.report.runs import names_of, run_directories
from distlora.sentences import first_line
from distlora.training.run_directory import RECIPE

#: How TensorBoard's files are named.
EVENTS = "events.out.tfevents.*"
#: The curves that are pinned to the top of the page, in this order. What a run does not have is left out.
PINNED = (
    "train/loss", "eval/loss", "eval/exact_match", "train/learning_rate", "train/grad_norm",
    "system/tokens_per_second", "system/images_per_second", "method/update_norm",
)  # fmt: skip


def boards(paths: Sequence[Path]) -> dict[str, Path]:
    """The folders of event files below these directories, by a short name of each run. A directory that has
    event files itself counts as a run. Raises UserError for a directory that holds neither.
    """
    found: dict[Path, Path] = {}
    for path in paths:
        found |= {path: path} if _has_events(path) else {run: _folder(run) for run in run_directories(path)}
    named = dict(zip(names_of(list(found)), found.values()))
    return {name: folder for name, folder in named.items() if _has_events(folder)}


def _folder(run: Path) -> Path:
    """Where a run writes event files: within it, unless its DeepSpeed config names another place."""
    section = (load_run_recipe(run / RECIPE).deepspeed or {}).get("tensorboard") or {}
    place, job = (section.get(key, "auto") for key in ("output_path", "job_name"))
    folder = run / "tensorboard" if place == "auto" else Path(place)
    return folder if job == "auto" else folder / job


def _has_events(folder: Path) -> bool:
    return folder.is_dir() and any(folder.glob(EVENTS))


def _refuse_without_boards(paths: Sequence[Path]) -> None:
    """Raises UserError where TensorBoard is missing, or would have nothing to show."""
    if not is_installed("tensorboard"):
        raise UserError("distlora monitor needs the package tensorboard; pip install tensorboard")
    for path in paths:
        if not path.is_dir():
            raise UserError(dangling_link(path) or f"{path} is no run directory: there is no such directory")
    if not boards(paths):
        raise UserError(
            f"{', '.join(map(str, paths))}: no run here has event files of TensorBoard; train with a "
            "DeepSpeed config whose tensorboard section is on, such as deepspeed=configs/zero/zero2.json"
        )


@contextmanager
def serving(
    paths: Sequence[Path], host: str | None = None, port: int | None = None
) -> Iterator[tuple[str, Callable[[], None]]]:
    """A context in which TensorBoard shows the runs below these directories.

    host: on whose address it listens; None: only this machine reaches it. port: None for 6006, or the next
    one that is free. Yields the address of its page, and a call that brings in runs that have begun since.
    Raises UserError where TensorBoard is missing, would have nothing to show, or cannot have the port.
    """
    _refuse_without_boards(paths)
    from tensorboard import program

    logging.getLogger("tensorboard").setLevel(logging.ERROR)
    with TemporaryDirectory(prefix="distlora-monitor-") as folder:
        _link(paths, Path(folder))
        server = program.TensorBoard()
        # Its faster way to load does not hide the points of steps that a run has made again.
        given = {"logdir": folder, "load_fast": "false", "host": host, "port": port}
        server.configure(**{key: value for key, value in given.items() if value is not None})
        try:
            address = server.launch()
        except program.TensorBoardServerException as error:
            raise UserError(f"TensorBoard cannot be started: {first_line(error.msg)}") from None
        yield address, lambda: _link(paths, Path(folder))


def _link(paths: Sequence[Path], folder: Path) -> None:
    """Links to the folders of event files, each under its run's name, which TensorBoard shows."""
    for name, place in boards(paths).items():
        link = folder / name
        if not link.is_symlink():
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(place.resolve(), target_is_directory=True)


def first_screen(address: str) -> str:
    """The page with the pinned curves, as they were measured: a smoothed curve of few evaluations misleads.
    address: of TensorBoard.
    """
    cards = [{"plugin": "scalars", "tag": tag} for tag in PINNED]
    pinned = urllib.parse.quote(json.dumps(cards, separators=(",", ":")))
    return f"{address}?pinnedCards={pinned}&smoothing=0#timeseries"
