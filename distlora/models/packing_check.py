"""Whether a language model keeps the samples of a packed row apart. Asked of the loaded model itself, as for
`causality`: a class may pass a state on, or place tokens by where they stand in the row.
"""

import logging

import torch
from torch import Tensor
from transformers import PreTrainedModel

from distlora.models.causality import ordinary_tokens, rounding_of
from distlora.models.losses import hidden_states

#: Tokens of the two texts, and of the padding behind them.
SIZES = (5, 8, 2)

log = logging.getLogger(__name__)


@torch.no_grad()
def mixes_packed_samples(model: PreTrainedModel) -> Tensor:
    """Whether the states of a sample depend on what stands before it in its row; a bool scalar. One pass, for
    a model in evaluation mode, of two rows that hold the same two texts, each first in one of them.
    """
    one, other, padding = SIZES
    ids = torch.tensor(ordinary_tokens(model, one + other))
    first, second, rest = ids[:one], ids[one:], ids[:1].expand(padding)
    device = model.get_input_embeddings().weight.device
    positions = [
        torch.cat([torch.arange(size) for size in sizes]) for sizes in (SIZES, (other, one, padding))
    ]
    batch = {
        "input_ids": torch.stack([torch.cat([first, second, rest]), torch.cat([second, first, rest])]),
        "position_ids": torch.stack(positions),
    }
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    batch["attention_mask"][:, one + other :] = 0
    rows, columns = batch["attention_mask"].nonzero(as_tuple=True)
    batch = {name: value.to(device) for name, value in batch.items()}
    try:
        states, _, _ = hidden_states(model, batch, rows.to(device), columns.to(device))
    except Exception as error:  # classes raise what they like for masks or positions that they do not know
        log.debug("%s with a packed batch: %r", type(model).__name__, error)
        return torch.tensor(True, device=device)
    here, there = states.float().chunk(2)
    there = torch.cat([there[other:], there[:other]])
    differences = (here - there).norm(dim=-1) / here.norm(dim=-1)
    return ~(differences.max() <= rounding_of(states))
