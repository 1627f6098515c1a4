"""Signals that ask a run to stop."""

import logging
import os
import signal
import threading

import pytest

from distlora.stopping import StopSignals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_is_remembered_told_once_and_ends_nothing(number, caplog):
    caplog.set_level(logging.INFO, logger="distlora")
    before = signal.getsignal(number)
    with StopSignals() as signals:
        assert not signals.asked()
        os.kill(os.getpid(), number)
        assert signals.asked() and signals.asked()
    assert signal.getsignal(number) is before
    assert caplog.messages == [f"{signal.Signals(number).name}: stopping at the next micro-batch"]


def test_outside_the_main_thread_signals_are_left_alone():
    asked = []

    def work():
        with StopSignals() as signals:
            asked.append(signals.asked())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert asked == [False]
