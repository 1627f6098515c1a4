"""What a run asks of the kind of its task: data, model, loss and scores."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from distlora.adapter.trained_whole import trained_whole
from distlora.data import Encoded, is_at_hand
from distlora.engine.protocol import Engine
from distlora.errors import UserError
from distlora.models.dry_run import ordinary_text
from distlora.models.loading import (
    attention_of,
    bare_model,
    check_sizes,
    load_config,
    load_model,
    load_tokenizer,
)
from distlora.models.targets import Batch
from distlora.recipe.sections import Recipe


class Objective(ABC):
    """What the kinds share. labels: the names that a classifier tells apart; empty for a language model.
    unit: what their speed is counted in, "tokens" or "images".

    loss: (model, batch, weights of the rows) to (sum over the targets, their number), as evaluations take it;
    see `distlora.training.step`.
    """

    labels: tuple[str, ...] = ()
    unit: str = "tokens"
    loss: Callable[..., tuple[Tensor, int]]

    def __init__(self, recipe: Recipe):
        self.recipe = recipe

    @property
    def training_loss(self) -> Callable[..., tuple[Tensor, int]]:
        """What is trained: `loss`, smoothed if the recipe asks for it."""
        smoothing = self.recipe.train.label_smoothing
        return partial(self.loss, smoothing=smoothing) if smoothing else self.loss

    # ------------------------------------------------------------------ data

    def check_split(self, split: str) -> None:
        """Raises UserError for all that is wrong with the data section and a split that is at hand."""
        if is_at_hand(self.recipe.data):
            self._rows(split)

    @abstractmethod
    def _rows(self, split: str) -> Any:
        """The rows of a split, checked as they are read."""

    def load_preprocessor(self) -> Any:
        """What comes with the model and makes numbers of its inputs: here the tokenizer. The methods below
        are handed it.
        """
        return load_tokenizer(self.recipe.model)

    @abstractmethod
    def read(self, split: str, tokenizer) -> Encoded:
        """The samples of a split."""

    def check_samples(self, samples: Sequence, preprocessor) -> None:
        """Raises UserError for samples of `read` that the model cannot take."""
        return

    def told_of(self, encoded: Encoded) -> str:
        """How the samples of `read` were fitted to the maximal length, as a part of a line in the log."""
        if encoded.truncated is None:
            return ""
        return f"{encoded.truncated} truncated to {self.recipe.data.max_length} tokens, "

    @abstractmethod
    def batch(self, samples: Sequence, tokenizer, device: torch.device) -> Batch:
        """Samples of `read` as a batch for `loss`; none as one of weight zero."""

    def size(self, sample: Any) -> int:
        """How much of the unit a sample of `read` is."""
        return len(sample.input_ids)

    # ------------------------------------------------------------------ model

    def load_config(self):
        return load_config(self.recipe.model, self.labels)

    def bare_model(self) -> nn.Module:
        """The model without weights. Raises UserError if it cannot learn what the recipe's task asks for."""
        return bare_model(self.recipe.model, self.labels)

    def check_length(self) -> None:
        """Raises UserError if samples may be longer than the model can take. Reads no weights."""
        return

    def prepare(self, preprocessor) -> None:
        """Reads and checks what `generate` needs, before the model is loaded. Errors: UserError."""
        return

    def check_sizes(self) -> dict[str, list[str]]:
        """What `load_model` has to know of the weights' files. Raises UserError where this rank cannot read
        them.
        """
        return check_sizes(self.recipe.model, self.labels)

    def load_model(self, other_sizes: dict[str, list[str]]) -> tuple[nn.Module, set[str]]:
        """The model, and the names of the parameters that its weights lack."""
        return load_model(self.recipe.model, self.labels, other_sizes=other_sizes)

    def check_loaded(self, engine: Engine) -> None:
        """Raises UserError, on all ranks, for what only the model with its weights shows; collective."""
        return

    def attention(self) -> str:
        """The attention implementation that this machine would run."""
        return attention_of(self.recipe.model, self.labels)

    def meta_sample(self, model: nn.Module, tokens: int = 2) -> Batch:
        """One sample, without a label, for a model on the meta device. tokens: the length of a text. Made
        inside `distlora.maths.known_values.known_values`, its token ids have values.
        """
        ids = ordinary_text(model.config, tokens)["input_ids"]
        # A mask as attention uses it: transformers would make one from values, and meta tensors have none.
        mask = torch.zeros(1, 1, tokens, tokens, dtype=model.dtype, device="meta")
        return {"input_ids": ids, "attention_mask": mask}

    def head(self, model: nn.Module) -> set[str]:
        """Names of the parameters that are trained whole even if the weights hold them."""
        return set()

    def trained_whole(self, model: nn.Module) -> set[str]:
        """Names of those, and of the parameters of `method.modules_to_save`. Raises UserError."""
        return self.head(model) | trained_whole(model, self.recipe.method.modules_to_save)

    # ------------------------------------------------------------------ looking on

    def score_names(self) -> tuple[str, ...]:
        """What `evaluate` and `generate` answer."""
        return ("loss",)

    @abstractmethod
    def evaluate(self, engine: Engine, tokenizer, samples: Sequence) -> dict[str, float]:
        """The "loss" and whatever else one forward pass tells, on samples of `read`; collective."""

    def generate(self, engine: Engine, tokenizer, samples: Sequence) -> dict[str, float]:
        """What needs generated answers, where the recipe asks for it; collective."""
        return {}


def refuse_packing(recipe: Recipe) -> None:
    """Raises UserError for the tasks whose samples have one label each."""
    if recipe.data.packing:
        raise UserError(
            f"data.packing: of the task {recipe.data.task} every row has a label, and is one sample; set it "
            "to false"
        )
