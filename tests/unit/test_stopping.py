"""Signals that ask a run to stop."""

import ctypes
import logging
import os
import signal
import threading
import time

import pytest

from distlora.cluster.stopping import StopSignals


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


def test_another_thread_hears_it_while_the_main_one_waits_in_a_library():
    """As in a collective with a rank that is gone: no handler runs there."""
    library, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
    held, heard = threading.Event(), []

    def listen():
        library.pthread_mutex_lock(mutex)
        held.set()
        time.sleep(0.02)  # the main thread is on its way
        os.kill(os.getpid(), signal.SIGTERM)
        deadline = time.monotonic() + 20
        while not signals.asked() and time.monotonic() < deadline:
            time.sleep(0.001)
        heard.append(signals.asked())
        library.pthread_mutex_unlock(mutex)

    with StopSignals() as signals:
        thread = threading.Thread(target=listen)
        thread.start()
        held.wait()
        library.pthread_mutex_lock(mutex)  # a signal does not end this call
        thread.join()
    assert heard == [True]


def test_what_a_helper_process_is_told_is_not_meant_for_this_one():
    with StopSignals() as signals:
        child = os.fork()
        if child == 0:
            os.kill(os.getpid(), signal.SIGTERM)
            os._exit(0)
        os.waitpid(child, 0)
        assert not signals.asked()


def test_outside_the_main_thread_signals_are_left_alone():
    asked = []

    def work():
        with StopSignals() as signals:
            asked.append(signals.asked())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert asked == [False]
