"""Values of tensors on the meta device, where these follow from numbers alone: token ids, positions, masks.

On the meta device tensors have shapes only, so that a model cannot look at its own token ids there, as some
do to find the end of a text, and cannot choose between two courses.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.weak import WeakTensorKeyDictionary

aten = torch.ops.aten

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

    truth: the answer to questions about values that there are none of: a single value is `truth` in its own
    type, and as many elements as there can be are not zero. None: such a question is an error of torch's.
    looked_up: the tables without values in which rows were looked up by numbers with values, in order. cut:
    (rows of a tensor, rows that were taken of it) of every slice. lacking: whether there was such a question.
    """

    def __init__(self, truth: bool | None = None):
        super().__init__()
        self._truth = truth
        self.looked_up: list[LookUp] = []
        self.cut: set[tuple[int, int]] = set()
        self.lacking = False
        self._values = WeakTensorKeyDictionary()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        tensors = _tensors((args, kwargs))
        if not _is_on_meta(kwargs) and not any(tensor.is_meta for tensor in tensors):
            return function(*args, **kwargs)
        is_random = torch.Tag.nondeterministic_seeded in function.tags
        if not is_random and all(self._is_known(tensor) for tensor in tensors):
            return self._noted(function, args, self._with_values(function, args, kwargs))
        self._note(function, args)
        args = self._without_masks(function, args)
        if _asks(function, args, kwargs):
            self.lacking = True
            if self._truth is not None:
                return _answer(self._truth, function, args, kwargs)
        if function is aten._grouped_mm.default:  # its own shapes are known for aligned bfloat16 alone
            return _grouped_product(*args[:2], args[2] if len(args) > 2 else kwargs.get("offs"))
        result = self._noted(function, args, function(*args, **kwargs))
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

    def _value(self, leaf: Any) -> Any:
        """The values of a tensor; whatever is no tensor, as it is, and the CPU for the meta device."""
        if isinstance(leaf, Tensor):
            return self._values[leaf] if leaf.is_meta else leaf
        return torch.device("cpu") if isinstance(leaf, torch.device) and leaf.type == "meta" else leaf

    def _with_values(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
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

    def _note(self, function: Any, args: tuple[Any, ...]) -> None:
        """Keeps what is looked up in a table without values."""
        if function is aten.embedding.default:
            self._keep(args[0], 0, args[1])
        elif function in (aten.gather.default, aten.index_select.default):
            self._keep(*args[:3])
        elif function is aten.index.Tensor:
            for axis, numbers in enumerate(args[1]):
                if numbers is not None and numbers.dtype != torch.bool:
                    self._keep(args[0], axis, numbers)

    def _noted(self, function: Any, args: tuple[Any, ...], result: Any) -> Any:
        """The result, of which a slice is kept."""
        if function is aten.slice.Tensor:
            axis = args[1] if len(args) > 1 else 0
            self.cut.add((args[0].shape[axis], result.shape[axis]))
        return result

    def _keep(self, table: Tensor, axis: int, numbers: Tensor) -> None:
        if not self._is_known(table) and self._is_known(numbers) and numbers.numel():
            self.looked_up.append(LookUp(table.shape[axis], int(self._value(numbers).max())))

    def _without_masks(self, function: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
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


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, Tensor)]


def _memory(tensor: Tensor) -> int:
    """A number that tensors have in common if they share memory."""
    return tensor.untyped_storage()._cdata


def _changed(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The arguments that a function writes into."""
    named = {argument.name: value for argument, value in zip(function._schema.arguments, args)} | kwargs
    infos = {argument.name: argument.alias_info for argument in function._schema.arguments}
    return _tensors([value for name, value in named.items() if infos[name] and infos[name].is_write])


def _is_on_meta(kwargs: dict[str, Any]) -> bool:
    return str(kwargs.get("device")) == "meta"


def _decided_by_values(function: Any) -> bool:
    """Whether values decide the shape of what comes out, or come out as numbers."""
    return not {torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output}.isdisjoint(function.tags)


@contextmanager
def known_values() -> Iterator[KnownValues]:
    """Around passes of a model on the meta device; its inputs are made inside, or they have no values."""
    with torch.no_grad(), KnownValues() as mode:
        yield mode


# ---------------------------------------------------------------------- questions without an answer


def _asks(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether values decide what comes out of a function of tensors that have none."""
    if function is aten.index.Tensor:
        return any(_is_mask(index) for index in args[1])
    if function is aten._to_copy.default:
        return args[0].is_meta and torch.device(kwargs.get("device") or "meta").type != "meta"
    return _decided_by_values(function)


def _answer(truth: bool, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What `KnownValues` says of its truth. What is not known here is left to torch, which refuses it."""
    first: Tensor = args[0]
    if function is aten._local_scalar_dense.default:
        return _single(first.dtype)(truth)
    if function is aten.equal.default:
        return truth
    if function is aten.nonzero.default:
        return _all_positions(first)
    if function is aten.masked_select.default:
        return first.reshape(-1)
    if function is aten.index.Tensor:
        return function(first, _positions(args[1]))
    if function is aten.unique_consecutive.default:
        return tuple(first.reshape(-1)[:1].to(kind) for kind in (first.dtype, torch.int64, torch.int64))
    if function is aten._to_copy.default:
        return torch.full(first.shape, truth, dtype=kwargs.get("dtype") or first.dtype)
    return function(*args, **kwargs)


def _single(dtype: torch.dtype) -> type:
    return bool if dtype == torch.bool else float if dtype.is_floating_point else int


def _all_positions(mask: Tensor) -> Tensor:
    """(elements, dimensions) as `nonzero` gives it where nothing is zero."""
    return torch.zeros(mask.numel(), mask.ndim, dtype=torch.int64, device=mask.device)


def _is_mask(index: Tensor | None) -> bool:
    return index is not None and index.dtype == torch.bool


def _positions(indices: list[Tensor | None]) -> list[Tensor | None]:
    """Indices with the positions of its elements in the place of every mask."""
    found: list[Tensor | None] = []
    for index in indices:
        found += list(_all_positions(index).unbind(1)) if _is_mask(index) else [index]
    return found


def _grouped_product(a: Tensor, b: Tensor, ends: Tensor | None) -> Tensor:
    """The shape of products of matrices, of which `ends` says where each group's rows or columns end."""
    groups = ()
    if a.ndim == b.ndim:
        groups = (a.shape[0],) if a.ndim == 3 else (len(ends),)
    return a.new_empty(*groups, a.shape[-2], b.shape[-1])
