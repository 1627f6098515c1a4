"""Checkpoints and exports of an adapter that is being trained."""

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch

from distlora.api.adapted import Adapted
from distlora.checkpoints.save import save as save_checkpoint
from distlora.errors import UserError
from distlora.exports.card import About
from distlora.exports.check import check_merged
from distlora.exports.merged import export_merged_from_engine
from distlora.exports.peft import export_peft_from_engine

log = logging.getLogger(__name__)


def save(
    adapted: Adapted,
    directory: str | os.PathLike[str],
    *,
    step: int | None = None,
    identity: dict[str, Any] | None = None,
    extra: dict[str, Any] | None = None,
    keep: int = 2,
    claimed: bool = False,
    check: Callable[[], None] = lambda: None,
) -> Path:
    """Writes `directory/checkpoint-<step>` and returns it; of those up to this step the newest `keep` stay.

    It holds all that training changes, frozen weights included (as the updates made to them), and what the
    next recompositions need, on any number of ranks. Beside an `engine.save_checkpoint` of the same step it
    holds what that one lacks; a learning-rate schedule is the caller's. step: by default the steps taken.
    identity, extra: what the caller wants to find again in the state that `load` returns; JSON. claimed: all
    checkpoints in the directory are of this run, broken ones too. Otherwise what others have written there is
    left alone. check: raises UserError, on rank 0, where the caller must not write any more. Errors:
    UserError where something else has that name, or a later checkpoint is of another run.
    """
    engine, recomposer = adapted.engine, adapted.recomposer
    if adapted.amid_step:
        raise UserError("save was called between before_step and after_step: call it after both")
    step = adapted.steps if step is None else step
    about = {"taken": adapted.steps, "engine_steps": engine.engine_steps()}
    return save_checkpoint(
        engine, adapted.attached, directory, step, identity or {}, extra, keep,
        recomposer=recomposer, about=about, claimed=claimed, check=check,
    )  # fmt: skip


def export(
    adapted: Adapted,
    out: str | os.PathLike[str],
    *,
    format: Literal["peft", "merged"] = "peft",
    base_model: str | os.PathLike[str] | None = None,
    dtype: torch.dtype | None = None,
    check: bool = True,
    about: About | None = None,
) -> Path:
    """Writes what was trained to the directory `out`: an ordinary LoRA for PEFT, or the merged model.

    base_model: for "peft" what others find the pretrained model under (by default what the model's config
    says); for "merged" the directory of its safetensors files. dtype: by default the model's
    for "peft" (float32 where that would change an update by more than its precision explains), and that of
    the pretrained files for "merged". about: what the model card says of the run. check: whether the merged
    model is loaded, on rank 0, and compared with the pretrained one and its updates on one batch. The
    comparison is left out, with a line in the log, under ZeRO-3, for a class that transformers does not have,
    and where memory is short. Errors: UserError where
    they differ.
    """
    if format == "peft":
        config = getattr(adapted.model, "config", None)
        name = str(base_model or getattr(config, "name_or_path", "") or "")
        if not name:
            log.info("%s does not say which model it is for: give base_model=", out)
        return export_peft_from_engine(
            adapted.engine, adapted.attached, out, name, adapted.steps, dtype, about
        )
    if format != "merged":
        raise UserError(f"format is {format}; wanted peft or merged")
    if base_model is None:
        raise UserError("merged weights are made of the pretrained files: give base_model=, their directory")
    options = {"examine": check_merged} if check else {}
    return export_merged_from_engine(
        adapted.engine, adapted.attached, out, Path(base_model), adapted.steps, dtype, **options
    )
