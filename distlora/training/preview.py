"""What a run would learn from: its first samples, as the model sees them."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import singledispatch
from itertools import groupby, islice
from typing import Any

from distlora.data import ImageSample, LabelledSample, Sample
from distlora.data.special_tokens import added_tokens
from distlora.models.hub import with_tokenizer
from distlora.models.targets import IGNORE
from distlora.recipe.sections import Recipe
from distlora.training.objective import objective_of
from distlora.training.samples import read_samples, read_sets


@dataclass(frozen=True)
class Part:
    """Tokens that belong together, as text. trained: the loss is taken on them. special: they are special
    tokens, not text that looks like them."""

    text: str
    trained: bool = False
    special: bool = False


@dataclass(frozen=True)
class Preview:
    """A sample. size: such as "57 tokens, 12 of them trained". label: of a classifier's sample, None where
    tokens are trained."""

    size: str
    parts: tuple[Part, ...] = ()
    label: str | None = None


def preview(recipe: Recipe, count: int) -> list[Preview]:
    """The first samples of the training set, which is read and checked whole, and so are the evaluation sets.

    Reads and fetches no weights. Raises UserError for everything that is wrong with the data.
    """
    path = with_tokenizer(recipe.model.path)
    recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"path": path})})
    objective = objective_of(recipe)
    preprocessor = objective.load_preprocessor()
    samples = read_samples(objective, recipe.data.split, preprocessor)
    objective.check_length()
    for each in read_sets(recipe, objective, preprocessor):
        each.objective.prepare(preprocessor)
    return [shown(sample, preprocessor, objective.labels) for sample in islice(samples, count)]


@singledispatch
def shown(sample: Any, preprocessor, labels: Sequence[str]) -> Preview:
    """One sample of `Objective.read`. labels: of the objective."""
    raise TypeError(f"no preview of a {type(sample).__name__}")


@shown.register
def _(sample: Sample, tokenizer, labels: Sequence[str]) -> Preview:
    trained = [label != IGNORE for label in sample.labels]
    size = f"{len(sample.input_ids)} tokens, {sum(trained)} of them trained"
    return Preview(size, tuple(_parts(sample.input_ids, trained, tokenizer)))


@shown.register
def _(sample: LabelledSample, tokenizer, labels: Sequence[str]) -> Preview:
    ids = sample.input_ids
    parts = _parts(ids, [False] * len(ids), tokenizer)
    return Preview(f"{len(ids)} tokens", tuple(parts), _label(sample.label, labels))


@shown.register
def _(sample: ImageSample, pixels, labels: Sequence[str]) -> Preview:
    image = sample.rows.image(sample.position)
    channels, height, width = pixels([image]).shape[1:]
    size = f"{image.width} × {image.height} pixels, {width} × {height} in {channels} channels for the model"
    return Preview(size, label=_label(sample.label, labels))


def _label(label: int | float, labels: Sequence[str]) -> str:
    return f"{label:g}, a score" if isinstance(label, float) else f"{labels[label]} (number {label})"


def _parts(ids: Sequence[int], trained: Sequence[bool], tokenizer) -> Iterator[Part]:
    """The texts of the parts are together the text of all tokens: a tokenizer may write the same token
    differently at the beginning of a text."""
    added = {number for number, token in added_tokens(tokenizer).items() if token.special}
    special = added | set(tokenizer.all_special_ids)
    kinds = [(learned, token in special) for token, learned in zip(ids, trained, strict=True)]
    whole, end, begin = _text(ids, tokenizer), 0, 0
    for (learned, is_special), group in groupby(kinds):
        end += len(list(group))
        so_far = whole if end == len(ids) else _text(ids[:end], tokenizer)
        until = len(os.path.commonprefix([whole, so_far]))
        if until > begin:
            yield Part(whole[begin:until], learned, is_special)
        begin = max(begin, until)


def _text(ids: Sequence[int], tokenizer) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
