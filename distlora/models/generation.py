"""Greedy generation."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    batch: dict[str, Tensor],
    max_new_tokens: int,
    eos_id: int | Iterable[int],
    pad_id: int,
    partitioned: bool = False,
) -> list[list[int]]:
    """Greedy answers: one list of token ids for each prompt, without the end token.

    batch: left-padded `input_ids` and `attention_mask`, int64 (batch, length). eos_id: the token, or the
    tokens, that end an answer. partitioned: True if every token takes a collective (ZeRO-3 with its hooks
    on); each rank then goes on until all ranks are done.
    """
    ends = {eos_id} if isinstance(eos_id, int) else set(eos_id)
    greedy = GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=sorted(ends),
        pad_token_id=pad_id,
        use_cache=True,
    )
    with _plain_generation(model, greedy):
        tokens = model.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            generation_config=greedy,
            synced_gpus=partitioned,
        )
    return [_until(answer, ends) for answer in tokens[:, batch["input_ids"].shape[1] :].tolist()]


@contextmanager
def _plain_generation(model: PreTrainedModel, greedy: GenerationConfig) -> Iterator[None]:
    """Evaluation mode, and none of the model's own defaults (a repetition penalty, a temperature)."""
    training, own = model.training, model.generation_config
    model.eval()
    model.generation_config = greedy
    try:
        yield
    finally:
        model.generation_config = own
        model.train(training)


def _until(tokens: list[int], ends: set[int]) -> list[int]:
    """The tokens before the first one of `ends`."""
    end = next((position for position, token in enumerate(tokens) if token in ends), len(tokens))
    return tokens[:end]
