"""`summary.json`: what a finished run came to, in numbers that a report compares."""

import json
import resource
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from distlora.checkpoints.best import Best
from distlora.engine.comm import Comm
from distlora.engine.coordination import on_main
from distlora.files.atomic import write_text
from distlora.training.monitor import jsonable, records
from distlora.training.run_directory import METRICS, SUMMARY

#: What the speed of a run counts: tokens where it learns from texts, images where it learns from these.
UNITS = ("tokens", "images")
SPEEDS = tuple(f"{unit}_per_second" for unit in UNITS)
#: Of a run's `Summary`, what is written as it is.
FACTS = ("trained", "lora_trained", "rank", "steps", "stopped_early", "best", "init_seconds")


@dataclass
class Summary:
    """What a run came to. before, after, on the evaluation set: "loss", a classifier's metrics, and
    "exact_match" (0 … 1) where it was asked for. found_rate: the learning rate, where it was searched. steps:
    those that were made. best: the best evaluation, where its checkpoint is kept.
    """

    run_dir: Path
    adapter: Path | None
    trained: int
    lora_trained: int
    rank: int
    steps: int
    before: dict[str, float] = field(default_factory=dict)
    after: dict[str, float] = field(default_factory=dict)
    init_seconds: float = 0.0
    step_seconds: float = 0.0
    found_rate: float | None = None
    stopped_early: bool = False
    best: Best | None = None
    tensorboard: str | None = None


def record_summary(comm: Comm, outcome: Mapping[str, Any], first_step: int, steps_per_epoch: int) -> None:
    """Writes the file on rank 0. Collective. At the very end, so that the peak of memory is the whole run's.

    outcome: the fields of the run's `Summary`. first_step: finished steps when this start began, 0 for a new
    run: seconds and memory are those of this start. A start that had no step to make leaves the file of the
    start that made them.
    """
    peak = peak_memory(comm)
    run_dir, seconds = Path(outcome["run_dir"]), outcome["step_seconds"] or None
    content = {key: outcome[key] for key in FACTS} | {
        "first_step": first_step,
        "steps_per_epoch": steps_per_epoch,
        "step_seconds": seconds,
        "epoch_seconds": seconds and seconds * steps_per_epoch,
        **dict.fromkeys(SPEEDS),
        "peak_memory_bytes": peak,
        "device": comm.device.type,
        "ranks": comm.world_size,
        **{
            when: {key: jsonable(value) for key, value in outcome[when].items()}
            for when in ("before", "after")
        },
    }

    def write() -> None:
        path = run_dir / SUMMARY
        if seconds is not None or not path.exists():
            found = content | _last_speeds(run_dir / METRICS)
            write_text(path, json.dumps(found, indent=1) + "\n")

    on_main(comm, run_dir, write)


def peak_memory(comm: Comm) -> int:
    """The most bytes that any rank has held so far: of tensors on its GPU, or of its whole process in main
    memory where it computes on the CPU. Collective.
    """
    return max(comm.gather(peak_memory_here(comm.device)))


def peak_memory_here(device: torch.device) -> int:
    """The same of this rank alone. Not collective."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _peak_of_process()


def _peak_of_process() -> int:
    """Bytes. Not `ru_maxrss` where it can be helped: it may be the launcher's, from before the exec."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts KiB


def _last_speeds(metrics: Path) -> dict[str, float | None]:
    """`tokens_per_second` and `images_per_second` of all ranks, None for the one that the run does not count;
    as the monitor has written it last: the mean over the newest start's steps, with the evaluations and
    checkpoints between them.
    """
    found: dict[str, float | None] = dict.fromkeys(SPEEDS)
    if metrics.exists():
        for _, record in records(metrics.read_text(encoding="utf-8", errors="replace")):
            found = {key: record.get(f"train/{key}", value) for key, value in found.items()}
    return found
