"""Ranks and what they say to each other: the only user of torch.distributed."""

from distlora.engine.comm.course import Course
from distlora.engine.comm.group import Comm, Topology, is_broken_collective
from distlora.engine.comm.roll_call import RollCall

__all__ = ["Comm", "Course", "RollCall", "Topology", "is_broken_collective"]
