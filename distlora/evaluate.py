"""Answers to held-out problems: generated greedily, judged by the task's own rule."""

from collections.abc import Sequence

import torch

from distlora.data import Sample, collate_prompts, is_correct, shard
from distlora.engine import Engine
from distlora.model import generate

#: Prompts that are answered at once.
GENERATION_BATCH = 32


@torch.no_grad()
def exact_match(engine: Engine, tokenizer, task: str, samples: Sequence[Sample], max_new_tokens: int) -> float:
    """Share (0 … 1) of the samples whose generated answer is the expected one, spread over the ranks.

    The model is gathered once if it fits, and then runs without ZeRO's hooks; otherwise layer by layer, in lockstep.
    """
    comm = engine.comm
    correct = 0
    engine.train_mode(False)
    with engine.whole_model() as gathered:
        size = min(GENERATION_BATCH, -(-len(samples) // comm.world_size))
        for indices in shard(len(samples), comm.rank, comm.world_size, size):
            part = [samples[i] for i in indices]
            batch = collate_prompts(part, tokenizer.pad_token_id, comm.device)
            answers = generate(
                engine.module, batch, max_new_tokens, tokenizer.eos_token_id, tokenizer.pad_token_id, partitioned=not gathered
            )
            texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
            correct += sum(is_correct(task, text, sample.answer) for text, sample in zip(texts, part))
    engine.train_mode(True)
    (total,) = comm.sum(correct)
    return total / len(samples)
