"""Whether the tokens of a language model see those that follow them. Asked of the loaded model itself: there
are many settings and classes with such an attention.
"""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from distlora.models.dry_run import special_tokens
from distlora.models.losses import hidden_states

#: Tokens of each of the two texts.
TOKENS = 4
#: By how much, relative to their norm, states of equal tokens may differ: in half precision, and else. Where
#: later tokens are seen, it is several tenths.
HALF_ROUNDING, ROUNDING = 0.03, 1e-4


@torch.no_grad()
def sees_later_tokens(model: PreTrainedModel) -> Tensor:
    """Whether a token's state depends on the token after it; a bool scalar. One pass, for a model in
    evaluation mode, of two texts that differ in their last token alone.
    """
    rows, columns = torch.tensor([(row, column) for row in (0, 1) for column in range(TOKENS - 1)]).T
    ids = _two_texts(model)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    states, _, _ = hidden_states(model, batch, rows.to(ids.device), columns.to(ids.device))
    one, other = states.float().chunk(2)
    differences = (one - other).norm(dim=-1) / one.norm(dim=-1)
    return differences.max() > rounding_of(states)


def rounding_of(states: Tensor) -> float:
    """By how much equal states may differ, relative to their norm."""
    return HALF_ROUNDING if states.dtype.itemsize < 4 else ROUNDING


def _two_texts(model: PreTrainedModel) -> Tensor:
    """(2, TOKENS) int64."""
    *before, one, other = ordinary_tokens(model, TOKENS + 1)
    device = model.get_input_embeddings().weight.device
    return torch.tensor([[*before, one], [*before, other]], device=device)


def ordinary_tokens(model: PreTrainedModel, count: int) -> list[int]:
    """Tokens from all over the vocabulary: those that it holds in reserve lie together, and are alike."""
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    special, step = special_tokens(model.config), vocabulary // (count + 1)
    return [
        next(token for token in range(start, vocabulary) if token not in special)
        for start in range(step, vocabulary, step)[:count]
    ]
