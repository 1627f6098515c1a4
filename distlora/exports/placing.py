"""Where each trained weight belongs in the files of the pretrained model, and what they hold afterwards."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distlora.errors import UserError
from distlora.exports.sources import Source
from distlora.files.tensors import TensorFiles
from distlora.maths.linalg import with_row_norms
from distlora.maths.low_rank import add_pair

Shape = tuple[int, ...]


class Placing:
    """The tensors of the merged files by name, each computed when it is asked for.

    files: the pretrained ones. new: names of tensors that these lack. changed_heads: the parameters, trained
    whole, that they lack or hold in another shape. untied: whether parameters that the config ties are
    different ones in the result. Raises UserError where the files do not fit what was trained.
    """

    def __init__(self, base: Path, source: Source):
        # Late: it brings transformers to users of `distlora.api`.
        from distlora.models.stored_names import stored_layout

        self.base, self.files, self._source = base, TensorFiles(base, "model"), source
        shapes = {name: self.files.shape(name) for name in self.files.names}
        self._layout = stored_layout(base, source.model["class"], shapes)
        self.new, self.changed_heads, self.untied = list[str](), list[str](), False
        #: What becomes of the parameters that are trained, or separated from one that is.
        self._layer_of: dict[str, str] = {}
        self._head_of: dict[str, str] = {}
        self._copy_of: dict[str, str] = {}
        #: Values of tensors that were made together with one that was asked for.
        self._ready: dict[str, Tensor] = {}
        for head in source.heads:
            self._place_head(head)
        for layer in source.layers:
            self._place_layer(layer)
        touched = (*self._layer_of, *self._head_of)
        groups = {name: group for name, group in self._layout.by_parameter.items() if name in touched}
        self._group_of = {stored: group for group in groups.values() for stored in group.stored}

    # ------------------------------------------------------------------ what is where

    def _place_head(self, head: str) -> None:
        """A parameter that was trained whole: everywhere in the files where it was one."""
        family = self._family(head)
        stored = [name for name in family if self._is_stored(name)]
        if not stored and head.rpartition(".")[0] in self._source.targets:
            raise self._lacking(head)
        if not stored:
            self.new.append(head)
            self._head_of[head] = head
        for name in stored:
            self._head_of[self._key(name)] = head
        if not stored or self._shape_in_files(stored[0]) != tuple(self._source.heads[head]):
            self.changed_heads.append(head)

    def _place_layer(self, layer: str) -> None:
        """A layer whose weight has an update: it is separated from others that share the weight."""
        name, shape = self.weight_of(layer), tuple(self._source.layers[layer][1:])
        family = self._family(name)
        stored = [other for other in family if self._is_stored(other)]
        if not stored:
            raise self._lacking(name)
        found = self._shape_in_files(name if name in stored else stored[0])
        turned = (*shape[:-2], shape[-1], shape[-2])
        if found != (turned if self._layout.is_transposed(layer) else shape):
            raise UserError(f"{self.base}: {name} has shape {found}, the adapter {shape}")
        self._layer_of[self._key(name)] = layer
        if len(family) > 1:
            others = [other for other in family if other != name]
            if not self._layout.can_be_untied(name):
                raise UserError(
                    f"{self.base}: layer {layer} shares its weight with {others[0].removesuffix('.weight')}, "
                    "which config.json cannot undo alone; export with --format peft"
                )
            self.untied = True
            separate = [name] if set(stored) & set(others) else [name, others[0]]
            for missing in separate:
                if missing not in stored:
                    self.new.append(missing)
                    self._copy_of[missing] = stored[0]

    def _family(self, name: str) -> list[str]:
        """The names of one tensor of the run: those that the config ties, unless the files hold different
        values under them."""
        family = self._layout.tied.get(name, [name])
        stored = [other for other in family if self._is_stored(other)]
        if len(stored) > 1:
            first, *others = (self._parameter(other) for other in stored)
            if not all(other.shape == first.shape and torch.equal(other, first) for other in others):
                self.untied = True
                return [name]
        return family

    def _key(self, name: str) -> str:
        return self._layout.key(name)

    def _is_stored(self, name: str) -> bool:
        return self._key(name) in self._layout.by_parameter

    def _shape_in_files(self, name: str) -> Shape:
        return self._layout.shapes[self._key(name)]

    def _lacking(self, name: str) -> UserError:
        return UserError(
            f"{self.base}: the weights files hold no {name}, or hold it in a form that is not known; export "
            "with --format peft"
        )

    # ------------------------------------------------------------------ the merged tensors

    def weight_of(self, layer: str) -> str:
        """The name of an adapted layer's weight."""
        return self._layout.weight_of(layer)

    def stored(self, parameter: str) -> list[str]:
        """The names of the tensors in the merged files that hold a parameter."""
        group = self._layout.by_parameter.get(self._key(parameter))
        if group is not None:
            return group.stored
        if parameter in self.new:
            return [parameter]
        return next(self.stored(name) for name in self._family(parameter) if self._is_stored(name))

    def shape(self, name: str) -> Shape:
        """Of a tensor in the merged files."""
        if name in self._copy_of:
            return self._shape_in_files(self._copy_of[name])
        group = self._group_of.get(name)
        if name in self.new or (group and group.converter is None and group.targets[0] in self._head_of):
            return tuple(self._source.heads[self._head_of[name if group is None else group.targets[0]]])
        return self.files.shape(name)

    def dtype(self, name: str, asked: torch.dtype | None) -> torch.dtype:
        """Of a tensor in the merged files, where `asked` is wanted; None for the one it has."""
        own = torch.float32
        if name in self.files:
            own = self.files.dtype(name)
        elif name in self._copy_of:
            own = self.files.dtype(self.stored(self._copy_of[name])[0])
        return asked if asked is not None and own.is_floating_point else own

    def value(self, name: str) -> Tensor:
        """A tensor of the merged files, in any dtype; trained weights are summed in float32."""
        if name in self._ready:
            return self._ready.pop(name)
        if name in self._copy_of:
            return self._trained(name, lambda: self._before_update(self._copy_of[name]))
        if name in self.new:
            return self._source.read(self._head_of[name])
        if name not in self._group_of:
            return self.files.read(name)
        group = self._group_of[name]
        if group.converter is None:
            return self._trained(group.targets[0], lambda: self.files.read(name))
        parameters = self._layout.parameters(group, lambda stored: self.files.read(stored).float())
        changed = {key: self._trained(key, lambda value=value: value) for key, value in parameters.items()}
        self._ready |= self._layout.tensors(group, changed)
        return self._ready.pop(name)

    def _parameter(self, name: str) -> Tensor:
        group = self._layout.by_parameter[self._key(name)]
        return self._layout.parameters(group, self.files.read)[self._key(name)]

    def _before_update(self, name: str) -> Tensor:
        """A parameter as it was trained whole, or pretrained."""
        key = self._key(name)
        return self._source.read(self._head_of[key]) if key in self._head_of else self._parameter(name)

    def _trained(self, name: str, pretrained: Any) -> Tensor:
        """The value of a parameter after training. pretrained: gives the one before."""
        value = self._source.read(self._head_of[name]) if name in self._head_of else pretrained()
        layer = self._layer_of.get(name)
        if layer is None:
            return value
        pair, turned = self._source.low_rank(layer), self._layout.is_transposed(layer)
        weight = add_pair(value.mT if turned else value, pair)
        if layer in self._source.magnitudes:
            weight = with_row_norms(weight, self._source.magnitude(layer))
        return weight.mT if turned else weight
