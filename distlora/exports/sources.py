"""What an export is made from: trained layers as low-rank pairs, and parameters that were trained whole.

The sources are the live model, a checkpoint, and an earlier export.
"""

import logging
from collections.abc import Iterable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from distlora.adapter.attach import Attached
from distlora.checkpoints.contents import ADAPTER, OPTIMIZER, describe_model
from distlora.checkpoints.directory import Checkpoint
from distlora.checkpoints.restore import ledger_files
from distlora.engine.protocol import Engine
from distlora.errors import UserError
from distlora.exports.experts import compress_stack, rank_within
from distlora.files.tensors import TensorFiles
from distlora.maths.low_rank import LowRank, compress, compress_within
from distlora.methods import Method, TrainsWeight, magnitude_of

#: What every name in PEFT's files begins with.
PREFIX = "base_model.model."
#: What follows a layer's name there, for the norms of the layer's rows. PEFT itself leaves `.weight` out and
#: reads both; transformers' `load_adapter` finds only what is called as the parameter is.
MAGNITUDE = ".lora_magnitude_vector.weight"
#: The same without that ending.
MAGNITUDE_STEM = MAGNITUDE.removesuffix(".weight")

_log = logging.getLogger(__name__)

Shape = tuple[int, ...]


class Source(Protocol):
    """What an export asks for.

    step: of the run, when this was its state. layers: (rank, out, in) of the exported pair of every adapted
    layer, (rank, E, out, in) of a stack of experts. stacked: the layers whose pair is made of updates side by
    side, which nearly cancel each other. magnitudes: the layers whose rows have trained norms. heads: shapes
    of the parameters that were trained whole. targets: names of the layers that the method was put on. model:
    the model's "class", "num_labels" and, of a classifier, the names of its "labels".
    """

    step: int
    layers: dict[str, Shape]
    stacked: set[str]
    magnitudes: set[str]
    heads: dict[str, Shape]
    targets: list[str]
    model: dict[str, Any]

    def low_rank(self, layer: str) -> LowRank | None:
        """The pair with `W_trained = W0 + left @ right`, in float32. None on ranks that do not write."""

    def magnitude(self, layer: str) -> Tensor | None:
        """(out,) float32, for a layer of `magnitudes`: the norms to which the rows of that sum are scaled.
        None on ranks that do not write.

        They are the optimizer's own values. A run in bfloat16 multiplies with rounded ones and divides by a
        rounded norm. The two errors cancel at the start, but one of them alone would scale whole rows by up
        to 2⁻⁹ in software that does not round norms.
        """

    def read(self, head: str) -> Tensor | None:
        """A parameter that was trained whole. None on ranks that do not write."""


class EngineSource:
    """The live model. Reading is collective."""

    def __init__(self, engine: Engine, attached: Attached, step: int):
        self._engine, self._attached, self.step = engine, attached, step
        shapes = {name: layer.factor_shapes() for name, layer in attached.layers.items()}
        entries = {name: engine.ledger.columns(name) if engine.ledger else 0 for name in attached.layers}
        self.layers = {
            name: _pair_shape(layer.method, shapes[name], entries[name])
            for name, layer in attached.layers.items()
        }
        self.stacked = {name for name, columns in entries.items() if columns}
        self.magnitudes = {name for name, layer in attached.layers.items() if magnitude_of(layer.method)}
        factors = {f"{layer}.{factor}" for layer, names in shapes.items() for factor in names}
        self.heads = {name: shape for name, shape in engine.trained_shapes().items() if name not in factors}
        self.targets, self.model = attached.targets, describe_model(engine)

    def low_rank(self, layer: str) -> LowRank | None:
        adapted = self._attached.layers[layer]
        factors = {
            name: self._engine.read_parameter(f"{layer}.{name}")
            for name in adapted.method.shapes(*adapted.shape)
        }
        pair = adapted.method.export_low_rank(factors) if self._engine.comm.is_main else None
        return self._engine.ledger.stacked(layer, pair) if layer in self.stacked else pair

    def magnitude(self, layer: str) -> Tensor | None:
        tensors = self._engine.read_trained(f"{layer}.{magnitude_of(self._attached.method)}")
        return tensors and tensors["master"]

    def read(self, head: str) -> Tensor | None:
        return self._engine.read_parameter(head)


class Collected:
    """A live source in rank 0's host memory, to be read there in any order."""

    def __init__(self, source: Source):
        self._source, self._found = source, dict[tuple[str, str], Any]()
        self.step, self.layers, self.stacked = source.step, source.layers, source.stacked
        self.magnitudes, self.heads = source.magnitudes, source.heads
        self.targets, self.model = source.targets, source.model

    def tensors(self) -> Iterator[tuple[str, str, Any]]:
        """(what, name, value) of all there is, the values on rank 0 only. Collective."""
        for layer in self.layers:
            yield "pair", layer, self._source.low_rank(layer)
        for layer in self.layers:  # not `magnitudes`: a set may have another order on each rank
            if layer in self.magnitudes:
                yield "magnitude", layer, self._source.magnitude(layer)
        for head in self.heads:
            yield "head", head, self._source.read(head)

    def take(self, tensors: Iterable[tuple[str, str, Any]]) -> None:
        """What `tensors` gave, on rank 0."""
        self._found = {(what, name): value for what, name, value in tensors}

    def low_rank(self, layer: str) -> LowRank:
        return self._found["pair", layer]

    def magnitude(self, layer: str) -> Tensor:
        return self._found["magnitude", layer]

    def read(self, head: str) -> Tensor:
        return self._found["head", head]


class CheckpointSource:
    """A checkpoint. Raises UserError if it is of another method or rank."""

    def __init__(self, checkpoint: Checkpoint, method: Method):
        state = checkpoint.state
        if (state["method"], state["rank"]) != (method.name, method.rank):
            raise UserError(
                f"{checkpoint.path} is of {state['method']} with rank {state['rank']}, "
                f"but the run's recipe.yaml of {method.name} with rank {method.rank}"
            )
        self.step, self.targets, self.model = checkpoint.step, state["targets"], state["model"]
        self._files, self._method = TensorFiles(checkpoint.path, ADAPTER, checkpoint.files), method
        self._factors = list(method.shapes(1, 1))
        self._entries = {
            layer: [entry["columns"] for entry in entries]
            for layer, entries in state.get("ledger", {}).items()
        }
        adapted = [] if isinstance(method, TrainsWeight) else self.targets
        self.layers = {layer: self._pair_shape(layer) for layer in adapted}
        self.stacked = {layer for layer, entries in self._entries.items() if entries}
        self.magnitudes = set(self.layers) if magnitude_of(method) else set()
        optimizer = TensorFiles(checkpoint.path, OPTIMIZER, checkpoint.files) if self.magnitudes else None
        self._masters = optimizer
        self._ledger = ledger_files(checkpoint, {layer: shape for layer, (_, *shape) in self.layers.items()})
        factors = {f"{layer}.{factor}" for layer in self.layers for factor in self._factors}
        self.heads = {name: self._files.shape(name) for name in self._files.names if name not in factors}

    def _pair_shape(self, layer: str) -> Shape:
        shapes = {name: self._files.shape(f"{layer}.{name}") for name in self._factors}
        try:
            found = _pair_shape(self._method, shapes, sum(self._entries.get(layer, ())))
            _, *stack, out, inner = found
            factors = {name: (*stack, *shape) for name, shape in self._method.shapes(out, inner).items()}
        except (RuntimeError, ValueError, IndexError):
            factors = None
        if factors != shapes:
            raise UserError(
                f"{self._files.directory}: the factors of layer {layer} do not fit together; take another "
                "checkpoint"
            )
        return found

    def low_rank(self, layer: str) -> LowRank:
        pair = self._method.export_low_rank(
            {name: self._files.read(f"{layer}.{name}") for name in self._factors}
        )
        if layer not in self.stacked:
            return pair
        entries = [f"{layer}/{index}" for index in range(len(self._entries[layer]))]
        return LowRank(
            torch.cat([pair.left, *(self._ledger.read(f"{entry}/left").float() for entry in entries)], -1),
            torch.cat([pair.right, *(self._ledger.read(f"{entry}/right").float() for entry in entries)], -2),
        )

    def magnitude(self, layer: str) -> Tensor:
        return self._masters.read(f"{layer}.{magnitude_of(self._method)}/master")

    def read(self, head: str) -> Tensor:
        return self._files.read(head)


def check_compression(format: str, rank: int | None, max_error: float | None) -> None:
    """Raises UserError for options of an export that make no sense.

    format: "peft" or "merged". rank: of --compress-rank. max_error: of --max-error.
    """
    if rank is not None and max_error is not None:
        raise UserError("--compress-rank and --max-error were both given; give one of them")
    if format == "merged" and (rank, max_error) != (None, None):
        option = "--max-error" if rank is None else "--compress-rank"
        raise UserError(f"{option} is for --format peft: merged weights hold the whole update; leave it out")
    if rank is not None and rank < 1:
        raise UserError(f"--compress-rank is {rank}; wanted at least 1")
    if max_error is not None and not 0 < max_error < 1:
        raise UserError(
            f"--max-error is {max_error:g}; wanted a relative error between 0 and 1, such as 0.01"
        )


class Compressed:
    """Another source, with an SVD in the place of each pair for which one is asked for or needed.

    It is needed for a pair that is wider than the matrix, and for a stacked pair that will be rounded:
    updates that nearly cancel must be summed first.

    dtype: the one in which the pairs will be written. rank: the most columns of a pair. max_error: the
    largest relative Frobenius error of a layer's update. With it, every pair is read once when this is made,
    because the ranks must be known before the first pair is written. errors: the relative errors of the pairs
    that were asked for so far; `compression` states them.
    """

    def __init__(
        self, source: Source, dtype: torch.dtype, rank: int | None = None, max_error: float | None = None
    ):
        self._source, self._dtype = source, dtype
        self.step, self.model = source.step, source.model
        self.heads, self.targets = source.heads, source.targets
        self.magnitudes, self.magnitude, self.read = source.magnitudes, source.magnitude, source.read
        self.errors: dict[str, float] = {}
        exact = max(min(rank, *shape[-2:]) for rank, *shape in source.layers.values())
        if rank is not None and rank > exact:
            _log.info("--compress-rank %d: the exact rank is %d, and nothing is left out", rank, exact)
        self.layers = {layer: self._shape(layer, rank, max_error) for layer in source.layers}
        rounds = dtype.itemsize < torch.float32.itemsize
        self._changed = {
            layer
            for layer, shape in self.layers.items()
            if shape != source.layers[layer]
            or (rounds and (max_error is not None or layer in source.stacked))
        }
        self.stacked = source.stacked - self._changed

    def _shape(self, layer: str, rank: int | None, max_error: float | None) -> Shape:
        """(rank, out, in) of the pair that is exported."""
        exact, *shape = self._source.layers[layer]
        if max_error is None:
            return min(exact, *shape[-2:], rank or exact), *shape
        pair = self._source.low_rank(layer)
        if pair.left.dim() == 3:
            found, error = rank_within(pair, max_error, self._dtype)
        else:
            compressed, error = compress_within(pair, max_error, self._dtype)
            found = compressed.right.shape[0]
        if error > max_error:
            raise UserError(
                f"--max-error {max_error:g} cannot be met: writing the update of layer {layer} in "
                f"{str(self._dtype).removeprefix('torch.')} costs {error:.2g} by itself; "
                "allow more, or take a wider dtype"
            )
        return found, *shape

    def low_rank(self, layer: str) -> LowRank | None:
        pair = self._source.low_rank(layer)
        if layer not in self._changed or pair is None:
            return pair
        cut = compress if pair.left.dim() == 2 else compress_stack
        pair, self.errors[layer] = cut(pair, self.layers[layer][0], self._dtype)
        return pair

    def compression(self) -> str | None:
        """One sentence on the pairs that were asked for so far; None if none of them was changed."""
        if not self.errors:
            return None
        ranks = {self.layers[layer][0] for layer in self.errors}
        span = f"rank {max(ranks)}" if len(ranks) == 1 else f"ranks {min(ranks)} to {max(ranks)}"
        worst = max(self.errors, key=self.errors.get)
        return (
            f"compressed {len(self.errors)} of {len(self.layers)} layers to {span}: "
            f"relative error of a layer's update at most {self.errors[worst]:.2e} ({worst}), "
            f"{sum(self.errors.values()) / len(self.errors):.2e} on average"
        )


def _pair_shape(method: Method, shapes: dict[str, Shape], ledger_columns: int) -> Shape:
    """(rank, out, in) of the exact pair, found without computing it.

    shapes: of the layer's factors. ledger_columns: of the updates that were added to the layer's weight.
    """
    pair = method.export_low_rank({name: torch.empty(shape, device="meta") for name, shape in shapes.items()})
    return pair.right.shape[-2] + ledger_columns, *pair.left.shape[:-1], pair.right.shape[-1]
