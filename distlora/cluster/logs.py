"""A log file for every rank: `RUN/logs/rank-N.log`, in addition to the terminal."""

import logging
import logging.handlers
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from distlora.errors import Ending
from distlora.files.confidential import hidden
from distlora.files.problems import WriteErrors

LOGS = "logs"

_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


class _Formatter(logging.Formatter):
    """Shows no secret, also not in tracebacks."""

    def format(self, record: logging.LogRecord) -> str:
        return hidden(super().format(record))


class _File(logging.FileHandler):
    """Keeps the first error of its own file, and is silent afterwards."""

    def __init__(self, path: Path, errors: WriteErrors):
        self._errors, self._failed = errors, False
        super().__init__(path, encoding="utf-8", errors="backslashreplace")

    def emit(self, record: logging.LogRecord) -> None:
        if not self._failed:
            super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 (a name of `logging`)
        error = sys.exception()
        if not isinstance(error, OSError):
            super().handleError(record)
            return
        self._failed = True
        with self._errors.kept(self.baseFilename):
            raise error

    def close(self) -> None:
        with self._errors.kept(self.baseFilename):  # what could not be written is still to be flushed
            super().close()


class RankLog:
    """Collects what this rank logs, and writes it once `open` is called. A context manager.

    `open` comes when the run directory is known to belong to this run, so a start that was refused leaves no
    file. The error that ends the run is the last entry of the file.
    """

    def __init__(self, rank: int, errors: WriteErrors | None = None):
        """errors: takes those of the file; a log that cannot be written ends nothing by itself."""
        self._rank, self._errors = rank, errors or WriteErrors()
        self._logger = logging.getLogger("distlora")
        self._memory = logging.handlers.MemoryHandler(
            capacity=10_000, flushLevel=logging.CRITICAL + 1, flushOnClose=False
        )
        self._file: logging.FileHandler | None = None

    def __enter__(self) -> "RankLog":
        self._logger.addHandler(self._memory)
        return self

    @contextmanager
    def opened_by_crash(self, run_dir: Path) -> Iterator[None]:
        """A context in which an error that is no sentence for the user opens the file, which then ends with
        its traceback."""
        try:
            yield
        except Exception as error:
            if self._file is None and not isinstance(error, Ending):
                with self._errors.kept(run_dir):
                    self.open(run_dir)
            raise

    def open(self, run_dir: Path) -> None:
        """Writes to the file what was logged so far and everything later. Each start appends to the file."""
        folder = run_dir / LOGS
        folder.mkdir(parents=True, exist_ok=True)
        self._file = _File(folder / f"rank-{self._rank}.log", self._errors)
        self._file.setFormatter(_Formatter(_FORMAT))
        self._memory.setTarget(self._file)
        self._memory.flush()
        self._logger.removeHandler(self._memory)
        self._logger.addHandler(self._file)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._logger.removeHandler(self._memory)
        if self._file is not None:
            if error is not None:
                self._file.handle(self._last_words(error))
            self._logger.removeHandler(self._file)
            self._file.close()

    def _last_words(self, error: BaseException) -> logging.LogRecord:
        said = (
            str(error) if isinstance(error, Ending) else "".join(traceback.format_exception(error)).rstrip()
        )
        return logging.LogRecord("distlora", logging.ERROR, __file__, 0, "ended: %s", (said,), None)
