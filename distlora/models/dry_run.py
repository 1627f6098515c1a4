"""A pass through a model without weights, in which everything has a value that depends on none of them:
token ids, positions, masks. What such a pass looks up in a table shows how many positions the table has.
"""

import copy
import inspect
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from distlora.maths.known_values import KnownValues, LookUp, known_values

log = logging.getLogger(__name__)
Answer = TypeVar("Answer")


def bare_copy(
    mode: KnownValues, model: PreTrainedModel, dtype: torch.dtype = torch.bfloat16
) -> PreTrainedModel:
    """A model of the same class and config on the meta device, in evaluation mode, whose parameters have no
    values. Made inside the mode: numbers that a model stores, such as those of its positions, have values.

    dtype: of the parameters; all kernels know bfloat16.
    """
    config = copy.deepcopy(model.config)
    config._attn_implementation = "eager"  # others have kernels that need data
    with torch.device("meta"):
        bare = type(model)(config).to(dtype).eval()
    mode.forget(bare.parameters())
    mode.forget(buffer for buffer in bare.buffers() if buffer.is_floating_point())
    return bare


def text_inputs(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a model takes of a batch of texts: token ids, mask, and the kinds of the tokens of a pair. Models
    that are not of text alone are told that all tokens are text, where they ask.
    """
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    if "mm_token_type_ids" in inspect.signature(model.forward).parameters:
        inputs["mm_token_type_ids"] = torch.zeros_like(batch["input_ids"])
    return inputs


def ordinary_text(config: PreTrainedConfig, tokens: int, ends: bool = True) -> dict[str, Tensor]:
    """Ids and mask, int64 (1, tokens), on the meta device: one ordinary token again and again, and an end of
    text, if that is wanted.
    """
    special = special_tokens(config)
    ordinary = next(number for number in range(1, 2**16) if number not in special)
    ids, end = torch.full((1, tokens), ordinary, device="meta"), end_of_text(config)
    if ends and end is not None:
        ids[0, -1] = end
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def special_tokens(config: PreTrainedConfig) -> set[int]:
    """The tokens that have a meaning of their own for a model, by its config."""
    return {value for key, value in _with_parts(config) if key.endswith(("_token_id", "_token_index"))}


def end_of_text(config: PreTrainedConfig) -> int | None:
    """The token with which a model's texts end, where it is a single one."""
    end = getattr(config.get_text_config(decoder=True), "eos_token_id", None)
    return end if isinstance(end, int) else None


def _with_parts(config: PreTrainedConfig) -> Iterator[tuple[str, object]]:
    """The integer settings of a config and of the configs that it is made of."""
    for key, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            yield from _with_parts(value)
        elif isinstance(value, int):
            yield key, value


def class_and_config(model: PreTrainedModel) -> tuple[type, str]:
    """What decides how a model without weights behaves, as a key."""
    return type(model), model.config.to_json_string(use_diff=False)


def asked_once(question: Callable[[PreTrainedModel], Answer]) -> Callable[[PreTrainedModel], Answer]:
    """The same question, whose answer follows from a model's class and config, and is kept for equal ones."""
    answers: dict[tuple[type, str], Answer] = {}

    @wraps(question)
    def ask(model: PreTrainedModel) -> Answer:
        key = class_and_config(model)
        if key not in answers:
            answers[key] = question(model)
        return answers[key]

    return ask


# ---------------------------------------------------------------------- positions

#: Two lengths of texts: what rises with them by as much is a position.
SHORT, LONG = 4, 7


@asked_once
def position_limit(model: PreTrainedModel) -> int | None:
    """The most tokens that a text may have for a model, by its tables of positions; None where it has none.

    A table counts if the numbers that are looked up in it rise with the length of the text, until there are
    more than it has rows. (Those of relative positions stop rising before that.) A tensor of which as many
    rows are taken as the text has tokens, such as the biases of MPT, counts if a text of as many tokens as it
    has rows can be run, and one more token is too many. Of the model only its class and its config are looked
    at. A model of something else than texts has no limit.
    """
    if model.main_input_name != "input_ids":
        return None
    with known_values() as mode:
        runs = _Runs(mode, model)
        short, long = runs.of(SHORT), runs.of(LONG)
        limits = {
            late.rows - (late.last - (LONG - 1))
            for early, late in zip(short.looked_up, long.looked_up)
            if late.rows == early.rows and late.last - early.last == LONG - SHORT
        }
        found = {limit for limit in limits if _fails(runs.of(limit + 1), long)}
        rows = {rows for rows, taken in long.cut if taken == LONG < rows and (rows, SHORT) in short.cut}
        found |= {limit for limit in rows if runs.of(limit).ended and runs.of(limit + 1).too_long}
        return min(found, default=None)


@dataclass(frozen=True)
class _Run:
    """looked_up, cut: of a text. ended: whether it could be run to its end without weights. lacking: whether
    a value was missing.
    """

    looked_up: list[LookUp]
    cut: set[tuple[int, int]]
    ended: bool
    lacking: bool

    @property
    def too_long(self) -> bool:
        """Whether sizes, and not missing values, are why it could not be run."""
        return not self.ended and not self.lacking


def _fails(run: _Run, shorter: _Run) -> bool:
    """Whether a text is too long, when a shorter one is not."""
    return (
        any(found.last >= found.rows for found in run.looked_up)
        or len(run.looked_up) < len(shorter.looked_up)
        or (shorter.ended and not run.ended)
    )


class _Runs:
    """Texts of any length, run through a model without weights: in the first dtype in which one can be run to
    its end. What a class cannot do without weights is no error.
    """

    def __init__(self, mode: KnownValues, model: PreTrainedModel):
        self._mode, self._model, self._bare = mode, model, None
        for dtype in (torch.bfloat16, torch.float32):  # most kernels; and those that lack bfloat16
            with self._unless_it_fails():
                self._bare = bare_copy(mode, model, dtype)
            if self.of(SHORT).ended:
                break

    def of(self, tokens: int, ends: bool = True) -> _Run:
        """ends: whether the text has an end token."""
        mode, ended = self._mode, False
        mode.looked_up, mode.cut, mode.lacking = [], set(), False
        if self._bare is not None:
            with self._unless_it_fails():
                self._bare(**text_inputs(self._bare, ordinary_text(self._bare.config, tokens, ends)))
                ended = True
        return _Run(mode.looked_up, mode.cut, ended, mode.lacking)  # positions are looked up first

    @contextmanager
    def _unless_it_fails(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # classes raise what they like where values are missing
            log.debug("%s without weights: %r", type(self._model).__name__, error)


# ---------------------------------------------------------------------- ends


@asked_once
def needs_end(model: PreTrainedModel) -> bool:
    """Whether a model fails for a text without an end token, as classifiers do that look for it."""
    with known_values() as mode:
        runs = _Runs(mode, model)
        return runs.of(SHORT).ended and not runs.of(SHORT, ends=False).ended
