"""What is learned: a language model's responses or texts, a classifier's labels or a regression's scores; of
images in `image_objective`. The kind of the recipe's task is looked at only here.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import date as Date

import torch
from torch import Tensor, nn

from distlora.data import (
    ChatExamples,
    CompletionRows,
    Conventions,
    Encoded,
    EncodedDocuments,
    Examples,
    LabelledRows,
    Questions,
    collate,
    collate_labelled,
    examples_of,
    label_names,
    load_completion,
    load_labelled,
    load_questions,
    load_split,
    shard,
)
from distlora.engine.coordination import on_every_rank
from distlora.engine.protocol import Engine
from distlora.errors import UserError
from distlora.evaluation.scoring import exact_match, label_scores, perplexity
from distlora.models.causality import sees_later_tokens
from distlora.models.loading import head_parameters
from distlora.models.losses import label_loss, response_loss, score_loss
from distlora.models.packing import mixing, refuse_unpackable
from distlora.models.packing_check import mixes_packed_samples
from distlora.models.targets import Batch
from distlora.progress import each
from distlora.recipe.sections import Recipe
from distlora.tasks import CompletionTask, ImageTask, LabelTask, ResponseTask, ScoreTask, Task, get_task
from distlora.training.image_objective import ImageLabels
from distlora.training.objective_base import Objective, refuse_packing
from distlora.training.step import evaluation_loss
from distlora.training.text_objective import Texts


def conventions_of(recipe: Recipe) -> Conventions:
    """How a recipe's rows become tokens. Where nobody has named a day for chat templates, it is today."""
    day = recipe.data.chat_date or (Date.today().isoformat() if recipe.format >= 4 else None)
    return Conventions.of_format(recipe.format, recipe.data.special_tokens, day)


class Responses(Texts):
    """A language model learns the response to a prompt."""

    loss = staticmethod(response_loss)

    def __init__(self, recipe: Recipe):
        super().__init__(recipe)
        if recipe.data.labels is not None:
            raise UserError(
                f"data.labels: the task {recipe.data.task} has responses and no labels; remove them"
            )
        self._questions: Questions | None = None

    def _rows(self, split: str) -> Examples | ChatExamples:
        return examples_of(self.recipe.data, split)

    def read(self, split: str, tokenizer) -> Encoded:
        return load_split(self.recipe.data, split, tokenizer, conventions_of(self.recipe))

    def batch(self, samples: Sequence, tokenizer, device: torch.device) -> Batch:
        return collate(samples, tokenizer.pad_token_id, device)

    def bare_model(self) -> nn.Module:
        model = super().bare_model()
        if self.recipe.data.packing:
            refuse_unpackable(model, self.recipe.model.path)
        return model

    def check_loaded(self, engine: Engine) -> None:
        path = self.recipe.model.path
        if _ranks_with(engine, sees_later_tokens) == engine.comm.world_size:
            raise UserError(
                f"model.path={path}: in {type(engine.module).__name__} as configured "
                "tokens see those that follow them, so that it would read the response that it is to learn; "
                "give a causal language model",
                agreed=True,
            )
        if self.recipe.data.packing and _ranks_with(engine, mixes_packed_samples):
            raise UserError(mixing(engine.module, path), agreed=True)

    def evaluate(self, engine: Engine, tokenizer, samples: Sequence) -> dict[str, float]:
        parts = shard(
            len(samples), engine.comm.rank, engine.comm.world_size, self.recipe.train.micro_batch_size
        )
        batches = (
            self.batch([samples[i] for i in part], tokenizer, engine.comm.device)
            for part in each(parts, "evaluating", "batches", len(parts))
        )
        return {"loss": evaluation_loss(engine, batches, self.loss)}

    def generate(self, engine: Engine, tokenizer, samples: Sequence) -> dict[str, float]:
        data = self.recipe.data
        if not self.recipe.train.exact_match_samples:
            return {}
        if self._questions is None:
            on_every_rank(engine.comm, lambda: self.prepare(tokenizer))
        return {
            "exact_match": exact_match(engine, tokenizer, data.task, self._questions, data.max_new_tokens)
        }

    def score_names(self) -> tuple[str, ...]:
        return ("loss", "exact_match") if self.recipe.train.exact_match_samples else ("loss",)

    def prepare(self, tokenizer) -> None:
        data, count = self.recipe.data, self.recipe.train.exact_match_samples
        if count:
            questions = load_questions(data, data.eval_split, tokenizer, conventions_of(self.recipe))
            self._questions = replace(questions, items=questions.items[:count])
            self.check_questions(self._questions, tokenizer, data.max_new_tokens)


def _ranks_with(engine: Engine, finding: Callable[[nn.Module], Tensor]) -> int:
    """On how many ranks it is found of the model in evaluation mode. Collective."""
    engine.train_mode(False)
    (found,) = engine.comm.sum(float(engine.run(finding)))
    engine.train_mode(True)
    return round(found)


class Completions(Responses):
    """A language model learns every token of a text."""

    def __init__(self, recipe: Recipe):
        super().__init__(recipe)
        _refuse_questions(recipe)

    def _rows(self, split: str) -> CompletionRows:
        return CompletionRows(self.recipe.data, split)

    def read(self, split: str, tokenizer) -> EncodedDocuments:
        return load_completion(self.recipe.data, split, tokenizer, conventions_of(self.recipe))

    def told_of(self, encoded: EncodedDocuments) -> str:
        longest = self.recipe.data.max_length
        return f"pieces of {encoded.documents} texts ({encoded.cut} longer than {longest} tokens), "

    def score_names(self) -> tuple[str, ...]:
        return ("loss", "perplexity")

    def evaluate(self, engine: Engine, tokenizer, samples: Sequence) -> dict[str, float]:
        scores = super().evaluate(engine, tokenizer, samples)
        return scores | {"perplexity": perplexity(scores["loss"])}


def _refuse_questions(recipe: Recipe) -> None:
    """Raises UserError for settings of tasks that ask something."""
    if recipe.data.think_step_by_step is not None:
        raise UserError(f"data.think_step_by_step: the task {recipe.data.task} asks nothing; set it to null")
    if recipe.train.exact_match_samples:
        raise UserError(
            f"train.exact_match_samples: the task {recipe.data.task} generates no answers; set it to 0"
        )


class Labels(Texts):
    """A classifier learns the label of a text or of a pair of texts."""

    loss = staticmethod(label_loss)

    def __init__(self, recipe: Recipe):
        super().__init__(recipe)
        self.labels = label_names(recipe.data)
        _refuse_questions(recipe)
        refuse_packing(recipe)

    def _rows(self, split: str) -> LabelledRows:
        return LabelledRows(self.recipe.data, split)

    def read(self, split: str, tokenizer) -> Encoded:
        return load_labelled(self.recipe.data, split, tokenizer, conventions_of(self.recipe))

    def batch(self, samples: Sequence, tokenizer, device: torch.device) -> Batch:
        batch = collate_labelled(samples, tokenizer.pad_token_id, device)
        if not samples and self._end is not None:
            batch["input_ids"][:, -1] = self._end
        return batch

    def head(self, model: nn.Module) -> set[str]:
        return head_parameters(model)

    def score_names(self) -> tuple[str, ...]:
        return ("loss", *get_task(self.recipe.data.task).metrics)

    def evaluate(self, engine: Engine, tokenizer, samples: Sequence) -> dict[str, float]:
        metrics = get_task(self.recipe.data.task).metrics
        return label_scores(
            engine, samples, lambda part: self.batch(part, tokenizer, engine.comm.device),
            self.recipe.train.micro_batch_size, metrics,
        )  # fmt: skip


class Scores(Labels):
    """A regression: a model with one output learns the score of a text or of a pair of texts."""

    loss = staticmethod(score_loss)

    def __init__(self, recipe: Recipe):
        super().__init__(recipe)
        if recipe.train.label_smoothing:
            raise UserError(
                f"train.label_smoothing is for targets to choose from, and the task {recipe.data.task} has "
                "scores; set it to 0"
            )


#: By the kind of task.
_OBJECTIVES: dict[type[Task], type[Objective]] = {
    ResponseTask: Responses,
    CompletionTask: Completions,
    LabelTask: Labels,
    ScoreTask: Scores,
    ImageTask: ImageLabels,
}


def objective_of(recipe: Recipe) -> Objective:
    """Raises UserError for an unknown task, and for settings that its kind does not have."""
    task = get_task(recipe.data.task)
    return next(objective for kind, objective in _OBJECTIVES.items() if isinstance(task, kind))(recipe)
