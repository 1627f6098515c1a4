"""What a checkpoint is made of, and under which names."""

from collections.abc import Callable, Iterator
from typing import Any, Protocol

from torch import Tensor

from distlora.adapter.attach import Attached
from distlora.engine.protocol import Engine

#: Groups of tensors, each in files of its own.
ADAPTER, LEDGER, RECOMPOSE, OPTIMIZER = "adapter", "ledger", "recompose", "optimizer"


class Stateful(Protocol):
    """What a run that recomposes has to remember beside factors and ledger. `tensors` and `restore` are
    collective.
    """

    @property
    def active(self) -> bool:
        """Whether anything may still be recomposed."""

    def state(self) -> dict[str, Any]:
        """JSON, the same on every rank."""

    def tensors(self) -> Iterator[tuple[str, Tensor | None]]:
        """By name, on rank 0's CPU only."""

    def problem_with(self, state: dict[str, Any], ledger: dict[str, list[dict[str, Any]]]) -> str | None:
        """What of a stored state does not fit; None if all does. ledger: the entries by layer.
        Not collective, like `wanted`."""

    def wanted(self, state: dict[str, Any]) -> dict[str, tuple[int, ...]]:
        """The shapes of the tensors that `restore` reads, by name. state: one that fits."""

    def restore(self, state: dict[str, Any], read: Callable[[str], Tensor] | None) -> None:
        """Takes both back. read: the tensor of a name, on rank 0; None elsewhere."""


def describe_model(engine: Engine) -> dict[str, Any]:
    """What an export has to say about a model: its class, the labels that its head tells apart, by which
    loss, the id of the padding token, the other names of trained parameters that are shared, and the adapted
    layers whose weight its files hold as (in, out).
    """
    config, name = getattr(engine.module, "config", None), type(engine.module).__name__
    about = {"class": name, "num_labels": getattr(config, "num_labels", None)}
    if name.endswith("Classification") and getattr(config, "id2label", None):
        about["labels"] = [config.id2label[number] for number in sorted(config.id2label)]
        about["problem_type"] = getattr(config, "problem_type", None)
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    if isinstance(getattr(text, "pad_token_id", None), int):
        about["pad_token_id"] = text.pad_token_id
    shared = _other_names(engine)
    if shared:
        about["tied"] = shared
    transposed = [layer.name for layer in engine.layers.values() if layer.fan_in_fan_out]
    return about | {"transposed": transposed} if transposed else about


def _other_names(engine: Engine) -> dict[str, list[str]]:
    """Of each trained parameter that several modules share."""
    names: dict[int, list[str]] = {}
    for name, parameter in engine.module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    families = {name: family for family in names.values() if len(family) > 1 for name in family}
    return {
        name: [other for other in families[name] if other != name]
        for name in engine.trained_shapes()
        if name in families
    }


def adapter_shapes(engine: Engine, attached: Attached) -> dict[str, tuple[int, ...]]:
    """Every factor of every layer, then the trained parameters that are none."""
    factors = {
        f"{name}.{factor}": tuple(shape)
        for name, layer in attached.layers.items()
        for factor, shape in layer.factor_shapes().items()
    }
    return factors | {name: shape for name, shape in engine.trained_shapes().items() if name not in factors}
