"""A pass through a model without weights, in which everything has a value that depends on none of them:
token ids, positions, masks.

On the meta device tensors have shapes only, so that a model cannot look at its own token ids there, as some
do to find the end of a text. What such a pass looks up in a table shows how many positions the table has.
"""

import copy
import inspect
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import PreTrainedConfig, PreTrainedModel

aten = torch.ops.aten
log = logging.getLogger(__name__)
Answer = TypeVar("Answer")

#: Elements of the largest tensor whose values are kept; no row of positions has more.
LARGEST = 2**22


@dataclass(frozen=True)
class LookUp:
    """Of rows of a table without values. rows: how many it has. last: the largest number asked for."""

    rows: int
    last: int


class KnownValues(TorchDispatchMode):
    """Inside, a tensor on the meta device has values if it is made of numbers and of other tensors with
    values. `item()`, `if` and boolean indices work on them; all else is as on the meta device.

    looked_up: the tables without values in which rows were looked up by numbers with values, in order. cut:
    (rows of a tensor, rows that were taken of it) of every slice. lacking: whether a value was asked for that
    there is none of.
    """

    def __init__(self):
        super().__init__()
        self.looked_up: list[LookUp] = []
        self.cut: set[tuple[int, int]] = set()
        self.lacking = False
        self._values = WeakTensorKeyDictionary()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = _tensors((args, kwargs))
        if not _is_on_meta(kwargs) and not any(tensor.is_meta for tensor in tensors):
            return function(*args, **kwargs)
        is_random = torch.Tag.nondeterministic_seeded in function.tags
        if not is_random and all(self._is_known(tensor) for tensor in tensors):
            return self._noted(function, args, self._with_values(function, args, kwargs))
        self._note(function, args)
        self.lacking = self.lacking or _decided_by_values(function)
        result = self._noted(function, args, function(*self._without_masks(function, args), **kwargs))
        self.forget(_changed(function, args, kwargs))
        return result

    def forget(self, tensors: Iterable[Tensor]) -> None:
        """Takes their values away, and those of all tensors that share memory with them."""
        changed = {_memory(tensor) for tensor in tensors}
        for known in [tensor for tensor in self._values if _memory(tensor) in changed]:
            del self._values[known]

    def value(self, tensor: Tensor) -> Tensor | None:
        """The values of a tensor, on the CPU; None for one without."""
        return self._values.get(tensor) if tensor.is_meta else tensor

    def _is_known(self, tensor: Tensor) -> bool:
        return not tensor.is_meta or tensor in self._values

    def _value(self, leaf):
        """The values of a tensor; whatever is no tensor, as it is, and the CPU for the meta device."""
        if isinstance(leaf, Tensor):
            return self._values[leaf] if leaf.is_meta else leaf
        return torch.device("cpu") if isinstance(leaf, torch.device) and leaf.type == "meta" else leaf

    def _with_values(self, function, args, kwargs):
        shapes, leaves_meta = None, kwargs.get("device") is not None and not _is_on_meta(kwargs)
        if not leaves_meta and not _decided_by_values(function):
            shapes = function(*args, **kwargs)
            if any(output.numel() > LARGEST for output in _tensors(shapes)):
                self.forget(_changed(function, args, kwargs))
                return shapes
        values = function(*tree_map(self._value, args), **tree_map(self._value, kwargs))
        if leaves_meta:
            return values
        if shapes is None:
            shapes = tree_map(lambda leaf: leaf.to("meta") if isinstance(leaf, Tensor) else leaf, values)
        for shape, value in zip(_tensors(shapes), _tensors(values), strict=True):
            self._values[shape] = value
        return shapes

    def _note(self, function, args) -> None:
        """Keeps what is looked up in a table without values."""
        if function is aten.embedding.default:
            self._keep(args[0], 0, args[1])
        elif function in (aten.gather.default, aten.index_select.default):
            self._keep(*args[:3])
        elif function is aten.index.Tensor:
            for axis, numbers in enumerate(args[1]):
                if numbers is not None and numbers.dtype != torch.bool:
                    self._keep(args[0], axis, numbers)

    def _noted(self, function, args, result):
        """The result, of which a slice is kept."""
        if function is aten.slice.Tensor:
            axis = args[1] if len(args) > 1 else 0
            self.cut.add((args[0].shape[axis], result.shape[axis]))
        return result

    def _keep(self, table: Tensor, axis: int, numbers: Tensor) -> None:
        if not self._is_known(table) and self._is_known(numbers) and numbers.numel():
            self.looked_up.append(LookUp(table.shape[axis], int(self._value(numbers).max())))

    def _without_masks(self, function, args):
        """The same arguments, with numbers in the place of boolean indices that have values."""
        if function is not aten.index.Tensor:
            return args
        numbers = []
        for index in args[1]:
            if index is not None and index.dtype == torch.bool and self._is_known(index):
                numbers += [found.to("meta") for found in self._value(index).nonzero(as_tuple=True)]
            else:
                numbers.append(index)
        return (args[0], numbers, *args[2:])


def _tensors(tree) -> list[Tensor]:
    return [leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, Tensor)]


def _memory(tensor: Tensor) -> int:
    """A number that tensors have in common if they share memory."""
    return tensor.untyped_storage()._cdata


def _changed(function, args, kwargs) -> list[Tensor]:
    """The arguments that a function writes into."""
    named = {argument.name: value for argument, value in zip(function._schema.arguments, args)} | kwargs
    infos = {argument.name: argument.alias_info for argument in function._schema.arguments}
    return _tensors([value for name, value in named.items() if infos[name] and infos[name].is_write])


def _is_on_meta(kwargs) -> bool:
    return str(kwargs.get("device")) == "meta"


def _decided_by_values(function) -> bool:
    """Whether values decide the shape of what comes out, or come out as numbers."""
    return not {torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output}.isdisjoint(function.tags)


@contextmanager
def known_values() -> Iterator[KnownValues]:
    """Around passes of a model on the meta device; its inputs are made inside, or they have no values."""
    with torch.no_grad(), KnownValues() as mode:
        yield mode


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


def asked_once(question: Callable[[PreTrainedModel], Answer]) -> Callable[[PreTrainedModel], Answer]:
    """The same question, whose answer follows from a model's class and config, and is kept for equal ones."""
    answers: dict[tuple[type, str], Answer] = {}

    @wraps(question)
    def ask(model: PreTrainedModel) -> Answer:
        key = (type(model), model.config.to_json_string(use_diff=False))
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
