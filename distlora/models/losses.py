"""The training losses: of the response tokens of a language model, of the labels of a classifier, and of the
scores of a regression.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from distlora.models.cross_entropy import cross_entropy, label_cross_entropy
from distlora.models.dry_run import text_inputs
from distlora.models.output import output_of
from distlora.models.packing import in_one_row, is_packed, packed_masks, wants_one_row
from distlora.models.router_loss import router_loss, with_router_loss
from distlora.models.targets import IGNORE, Batch


def response_loss(
    model: PreTrainedModel, batch: Batch, weights: Tensor | None = None, smoothing: float = 0.0
) -> tuple[Tensor, int]:
    """The sum of the cross-entropies of the response tokens, and the number of these tokens.

    batch: `input_ids`, `attention_mask` and `labels`, int64 (batch, length). Position t predicts the label at
    t + 1; where that is IGNORE, there is no loss. weights: (batch,), a factor for each row's loss; the count
    ignores it. smoothing: see `cross_entropy`. In training, without weights, the loss of a router is added:
    see `with_router_loss`. A packed batch has `position_ids` as well: see `distlora.models.packing`.

    Returns a float32 scalar and an int. The scalar is connected to every layer even if no token has a loss:
    the gradients are zero then.
    """
    following = batch["labels"][:, 1:]
    rows, columns = (following != IGNORE).nonzero(as_tuple=True)
    targets = following[rows, columns]
    passed = _pass(model, batch, rows, columns)
    if weights is None:
        factors = torch.ones(len(rows), device=passed.states.device)
    else:
        factors = weights.to(passed.states.device).float()[rows]
    loss = cross_entropy(passed.head, passed.states, targets, factors, passed.softcap, smoothing)
    if weights is None:
        loss = with_router_loss(model, loss, passed.router, len(rows))
    return loss, len(rows)


def hidden_states(
    model: PreTrainedModel, batch: Batch, rows: Tensor, columns: Tensor
) -> tuple[Tensor, nn.Module, float | None]:
    """Of n positions of a batch: hidden states (n, h), the layer that makes logits of them, and the cap of
    these logits. One pass through the model, but for that layer.

    Where only the class itself knows how its logits come about, the "hidden states" are these logits, and the
    layer leaves them as they are. batch: `input_ids` and `attention_mask`. rows, columns: (n,) int64.
    """
    passed = _pass(model, batch, rows, columns)
    return passed.states, passed.head, passed.softcap


@dataclass(frozen=True)
class _Passed:
    """states, head, softcap: what `hidden_states` answers. router: see `router_loss`."""

    states: Tensor
    head: nn.Module
    softcap: float | None
    router: Tensor | None


def _pass(model: PreTrainedModel, batch: Batch, rows: Tensor, columns: Tensor) -> _Passed:
    if is_packed(batch) and wants_one_row(model):
        batch, rows, columns = in_one_row(batch, rows, columns)
    inputs, output = text_inputs(model, batch), output_of(model)
    if is_packed(batch):
        inputs["attention_mask"] = packed_masks(model, batch)
    if output is None:
        outputs = model(**inputs, use_cache=False)
        states, head, softcap = outputs.logits[rows, columns], nn.Identity(), None
    else:
        outputs = model.get_submodule(output.base)(**inputs, use_cache=False)
        states, head, softcap = (
            outputs.last_hidden_state[rows, columns],
            model.get_output_embeddings(),
            output.softcap,
        )
        if output.scale != 1:
            states = states * output.scale
    return _Passed(states, head, softcap, router_loss(model, outputs, batch.get("attention_mask")))


def label_logits(model: PreTrainedModel, batch: Batch) -> Tensor:
    """The classifier's logits, (batch, labels).

    batch: `input_ids`, `attention_mask` and, for some models, `token_type_ids`. Its `labels` are left out.
    """
    return model(**text_inputs(model, batch)).logits


def label_loss(
    model: PreTrainedModel, batch: Batch, weights: Tensor | None = None, smoothing: float = 0.0
) -> tuple[Tensor, int]:
    """The sum of the cross-entropies of the rows with a label, and the number of these rows.

    batch: as for `label_logits`, with `labels` int64 (batch,), IGNORE for a row without one. The rest is as
    in `response_loss`.
    """
    labels = batch["labels"]
    loss = label_cross_entropy(label_logits(model, batch), labels, weights, smoothing)
    return loss, int((labels != IGNORE).sum())


def squared_error(scores: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
    """The weighted sum of the squared errors of n scores: a float32 scalar (float64 for a model in float64).

    scores: (n, 1), a model's output. labels: (n,); IGNORE for a row without a loss. weights: (n,) float32.
    """
    exact = scores.squeeze(-1).to(torch.promote_types(scores.dtype, torch.float32))
    errors = torch.where(labels == IGNORE, 0, (exact - labels.to(exact.dtype)).square())
    return (errors if weights is None else errors * weights).sum()


def score_loss(model: PreTrainedModel, batch: Batch, weights: Tensor | None = None) -> tuple[Tensor, int]:
    """The sum of the squared errors of the rows with a score, and the number of these rows: divided by it,
    the mean squared error, which transformers trains where a model has one output.

    batch: as for `label_logits`, with `labels` (batch,), IGNORE for a row without one. The rest is as in
    `response_loss`.
    """
    labels = batch["labels"]
    return squared_error(label_logits(model, batch), labels, weights), int((labels != IGNORE).sum())
