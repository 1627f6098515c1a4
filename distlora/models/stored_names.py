"""How a model's parameters lie in its files, where transformers renames or converts them while it loads.

It gives published weights of some types, ViT's among them, other names than those under which they were
published: `encoder.layer.0.attention.attention.query.weight` becomes `vit.layers.0.attention.q_proj.weight`.
Of a model with towers for several kinds of input it may load the language model alone. Some parameters are
made of several tensors, as all experts of a layer are of one tensor for each, or of a part of a tensor.
"""

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    apply_renamings,
    dot_natural_key,
    rename_source_key,
)
from transformers.pytorch_utils import Conv1D

from distlora.errors import UserError
from distlora.models.foreign import check_configs, readable

Shape = tuple[int, ...]


@dataclass
class Group:
    """Tensors of the files that become parameters of the model together; mostly one that becomes one.

    sources: (name in the files, its name before the conversion, the converter's pattern for it). targets: the
    names of the parameters. converter: None for a tensor that is a parameter as it is.
    """

    sources: list[tuple[str, str, str]] = field(default_factory=list)
    targets: list[str] = field(default_factory=list)
    converter: WeightConverter | None = None

    @property
    def stored(self) -> list[str]:
        return [name for name, _, _ in self.sources]


class StoredLayout:
    """Where the files of a model hold the parameters of a class.

    by_parameter: the groups by the names of their parameters. shapes: of the parameters that the files hold.
    tied: for each parameter that shares its tensor with others by the model's config, all the names of that
    tensor.
    """

    def __init__(self, model: PreTrainedModel | None, shapes: dict[str, Shape]):
        """model: without weights; None for a class that transformers does not have, whose parameters have
        the same names in the files. shapes: of the tensors in the files."""
        self._model = model
        own = {name: None for name in shapes} if model is None else model.state_dict()
        groups = _groups(model, own, sorted(shapes, key=dot_natural_key))
        self.by_parameter: dict[str, Group] = {}
        self.shapes: dict[str, Shape] = {}
        for group in groups:
            meta = {name: torch.empty(shapes[name], device="meta") for name in group.stored}
            found = self.parameters(group, meta.__getitem__)
            group.targets = list(found)
            self.by_parameter |= dict.fromkeys(found, group)
            self.shapes |= {name: tuple(tensor.shape) for name, tensor in found.items()}
        self.tied = {} if model is None else _tied_names(model)

    def key(self, name: str) -> str:
        """The name of a parameter in `by_parameter`. Files of a base model, of a class that is not known
        here, lack the prefix of a model with a head."""
        inner = name.partition(".")[2]
        is_inner = self._model is None and name not in self.by_parameter and inner in self.by_parameter
        return inner if is_inner else name

    def can_be_untied(self, name: str) -> bool:
        """Whether a config can say that a parameter of `tied` is one of its own: only that of the output
        embeddings, and only where nothing else is tied, such as blocks that a class uses twice."""
        output = None if self._model is None else self._model.get_output_embeddings()
        is_output = output is not None and self._model.get_submodule(name.rpartition(".")[0]) is output
        return is_output and self.tied.keys() == set(self.tied[name])

    def is_transposed(self, layer: str) -> bool:
        """Whether a layer's weight is (in, out), as in GPT-2, and of every expert in gpt-oss."""
        if self._model is None:
            return False
        if self.weight_of(layer) == layer:
            return bool(getattr(self._model.get_submodule(layer.rpartition(".")[0]), "is_transposed", False))
        return isinstance(self._model.get_submodule(layer), Conv1D)

    def weight_of(self, layer: str) -> str:
        """The name of an adapted layer's weight: a layer of experts is the parameter itself."""
        is_parameter = layer in self.shapes or (self._model is not None and layer in self._model.state_dict())
        return layer if is_parameter else f"{layer}.weight"

    def parameters(self, group: Group, read: Callable[[str], Tensor]) -> dict[str, Tensor]:
        """The parameters of a group by name. read: a tensor of the files."""
        if group.converter is None:
            return {group.targets[0]: read(group.stored[0])}
        converter = copy.deepcopy(group.converter)
        first = group.targets[0]
        for name, _, pattern in group.sources:
            converter.add_tensor(first, name, pattern, read(name))
        return _converted(converter, first, self._model)

    def tensors(self, group: Group, parameters: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of the files by name: the way back from `parameters`. Raises UserError where there is
        none."""
        if group.converter is None:
            return {group.stored[0]: parameters[group.targets[0]]}
        try:
            back = copy.deepcopy(group.converter).reverse_transform()
            found: dict[str, Tensor] = {}
            for name, value in parameters.items():
                renamed, pattern = back.rename_source_key(name)
                back.add_tensor(renamed, name, pattern, value)
            found = _converted(back, renamed, self._model)
        except (KeyError, TypeError, ValueError, RuntimeError, NotImplementedError) as error:
            raise _no_way_back(group) from error
        by_inner = {self._inner(inner): name for name, inner, _ in group.sources}
        named = {by_inner.get(self._inner(name)): value for name, value in found.items()}
        if named.keys() != set(group.stored):
            raise _no_way_back(group)
        return named

    def _inner(self, name: str) -> str:
        """A name without the prefix that a model with a head puts before those of its base model."""
        return name.removeprefix(f"{self._model.base_model_prefix}.")


def _no_way_back(group: Group) -> UserError:
    return UserError(
        f"{group.stored[0]} is stored in a form into which trained weights cannot be put back; "
        "export with --format peft"
    )


def _converted(converter: WeightConverter, first: str, model: PreTrainedModel) -> dict[str, Tensor]:
    values = converter.convert(first, model=model, config=model.config)
    return {name: value[0] if isinstance(value, list) else value for name, value in values.items()}


def _groups(model: PreTrainedModel | None, own: dict, stored: Sequence[str]) -> list[Group]:
    """In the way of transformers' `convert_and_load_state_dict_in_model`."""
    if model is None:
        return [Group([(name, name, name)], [name]) for name in stored]
    mapping, prefix = get_model_conversion_mapping(model), model.base_model_prefix
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    converter_of = {pattern: entry for entry in converters for pattern in entry.source_patterns}
    groups: dict[str, Group] = {}
    for name in stored:
        new, pattern = rename_source_key(name, renamings, converters, prefix, own)
        if new not in own and name in own:
            new, pattern = name, None
        if new not in own:
            continue
        if pattern is None:
            groups.setdefault(new, Group([(name, name, name)], [new]))
            continue
        group = groups.setdefault(new, Group([], [new], copy.deepcopy(converter_of[pattern])))
        group.sources.append((name, apply_renamings(name, renamings), pattern))
    return list(groups.values())


def _tied_names(model: PreTrainedModel) -> dict[str, list[str]]:
    families: dict[str, list[str]] = {}
    for target, source in model.all_tied_weights_keys.items():
        families.setdefault(source, [source]).append(target)
    return {name: family for family in families.values() for name in family}


def stored_layout(directory: Path, model_class: str | None, shapes: dict[str, Shape]) -> StoredLayout:
    """The layout of a model's files. Reads no weights.

    directory: of the config. model_class: the name of a class of transformers, or any other. shapes: of the
    tensors in the files, by name. Raises UserError for a config that is missing or of another class.
    """
    return StoredLayout(bare_of_class(directory, model_class), shapes)


def renamed(directory: Path, model_class: str | None, stored: Iterable[str]) -> dict[str, str]:
    """By the name of a parameter in the model, its name among `stored`, the names in the files; without those
    that are the same, and without weights that are more than renamed, such as several in one tensor.

    The rest is as in `stored_layout`; a class that transformers does not have has no new names.
    """
    model = bare_of_class(directory, model_class)
    if model is None:
        return {}
    groups = _groups(model, model.state_dict(), list(stored))
    plain = {group.targets[0]: group.stored[0] for group in groups if group.converter is None}
    return {new: name for new, name in plain.items() if new != name}


def bare_of_class(directory: Path, model_class: str | None) -> PreTrainedModel | None:
    """The model without weights; None where its class is not one of transformers."""
    cls = transformers_class(model_class)
    if cls is None:
        return None
    check_configs(str(directory), directory)
    with readable(str(directory), "config.json"):
        config = config_of_class(AutoConfig.from_pretrained(directory, trust_remote_code=False), cls)
        with torch.device("meta"):
            return cls(config)


def transformers_class(name: str | None) -> type[PreTrainedModel] | None:
    cls = getattr(transformers, name or "", None)
    return cls if isinstance(cls, type) and issubclass(cls, PreTrainedModel) else None


def config_of_class(config: PreTrainedConfig, cls: type[PreTrainedModel]) -> PreTrainedConfig:
    """The config that a class takes: of a language model within a larger model, its own."""
    part = config.sub_configs.get("text_config")
    is_part = part is not None and cls.config_class == part and not isinstance(config, part)
    return config.get_text_config() if is_part else config
