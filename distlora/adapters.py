"""What an export is made from: trained layers as low-rank pairs, and whole trained parameters, wherever they are kept."""

import json
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from distlora.attach import Attached
from distlora.checkpoint import Checkpoint, describe_model
from distlora.engine import Engine
from distlora.errors import UserError
from distlora.methods import LowRank, Method
from distlora.tensorfile import TensorFiles

#: Before every name in PEFT's files.
PREFIX = "base_model.model."

Shape = tuple[int, ...]


class Source(Protocol):
    """layers: (rank, out, in) of the exported pair of every adapted layer. heads: shapes of the parameters that were trained
    whole. targets: names of the layers that the method was put on. model: the model's "class" and "num_labels"."""

    step: int
    layers: dict[str, Shape]
    heads: dict[str, Shape]
    targets: list[str]
    model: dict[str, Any]

    def low_rank(self, layer: str) -> LowRank | None:
        """`W_trained = W0 + left @ right`, float32. None on ranks that do not write."""

    def read(self, head: str) -> Tensor | None:
        """A parameter that was trained whole. None on ranks that do not write."""


class EngineSource:
    """The live model. Reading is collective."""

    def __init__(self, engine: Engine, attached: Attached, step: int):
        self._engine, self._attached, self.step = engine, attached, step
        shapes = {name: layer.method.shapes(*layer.shape) for name, layer in attached.layers.items()}
        self.layers = {name: _pair_shape(layer.method, shapes[name]) for name, layer in attached.layers.items()}
        factors = {f"{layer}.{factor}" for layer, names in shapes.items() for factor in names}
        self.heads = {name: shape for name, shape in engine.trained_shapes().items() if name not in factors}
        self.targets, self.model = attached.targets, describe_model(engine)

    def low_rank(self, layer: str) -> LowRank | None:
        adapted = self._attached.layers[layer]
        factors = {name: self._engine.read_parameter(f"{layer}.{name}") for name in adapted.method.shapes(*adapted.shape)}
        return adapted.method.export_low_rank(factors) if self._engine.comm.is_main else None

    def read(self, head: str) -> Tensor | None:
        return self._engine.read_parameter(head)


class CheckpointSource:
    """A checkpoint. Raises UserError if it is not of this method."""

    def __init__(self, checkpoint: Checkpoint, method: Method):
        state = checkpoint.state
        if (state["method"], state["rank"]) != (method.name, method.rank):
            raise UserError(
                f"{checkpoint.path} is of {state['method']} with rank {state['rank']}, "
                f"but the run's recipe.yaml of {method.name} with rank {method.rank}"
            )
        self.step, self.targets, self.model = checkpoint.step, state["targets"], state["model"]
        self._files, self._method = TensorFiles(checkpoint.path, "adapter"), method
        self._factors = list(method.shapes(1, 1))
        self.layers = {} if method.trains_weight else {layer: self._pair_shape(layer) for layer in self.targets}
        factors = {f"{layer}.{factor}" for layer in self.layers for factor in self._factors}
        self.heads = {name: self._files.shape(name) for name in self._files.names if name not in factors}

    def _pair_shape(self, layer: str) -> Shape:
        return _pair_shape(self._method, {name: self._files.shape(f"{layer}.{name}") for name in self._factors})

    def low_rank(self, layer: str) -> LowRank:
        return self._method.export_low_rank({name: self._files.read(f"{layer}.{name}") for name in self._factors})

    def read(self, head: str) -> Tensor:
        return self._files.read(head)


class AdapterSource:
    """The PEFT files that an earlier export wrote (alpha is the rank there, so the pair is B and A as they are)."""

    def __init__(self, directory: Path):
        self._files = TensorFiles(directory, "adapter_model")
        about = json.loads(self._files.metadata("adapter_model.safetensors")["distlora"])
        self.step, self.model = about["step"], about["model"]
        self.layers, self.heads = {}, {}
        for name in self._files.names:
            layer, ending = name.removeprefix(PREFIX), ".lora_A.weight"
            if layer.endswith(ending):
                layer = layer.removesuffix(ending)
                rank, in_features = self._files.shape(name)
                self.layers[layer] = (rank, self._files.shape(f"{PREFIX}{layer}.lora_B.weight")[0], in_features)
            elif not layer.endswith(".lora_B.weight"):
                self.heads[layer] = self._files.shape(name)
        self.targets = list(self.layers)

    def low_rank(self, layer: str) -> LowRank:
        a, b = (self._files.read(f"{PREFIX}{layer}.lora_{side}.weight").float() for side in "AB")
        return LowRank(b, a)

    def read(self, head: str) -> Tensor:
        return self._files.read(PREFIX + head)


def _pair_shape(method: Method, shapes: dict[str, Shape]) -> Shape:
    """(rank, out, in) of what the method exports, found without computing it."""
    pair = method.export_low_rank({name: torch.empty(shape, device="meta") for name, shape in shapes.items()})
    return pair.right.shape[0], pair.left.shape[0], pair.right.shape[1]
