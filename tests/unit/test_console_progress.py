"""Progress on standard error: lines where nobody watches, bars on a terminal, nothing of what is short."""

import io
import logging
import os
import pty
import sys
import threading
import time

import pytest

from distlora import progress
from distlora.cli import progress as console
from distlora.cli.output import Output
from distlora.cli.shared import log_to_terminal


@pytest.fixture
def clock(monkeypatch):
    """The time, which does not pass by itself."""

    class Clock:
        now = 100.0

    monkeypatch.setattr(console.time, "monotonic", lambda: Clock.now)
    monkeypatch.setattr(console._Display, "_look_on", lambda display: None)
    return Clock


def look(display, now):
    for task in display._tasks:
        if now - task.began >= console.PATIENCE:
            display.show(task, now)


def test_lines_say_what_is_done_and_left_and_come_less_and_less_often(clock, capsys):
    display, times = console.Lines(), []
    task = display.begin("training", "steps", 1000, 100)
    for second in range(1, 201):
        clock.now += 1
        task.advance(1, f"loss {second}")
        look(display, clock.now)
        if capsys.readouterr().err:
            times.append(second)
    assert times == [10, 25, 48, 82, 133, 193]
    clock.now += 1
    look(display, clock.now)
    display.end(task)
    assert capsys.readouterr().err == "training: 300 of 1,000 steps, 3:21 in all, loss 200\n"


def test_a_line_has_the_time_left(clock, capsys):
    display = console.Lines()
    task = display.begin("training", "steps", 40, 10)
    clock.now += 60
    task.advance(10, "loss 1.5")
    look(display, clock.now)
    assert capsys.readouterr().err == "training: 20 of 40 steps, 1:00 gone, 2:00 left, loss 1.5\n"


def test_what_nobody_can_count_says_how_long_it_takes(clock, capsys):
    display = console.Lines()
    task = display.begin("loading the model", "", None, 0)
    clock.now += 3725
    look(display, clock.now)
    task.close()
    assert capsys.readouterr().err == "loading the model: 1:02:05 gone\nloading the model: 1:02:05 in all\n"


def test_what_is_short_is_not_shown(clock, capsys):
    display = console.Lines()
    with progress.told_to(display):
        assert list(progress.each([1, 2], "evaluating", "batches", 2)) == [1, 2]
        clock.now += 1.9
        with progress.phase("saving"):
            clock.now += 1.9
    assert capsys.readouterr().err == ""


def test_bytes_are_told_in_units_and_a_total_may_come_later(clock, capsys):
    display = console.Lines()
    task = display.begin("fetching m", "bytes", None, 0)
    task.expect(4 << 30)
    task.advance(1 << 30)
    clock.now += 20
    look(display, clock.now)
    assert capsys.readouterr().err == "fetching m: 1.0 GiB of 4.0 GiB, 0:20 gone, 1:00 left\n"


def test_an_error_ends_all_phases_and_the_audience(clock, capsys):
    with pytest.raises(ValueError), console.progress_shown():
        task = progress.begin("training", "steps", 2)
        clock.now += 5
        for _ in progress.each([1], "evaluating", "batches"):
            raise ValueError
    assert capsys.readouterr().err.count("in all") == 1  # the other had not lasted
    task.advance()
    assert isinstance(progress.begin("later"), progress._Untold)


def test_nothing_is_shown_to_the_quiet_and_on_other_ranks():
    with console.progress_shown(False):
        assert isinstance(progress.begin("training"), progress._Untold)


def test_each_counts_by_size():
    told = []

    class Audience:
        def begin(self, *about):
            told.append(about)
            return self

        def advance(self, count=1, said=""):
            told.append(count)

        def close(self):
            told.append("over")

    with progress.told_to(Audience()):
        assert list(progress.each([[1, 2], [3]], "tokenising", "rows", 3, len)) == [[1, 2], [3]]
    assert told == [("tokenising", "rows", 3, 0), 2, 1, "over"]


def test_bars_on_a_terminal_let_the_log_pass_and_leave_nothing(monkeypatch):
    logger = logging.getLogger("distlora")
    before = logger.handlers[:], logger.level, logger.propagate
    master, slave = pty.openpty()
    read: list[bytes] = []
    reader = threading.Thread(target=lambda: read.extend(iter(lambda: _read(master), b"")), daemon=True)
    reader.start()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(console, "PATIENCE", 0.0)
    monkeypatch.setattr(console, "TICK", 0.05)
    try:
        with open(slave, "w", encoding="utf-8") as stream:
            monkeypatch.setattr(sys, "stderr", Output(stream))
            log_to_terminal(shown=True)
            with console.progress_shown(), progress.phase("training", "steps", 4) as task:
                task.advance(1, "loss [1.5]")
                time.sleep(0.4)
                logging.getLogger("distlora").info("a line of the log")
                time.sleep(0.1)
            sys.stderr.write("the end\n")
        reader.join(10)
    finally:
        logger.handlers[:], logger.level, logger.propagate = before
        os.close(master)
    text = b"".join(read).decode()
    assert "training" in text and "1 of 4 steps" in text and "loss [1.5]" in text
    assert "a line of the log" in text and text.endswith("the end\r\n")
    after = text[text.index("a line of the log") :]
    assert "\x1b[2K" in after, "the bar is removed"


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 4096)
    except OSError:  # the other end is closed
        return b""


@pytest.mark.parametrize("terminal", [True, False])
def test_output_that_is_gone_ends_nothing(terminal, monkeypatch):
    class Gone(io.StringIO):
        def write(self, text):
            raise BrokenPipeError(32, "Broken pipe")

        def isatty(self):
            return terminal

    monkeypatch.setattr(console, "PATIENCE", 0.0)
    monkeypatch.setattr(console, "TICK", 0.01)
    stream = Output(Gone())
    monkeypatch.setattr(sys, "stderr", stream)
    with console.progress_shown(), progress.phase("training", "steps", 4) as task:
        task.advance()
        time.sleep(0.05)
    assert stream.error.errno == 32
