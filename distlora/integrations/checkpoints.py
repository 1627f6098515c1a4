"""What a trainer's checkpoint holds of an adapted model, and its learning-rate schedule."""

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR

from distlora import api
from distlora.engine.coordination import on_main
from distlora.errors import UserError

#: The folder in a checkpoint of a trainer that holds ours.
STATE = "distlora"
#: Where an adapter is written before its files are moved into a directory that holds others.
DRAFT = ".distlora-adapter"


def save_adapter(adapted: api.Adapted, out: Path) -> None:
    """Writes the adapter in PEFT's format into `out`, over an earlier one; other files there stay.
    Collective.
    """

    def move() -> None:
        for path in sorted((out / DRAFT).iterdir()):
            os.replace(path, out / path.name)
        (out / DRAFT).rmdir()

    api.export(adapted, out / DRAFT)
    on_main(adapted.engine.comm, out, move)


def refuse_no_state(checkpoint: str | os.PathLike) -> None:
    """UserError where a directory is no checkpoint that an adapted model can go on from."""
    if not Path(checkpoint).is_dir():
        raise UserError(f"resume_from_checkpoint={checkpoint}: there is no such directory")
    if not (Path(checkpoint) / STATE).is_dir():
        raise UserError(
            f"resume_from_checkpoint={checkpoint}: it has no folder {STATE}, so it was saved by another "
            "trainer or with save_only_model=True; name a checkpoint with one"
        )


class Schedule:
    """The learning-rate schedule of a trainer, perhaps wrapped by accelerate."""

    def __init__(self, scheduler: Any, optimizer: Any):
        self._scheduler, self._optimizer = getattr(scheduler, "scheduler", scheduler), optimizer

    def rate(self, step: int) -> float:
        """Of optimizer step 0, 1, … where the schedule is a function of the step; else of the next one."""
        if isinstance(self._scheduler, LambdaLR):
            return self._scheduler.base_lrs[0] * self._scheduler.lr_lambdas[0](step)
        return float(self._optimizer.param_groups[0]["lr"])

    def state(self) -> dict[str, Any]:
        """As JSON. Errors: UserError for a schedule that keeps something else."""
        state = self._scheduler.state_dict()
        rates = [float(group["lr"]) for group in self._optimizer.param_groups]
        try:
            return json.loads(json.dumps({"scheduler": state, "rates": rates}, default=_number))
        except (TypeError, ValueError) as error:
            name = type(self._scheduler).__name__
            raise UserError(f"the state of the schedule {name} cannot be saved as JSON ({error})") from None

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on from what `state` gave."""
        self._scheduler.load_state_dict(state["scheduler"])
        for group, rate in zip(self._optimizer.param_groups, state["rates"]):
            group["lr"] = rate


def _number(value: Any) -> float:
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        return value.item()
    raise TypeError(f"{type(value).__name__} is no number")
