"""How far a rank has come: what its main thread writes down, and its heartbeat tells the others."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

Method = TypeVar("Method", bound=Callable)


class Course:
    """One rank's position. Numbers only grow, and all ranks of a run count the same things, so that they tell
    who is behind.

    phase: what the run is at, for the user. patient: in this phase a rank may be idle for long, such as one
    that waits for another machine outside of the run. step: finished optimizer steps. begun, ended: passes
    over the model and optimizer steps. met: calls of `Comm` that all ranks make together. in_pass, in_call:
    how many of them are going on.
    """

    def __init__(self) -> None:
        self.phase, self.patient, self.step = "the start", False, 0
        self.begun = self.ended = self.met = self.in_pass = self.in_call = 0

    def enter(self, phase: str, patient: bool = False) -> None:
        self.phase, self.patient = phase, patient

    @contextmanager
    def during(self, phase: str, patient: bool = False) -> Iterator[None]:
        """A context of a phase within another one."""
        before = self.phase, self.patient
        self.enter(phase, patient)
        try:
            yield
        finally:
            self.enter(*before)

    @contextmanager
    def passing(self) -> Iterator[None]:
        """A context in which the engine runs the model, or steps its optimizer."""
        self.begun += 1
        self.in_pass += 1
        try:
            yield
        finally:
            self.in_pass -= 1
        self.ended += 1

    @contextmanager
    def meeting(self) -> Iterator[None]:
        """A context in which this rank may wait for others."""
        self.met += 1
        self.in_call += 1
        try:
            yield
        finally:
            self.in_call -= 1


def meets(method: Method) -> Method:
    """A method of an object with a `course`, all of which is `Course.meeting`."""

    @functools.wraps(method)
    def counted(self, *arguments, **settings):
        with self.course.meeting():
            return method(self, *arguments, **settings)

    return counted
