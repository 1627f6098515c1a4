"""DeepSpeed's monitors (TensorBoard, W&B, Comet, CSV files): others' code, that must not end a run."""

import logging
from collections.abc import Callable
from types import TracebackType
from typing import Any

from deepspeed import DeepSpeedEngine
from deepspeed.monitor.config import get_monitor_config
from deepspeed.monitor.monitor import MonitorMaster
from torch import Tensor

from distlora.engine.comm import Comm
from distlora.errors import UserError
from distlora.sentences import first_line

_MODULE = "deepspeed.monitor."
#: Their sections of the config, and their modules.
_MONITORS = ("tensorboard", "wandb", "csv_monitor", "comet")

log = logging.getLogger(__name__)


def without_monitors(config: dict[str, Any]) -> dict[str, Any]:
    """The DeepSpeed config with all of them off, for a start in which nothing can fail on rank 0 alone."""
    return {key: value for key, value in config.items() if key not in _MONITORS}


def start_monitors(comm: Comm, config: dict[str, Any]) -> MonitorMaster:
    """Those that the config turns on, which run on rank 0. Collective.

    Raises UserError on every rank for one that cannot be started, such as one that nobody has logged in to.
    """
    master, failure = None, None
    try:
        master = MonitorMaster(get_monitor_config(config))
    except Exception as error:  # of any kind, as they are others' code
        failure = UserError(
            f"the DeepSpeed config turns {_monitor_in(error.__traceback__)} on, which cannot be started "
            f"({first_line(error)}); correct its settings, or set its enabled to false"
        )
        failure.__cause__ = error
    comm.agree(failure)
    return master


def _monitor_in(traceback: TracebackType | None) -> str:
    """The monitor in whose code an error came up."""
    name = "a monitor"
    while traceback is not None:
        module = traceback.tb_frame.f_globals.get("__name__", "").removeprefix(_MODULE)
        name = module if module in _MONITORS else name
        traceback = traceback.tb_next
    return name


class Monitors:
    """Those of an engine, on rank 0. After an error they are off: the run has its own file of metrics."""

    def __init__(self, engine: DeepSpeedEngine):
        self._engine, self._failed = engine, False

    def write(self, events: list[tuple[str, float, int]]) -> None:
        """(tag, value, step) to all that are on."""
        if self._engine.monitor.enabled:
            self._guard(lambda: self._engine.monitor.write_events(events))

    def write_to_board(self, events: list[tuple[str, float, int]]) -> None:
        """The same to TensorBoard alone."""
        board = self._engine.monitor.tb_monitor  # None where it is off, and on other ranks
        if board is not None:
            self._guard(lambda: board.write_events(events))

    def draw(self, tag: str, image: Tensor, step: int) -> None:
        """image: (height, width, 3) uint8, to TensorBoard."""
        board = self._engine.monitor.tb_monitor
        if board is not None:
            self._guard(lambda: self._draw(board, tag, image, step))

    @staticmethod
    def _draw(board, tag: str, image: Tensor, step: int) -> None:
        board.summary_writer.add_image(tag, image.numpy(), step, dataformats="HWC")
        board.flush()

    def _guard(self, action: Callable[[], object]) -> None:
        if self._failed:
            return
        try:
            action()
        except Exception as error:  # of any kind: a full disk, a server that is gone
            self._failed = True
            log.warning(
                "the monitors of the DeepSpeed config are off from here on (%s); metrics.jsonl goes on",
                first_line(error),
            )
