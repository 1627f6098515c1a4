"""Packed rows: several samples in one row of a batch, none of which attends to another.

`position_ids` (batch, length) begin anew with every sample, and say by that where samples end. transformers'
own functions make block-diagonal masks of them, with a model's sliding window or chunks inside each block.
Flash attention takes no such mask: it gets all rows as one without padding, and cuts that at the positions.
"""

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.masking_utils import create_masks_for_generate
from transformers.utils.generic import is_flash_attention_requested

from distlora.errors import UserError
from distlora.models.targets import Batch


def is_packed(batch: Batch) -> bool:
    return "position_ids" in batch


def wants_one_row(model: PreTrainedModel) -> bool:
    """Whether the model's attention takes packed samples as one row without padding."""
    return is_flash_attention_requested(model.config.get_text_config(decoder=True))


def in_one_row(batch: Batch, rows: Tensor, columns: Tensor) -> tuple[Batch, Tensor, Tensor]:
    """A packed batch as one row (1, tokens) without padding, and where in it n positions of the batch are.

    rows, columns: (n,) int64, of tokens that are no padding.
    """
    kept = batch["attention_mask"].bool()
    places = kept.flatten().cumsum(0).view_as(kept) - 1
    whole = {name: value[kept][None] for name, value in batch.items()}
    return whole, torch.zeros_like(rows), places[rows, columns]


def packed_masks(model: PreTrainedModel, batch: Batch) -> Tensor | dict[str, Tensor] | None:
    """What a model is to be given as `attention_mask` of a packed batch: one for all of its layers, or one
    for each kind of them; None where its attention needs none. (Some classes, such as GPT-OSS, make masks
    without a look at the positions; all take those that are made already.)
    """
    ids, dtype = batch["input_ids"], model.get_input_embeddings().weight.dtype
    states = torch.empty(*ids.shape, 0, dtype=dtype, device=ids.device)  # of which only shape and dtype count
    return create_masks_for_generate(model.config, states, None, None, batch["position_ids"])


def refuse_unpackable(model: PreTrainedModel, path: str) -> None:
    """Raises UserError for a class that keeps a state from token to token. model: without weights; what other
    classes make of packed rows only weights show: see `distlora.models.packing_check`.
    """
    if model._is_stateful:
        raise UserError(mixing(model, path))


def mixing(model: PreTrainedModel, path: str) -> str:
    """Why a model cannot learn from packed rows, as a sentence."""
    return (
        f"data.packing: in {type(model).__name__} of {path} what is computed of a sample depends on those "
        "that stand before it in its row; set it to false, and data.group_by_length to true to save padding "
        "all the same"
    )
