"""DeepSpeed's monitors (TensorBoard, W&B, Comet, CSV files): others' code, that must not end a run."""

import logging
import re
from collections.abc import Callable
from types import TracebackType
from typing import Any

from deepspeed.monitor.config import get_monitor_config
from deepspeed.monitor.monitor import MonitorMaster

from distlora.engine.comm import Comm
from distlora.errors import UserError
from distlora.sentences import first_line

_MODULE = "deepspeed.monitor."
#: Their sections of the config, and their modules.
_MONITORS = ("tensorboard", "wandb", "csv_monitor", "comet")
#: A file's name has 255 bytes at most, of which ".csv" are four.
LONGEST_TAG = 240

log = logging.getLogger(__name__)


def without_monitors(config: dict[str, Any]) -> dict[str, Any]:
    """The DeepSpeed config with all of them off: a start in which nothing can fail on rank 0 alone, and an
    engine that writes no scalars of its own (`Train/Samples/…`) beside the run's.
    """
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
    """Those that were started. After an error they are off: the run has its own file of metrics."""

    def __init__(self, master: MonitorMaster):
        self._master, self._failed = master, False

    @property
    def configured(self) -> bool:
        """Whether the config turns any on. The same on all ranks, whatever fails on rank 0."""
        return self._master.enabled

    def write(self, events: list[tuple[str, float, int]]) -> None:
        """(tag, value, step) to all that are on."""
        if self.configured:
            legal = [(legal_tag(tag), value, step) for tag, value, step in events]
            self._guard(lambda: self._master.write_events(legal))

    def on_board(self, action: Callable[[Any], object]) -> None:
        """Calls `action` with TensorBoard's `SummaryWriter`, where there is one; on other ranks there is
        none.
        """
        board = self._master.tb_monitor
        if board is not None:
            self._guard(lambda: (action(board.summary_writer), board.flush()))

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


def legal_tag(tag: str) -> str:
    """The tag as every monitor takes it: the one that writes CSV makes a file's name of it."""
    return re.sub(r"[^\w/.-]", "_", tag, flags=re.ASCII)[:LONGEST_TAG]
