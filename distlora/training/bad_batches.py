"""The batch of a bad step is kept for the user to look at: `bad_steps/step-<n>.json` in the run directory.

    {"step": n, "batch": number in the data order, "why": …, "loss": …, "rows_of_batch": …, "rows": [
        {"row": number in the training split as it was read, "rank": …, "loss": …, "text": …,
         "input_ids": […], "labels": …}, …]}

The rows of all ranks, those without a finite loss first, then by falling loss; `loss` is a row's own mean
over its targets, null where the step had been made before it turned out bad. Long batches and rows are cut,
and only the newest files stay. Numbers that JSON does not know are texts ("nan").
"""

import json
import math
import re
from pathlib import Path
from typing import Any

import torch

from distlora.engine.protocol import Engine
from distlora.files.atomic import write_text
from distlora.models.targets import Batch
from distlora.training.monitor import jsonable
from distlora.training.run_directory import BAD_STEPS
from distlora.training.samples import RunSamples
from distlora.training.step import LossSum
from distlora.training.writing import Writing

#: Files in a run directory, rows in a file, tokens of a row and characters of its text.
FILES, ROWS, TOKENS, CHARACTERS = 20, 64, 1024, 4000

_NAME = re.compile(r"step-(\d+)(?:-(\d+))?\.json")


def keep_batch(
    engine: Engine, data: RunSamples, loss: LossSum, writing: Writing, run_dir: Path, about: dict[str, Any],
    with_losses: bool,
) -> None:  # fmt: skip
    """Writes the file of a bad step. Collective: every rank brings its rows. What cannot be written is kept
    for `Writing.agree`.

    about: "step" (from 1), "batch" and "why". with_losses: whether the weights are those that the step met.
    """
    rows, found = [], data.rows_of_step(about["batch"])
    engine.train_mode(False)
    for number, batch in found:
        value = _loss(engine, loss, batch) if with_losses else None
        if number is not None:
            rows.append(_row(number, engine.comm.rank, batch, value, data.preprocessor))
    engine.train_mode(True)
    share = -(-ROWS // engine.comm.world_size)
    gathered = [row for part in engine.comm.gather(_worst(rows)[:share]) for row in part]
    counts = engine.comm.sum(len(rows))
    if not engine.comm.is_main:
        return
    with writing.errors.kept(run_dir / BAD_STEPS):
        writing.check()
        _write(run_dir / BAD_STEPS, about | {"rows_of_batch": int(counts[0]), "rows": _worst(gathered)})


@torch.no_grad()
def _loss(engine: Engine, loss: LossSum, batch: Batch) -> float | None:
    """Of one row; None without a target. Under ZeRO-3 collective."""
    total, targets = engine.run(loss, batch)
    return float(total) / targets if targets else None


def _row(number: int, rank: int, batch: Batch, loss: float | None, preprocessor) -> dict[str, Any]:
    row = {"row": number, "rank": rank, "loss": None if loss is None else jsonable(loss)}
    if "input_ids" in batch:
        ids = batch["input_ids"][0].tolist()[:TOKENS]
        row |= {"text": preprocessor.decode(ids)[:CHARACTERS], "input_ids": ids}
    labels = batch["labels"][0].tolist()
    return row | {"labels": labels[:TOKENS] if isinstance(labels, list) else jsonable(labels)}


def _worst(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    def badness(row: dict[str, Any]) -> float:
        loss = row["loss"]
        return -math.inf if loss is None else math.inf if isinstance(loss, str) else loss

    return sorted(rows, key=lambda row: (-badness(row), row["row"]))[:ROWS]


def _write(folder: Path, content: dict[str, Any]) -> None:
    folder.mkdir(exist_ok=True)
    write_text(_place(folder, content), json.dumps(content, indent=1) + "\n")
    files = [path for path in folder.iterdir() if _NAME.fullmatch(path.name)]
    for path in sorted(files, key=_age)[:-FILES]:
        path.unlink()


def _age(path: Path) -> tuple[int, int, int]:
    """By when it was written: after a rollback an earlier step may be the newer one."""
    return path.stat().st_mtime_ns, *_order(path)


def _order(path: Path) -> tuple[int, int]:
    step, again = _NAME.fullmatch(path.name).groups(default="1")
    return int(step), int(again)


def _place(folder: Path, content: dict[str, Any]) -> Path:
    """`step-7.json`; `step-7-2.json` for a second batch that step 7 could not be made with. The file that is
    of this batch already is replaced."""
    name, highest = f"step-{content['step']}", 0
    for path in folder.iterdir():
        if _NAME.fullmatch(path.name) and _order(path)[0] == content["step"]:
            if _batch_of(path) == content["batch"]:
                return path
            highest = max(highest, _order(path)[1])
    return folder / (f"{name}-{highest + 1}.json" if highest else f"{name}.json")


def _batch_of(path: Path) -> int | None:
    """The batch that a file is of; None without one that can be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))["batch"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
