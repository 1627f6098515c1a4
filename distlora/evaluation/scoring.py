"""Scores on held-out samples: of greedily generated answers, and of a classifier's labels."""

from collections.abc import Callable, Iterable, Sequence

import torch

from distlora.data import Sample, collate_prompts, shard
from distlora.engine.protocol import Engine
from distlora.models.cross_entropy import label_cross_entropy
from distlora.models.generation import generate
from distlora.models.losses import label_logits
from distlora.models.targets import Batch
from distlora.tasks import is_correct
from distlora.tasks.metrics import METRICS

#: Prompts that are answered at once.
GENERATION_BATCH = 32


@torch.no_grad()
def exact_match(
    engine: Engine, tokenizer, task: str, samples: Sequence[Sample], max_new_tokens: int
) -> float:
    """The share (0 … 1) of the samples whose generated answer is correct by the task's rule.

    Collective: each rank answers its share of the samples. If the model fits, it is gathered once and runs
    without ZeRO's hooks; otherwise the ranks gather it layer by layer, in step. Raises Preempted between two
    batches.
    """
    comm = engine.comm
    correct = 0.0
    engine.train_mode(False)
    with engine.whole_model() as gathered:
        size = min(GENERATION_BATCH, -(-len(samples) // comm.world_size))
        for indices in shard(len(samples), comm.rank, comm.world_size, size):
            part = [samples[i] for i in indices]
            batch = collate_prompts(part, tokenizer.pad_token_id, comm.device)
            answers = generate(
                engine.module,
                batch,
                max_new_tokens,
                tokenizer.eos_token_id,
                tokenizer.pad_token_id,
                partitioned=not gathered,
            )
            texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
            right = sum(is_correct(task, text, sample.answer) for text, sample in zip(texts, part))
            correct += comm.sum_or_stop(right)[0]
    engine.train_mode(True)
    return correct / len(samples)


@torch.no_grad()
def label_scores(
    engine: Engine,
    samples: Sequence,
    batch_of: Callable[[list], Batch],
    batch_size: int,
    metrics: Iterable[str],
) -> dict[str, float]:
    """The mean cross-entropy over the samples, as "loss", and the `distlora.tasks.metrics` of these names.

    samples: with a `label` each. batch_of: makes a batch of some of them, or of none.
    Collective: each rank predicts the labels of its share of the samples, once. Raises Preempted between two
    batches.
    """
    comm = engine.comm
    loss = 0.0
    predicted = torch.zeros(len(samples), dtype=torch.int64, device=comm.device)
    engine.train_mode(False)
    for indices in shard(len(samples), comm.rank, comm.world_size, batch_size):
        batch = batch_of([samples[i] for i in indices])
        logits = engine.run(label_logits, batch)
        loss += comm.sum_or_stop(float(label_cross_entropy(logits, batch["labels"])))[0]
        predicted[indices] = logits.argmax(-1)[: len(indices)]
    engine.train_mode(True)
    expected = torch.tensor([sample.label for sample in samples])
    predicted = comm.all_reduce(predicted).cpu()
    return {"loss": loss / len(samples)} | {name: METRICS[name](predicted, expected) for name in metrics}
