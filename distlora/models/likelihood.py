"""How probable given responses are: the sum of the logarithms of their tokens' probabilities."""

from collections.abc import Sequence

import torch
from torch.nn import functional as F
from transformers import PreTrainedModel

from distlora.models.losses import hidden_states


@torch.no_grad()
def option_likelihoods(
    model: PreTrainedModel, rows: Sequence[tuple[Sequence[int], Sequence[int]]], pad_id: int
) -> list[float]:
    """For each row (prompt, option) of token ids, log p(option | prompt) in float32.

    A prompt has at least one token. An option without tokens has the logarithm 0. The base model runs once
    and the output head once, on the options' positions only: also without rows, on a rank that only goes
    along where weights are gathered layer by layer.
    """
    training = model.training
    model.eval()
    try:
        return _likelihoods(model, rows, pad_id)
    finally:
        model.train(training)


def _likelihoods(model: PreTrainedModel, rows, pad_id: int) -> list[float]:
    device = model.get_input_embeddings().weight.device
    texts = [list(prompt) + list(option) for prompt, option in rows] or [[pad_id]]
    longest = max(map(len, texts))
    ids = torch.tensor([text + [pad_id] * (longest - len(text)) for text in texts], device=device)
    mask = torch.tensor([[1] * len(text) + [0] * (longest - len(text)) for text in texts], device=device)
    # (row, position of an option's token); the position before predicts it.
    places = [
        (row, len(prompt) + offset)
        for row, (prompt, option) in enumerate(rows)
        for offset in range(len(option))
    ] or [(0, 1)]
    row, column = torch.tensor(places, device=device).T
    hidden, head, softcap = hidden_states(model, {"input_ids": ids, "attention_mask": mask}, row, column - 1)
    logits = head(hidden).float()
    if softcap is not None:
        logits = (logits / softcap).tanh() * softcap
    if not rows:
        return []
    chosen = -F.cross_entropy(logits, ids[row, column], reduction="none")
    return torch.zeros(len(rows), device=device).index_add_(0, row, chosen).tolist()
