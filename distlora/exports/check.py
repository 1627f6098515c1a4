"""Whether a merged model computes what the run does: both are loaded, and given the same inputs."""

import logging
import math
from pathlib import Path

import torch
from torch import Tensor

from distlora.engine.host_memory import free_host_memory
from distlora.errors import UserError
from distlora.exports.merged import Merged
from distlora.exports.placing import Placing
from distlora.exports.sources import Source
from distlora.files.tensors import TensorFiles
from distlora.maths.linalg import with_row_norms
from distlora.maths.low_rank import add_pair
from distlora.sentences import first_line

#: The largest difference of logits, relative to the largest logit. The weights that are compared are rounded
#: alike, so that only the order of sums is left.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1e-2, torch.float16: 2e-3}

log = logging.getLogger(__name__)


def check_merged(draft: Path, merged: Merged, pad_token_id: int | None = None) -> float | None:
    """The difference between what the merged model in `draft` computes and what the pretrained model computes
    with the updates: of all logits the largest, relative to the largest logit.

    None, with a line in the log, where it cannot be told: the model does not fit into this machine's memory,
    is of a class of the user's, or takes other inputs, or this process trains under ZeRO-3. Raises UserError
    where the difference is beyond rounding, where the run's logits are not finite, and where the merged model
    cannot be loaded.
    """
    from distlora.models.reload import logits_of, reloaded

    source, dtype = merged.source, _dtype_to_load(draft, merged)
    found = dtype and _logits_or_none(merged, dtype, pad_token_id)
    if found is None:
        return None
    inputs, expected = found
    again = "; with --no-check it is written all the same, or export with --format peft"
    try:
        model, missing = reloaded(draft, source.model["class"], dtype)
        lacking = sorted(missing & {*source.heads, *map(merged.weight_of, source.layers)})
        if lacking:
            raise UserError(f"its files lack {lacking[0]}")
        found = logits_of(model, inputs)
    except Exception as error:  # the same inputs were good for the pretrained model
        raise UserError(f"the merged model cannot be used ({first_line(error)}){again}") from error
    difference = float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-30))
    if not difference <= TOLERANCE[dtype]:
        raise UserError(
            f"the merged model does not compute what the run does: its logits are off by {difference:.1e} of "
            f"the largest one, and rounding explains {TOLERANCE[dtype]:g}{again}"
        )
    return difference


def check_finite(base: Path, source: Source, pad_token_id: int | None = None) -> None:
    """Raises UserError where the logits of the pretrained model in `base` with the updates are not finite. A
    line in the log where that cannot be told: see `check_merged`."""
    try:
        merged = Merged(base, source, Placing(base, source), None)
    except (UserError, OSError) as error:
        return _left_out(first_line(error))
    dtype = _dtype_to_load(base, merged)
    if dtype is not None:
        _logits_or_none(merged, dtype, pad_token_id)


def _dtype_to_load(directory: Path, merged: Merged) -> torch.dtype | None:
    """That in which the models are loaded; None, with a line in the log, where they cannot be. directory: of
    weights that have to fit beside the pretrained ones."""
    from distlora.models.reload import can_reload

    if not can_reload(merged.source.model["class"]):
        return _left_out("that needs a class of transformers and no ZeRO-3 in this process")
    dtype = _dtype_that_fits(directory, merged)
    return _left_out("this machine has too little memory") if dtype is None else dtype


def _logits_or_none(
    merged: Merged, dtype: torch.dtype, pad_token_id: int | None
) -> tuple[dict[str, Tensor], Tensor] | None:
    """See `_logits_of_run`; None, with a line in the log, for a model that takes other inputs."""
    from distlora.models.reload import NotFinite

    log.info("computing the logits of the run's weights for one batch: the pretrained model is loaded")
    try:
        return _logits_of_run(merged, dtype, pad_token_id)
    except NotFinite:
        raise UserError(
            f"the weights after step {merged.source.step} give logits that are infinite or not a number, so "
            "nothing is exported; name another checkpoint by --step, or give --no-check"
        ) from None
    except Exception as error:  # whatever a class may want of its inputs
        return _left_out(f"{merged.source.model['class']} takes other inputs ({first_line(error)})")


def _left_out(why: str) -> None:
    log.info("what the run's weights compute was not checked: %s", why)


def _dtype_that_fits(draft: Path, merged: Merged) -> torch.dtype | None:
    """In which both models can be loaded, one after the other: float32 for a sharp comparison, else that of
    the files."""
    free = free_host_memory()
    files, pretrained = TensorFiles(draft, "model"), TensorFiles(merged.base, "model")
    sizes = [math.prod(files.shape(name)) for name in files.names]
    largest = max([*sizes, *(math.prod(shape[1:]) for shape in merged.source.layers.values())])
    usual = {_usual_dtype(files), _usual_dtype(pretrained)}
    own = usual.pop() if len(usual) == 1 else torch.float32
    for dtype in dict.fromkeys((torch.float32, own)):
        # Beside the weights: the largest one three times in float32, and what a forward pass takes. A stack
        # of experts is one of them, also where the files hold each expert by itself.
        needed = sum(sizes) * dtype.itemsize + largest * 12 + (256 << 20)
        if dtype in TOLERANCE and (free is None or needed < free):
            return dtype
    return None


def _usual_dtype(files: TensorFiles) -> torch.dtype:
    """The floating-point dtype of most numbers: masks are integers, and single layers may be wider."""
    counts = dict[torch.dtype, int]()
    for name in files.names:
        dtype = files.dtype(name)
        if dtype.is_floating_point:
            counts[dtype] = counts.get(dtype, 0) + math.prod(files.shape(name))
    return max(counts, key=counts.__getitem__, default=torch.float32)


@torch.no_grad()
def _logits_of_run(
    merged: Merged, dtype: torch.dtype, pad_token_id: int | None
) -> tuple[dict[str, Tensor], Tensor]:
    """The inputs, and the logits that the pretrained model has for them with the updates in the places where
    the run has them, by the names of the modules; weights are rounded as they were for the merged files."""
    from distlora.models.reload import (
        changed_experts,
        changed_weight,
        fixed_inputs,
        logits_of,
        reloaded,
        separate,
    )

    source: Source = merged.source
    model, _ = reloaded(merged.base, source.model["class"], dtype, _settings(source))
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for head in source.heads:
        parameters[head].data.copy_(source.read(head).to(merged.dtype(head)))
    for layer in source.layers:
        pair, name = source.low_rank(layer), merged.weight_of(layer)

        def change(weight, layer=layer, pair=pair, name=name):
            total = add_pair(weight, pair)
            if layer in source.magnitudes:
                total = with_row_norms(total, source.magnitude(layer))
            return total.to(merged.dtype(name))

        if name == layer:
            changed_experts(model, layer, change)
        else:
            separate(model, model.get_submodule(layer))
            changed_weight(model.get_submodule(layer), change)
    _round(model, merged)
    if pad_token_id is None:
        pad_token_id = source.model.get("pad_token_id")
    inputs = fixed_inputs(model, pad_token_id)
    return inputs, logits_of(model, inputs)


def _settings(source: Source) -> dict:
    """Of a classifier, what its pretrained config may not say."""
    labels = source.model.get("labels")
    if not labels:
        return {}
    settings = {"id2label": dict(enumerate(labels)), "label2id": {name: i for i, name in enumerate(labels)}}
    pad = source.model.get("pad_token_id")
    return settings if pad is None else settings | {"pad_token_id": pad}


def _round(model: torch.nn.Module, merged: Merged) -> None:
    """Rounds the weights that were not trained to the dtype that was asked for, if one was."""
    if merged.asked is not None:
        for parameter in model.parameters():
            parameter.data.copy_(parameter.data.to(merged.asked))
