"""Scores on held-out samples: of greedily generated answers, and of a classifier's labels."""

from collections.abc import Iterable, Sequence

import torch

from distlora.data import LabelledSample, Sample, collate_labelled, collate_prompts, shard
from distlora.engine.protocol import Engine
from distlora.models.cross_entropy import label_cross_entropy
from distlora.models.generation import generate
from distlora.models.losses import label_logits, squared_error
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
    engine: Engine, samples: Sequence[LabelledSample], pad_id: int, batch_size: int, metrics: Iterable[str]
) -> dict[str, float]:
    """The mean loss over the samples, as "loss", and the `distlora.tasks.metrics` of these names. The loss is
    the cross-entropy; of samples with scores it is the squared error.

    Collective: each rank predicts the labels of its share of the samples, once. Raises Preempted between two
    batches.
    """
    comm = engine.comm
    loss = 0.0
    expected = torch.tensor([sample.label for sample in samples])
    is_score = expected.is_floating_point()
    error = squared_error if is_score else label_cross_entropy
    predicted = torch.zeros(len(samples), dtype=expected.dtype, device=comm.device)
    engine.train_mode(False)
    for indices in shard(len(samples), comm.rank, comm.world_size, batch_size):
        batch = collate_labelled([samples[i] for i in indices], pad_id, comm.device)
        logits = engine.run(label_logits, batch)
        loss += comm.sum_or_stop(float(error(logits, batch["labels"])))[0]
        found = logits.squeeze(-1).to(expected.dtype) if is_score else logits.argmax(-1)
        predicted[indices] = found[: len(indices)]
    engine.train_mode(True)
    predicted = comm.all_reduce(predicted).cpu()
    return {"loss": loss / len(samples)} | {name: METRICS[name](predicted, expected) for name in metrics}
