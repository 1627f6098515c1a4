"""The merged model: the pretrained files with the trained weights in their places, tensor by tensor."""

import math
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from distlora.adapter.attach import Attached
from distlora.engine.coordination import stream_to_main
from distlora.engine.protocol import Engine
from distlora.exports.companions import Decided, RunTokens, copy_companions
from distlora.exports.draft import new_directory
from distlora.exports.placing import Placing
from distlora.exports.sources import Collected, EngineSource, Source
from distlora.files.atomic import write_json
from distlora.files.tensors import TensorWriter
from distlora.progress import each

INDEX = "model.safetensors.index.json"


def export_merged_from_engine(
    engine: Engine,
    attached: Attached,
    out: str | os.PathLike,
    base: Path,
    step: int,
    dtype: torch.dtype | None = None,
    examine: Callable[[Path, "Merged"], None] = lambda draft, merged: None,
) -> Path:
    """The live model as merged weights in the new directory `out`. Collective, layer by layer.

    base: the directory of the pretrained safetensors files. examine: looks at what was written before it gets
    its name, on rank 0. Rank 0 holds the updates, and the parameters that were trained whole, in host memory.
    Errors: UserError on all ranks.
    """
    out, source = Path(out).absolute(), EngineSource(engine, attached, step)
    collected = Collected(source)

    def write(tensors: Iterable[tuple[str, str, Any]]) -> None:
        collected.take(tensors)
        with new_directory(out) as draft:
            examine(draft, write_merged(draft, base, collected, dtype))

    stream_to_main(engine.comm, out, collected.tensors(), write)
    return out


class Merged:
    """What was merged: base, the pretrained files; source; asked, the dtype of all weights, or None."""

    def __init__(self, base: Path, source: Source, placing: Placing, dtype: torch.dtype | None):
        self.base, self.source, self.asked, self._placing = base, source, dtype, placing

    def weight_of(self, layer: str) -> str:
        """The name of an adapted layer's weight."""
        return self._placing.weight_of(layer)

    @property
    def usual_dtype(self) -> str:
        """The name of the dtype of the first trained weight."""
        first = next(iter([*map(self.weight_of, self.source.layers), *self.source.heads]), None)
        dtype = self.asked or (self.dtype(first) if first else torch.float32)
        return str(dtype).removeprefix("torch.")

    def dtype(self, parameter: str) -> torch.dtype:
        """The one in which a trained parameter was written."""
        return self._placing.dtype(self._placing.stored(parameter)[0], self.asked)


def write_merged(
    draft: Path,
    base: Path,
    source: Source,
    dtype: torch.dtype | None,
    tokens: RunTokens | None = None,
) -> Merged:
    """Writes the pretrained files again, under the same names, with the trained weights in their places.

    draft: the directory to fill. base: the pretrained model's. dtype: of all floating-point weights; None:
    each keeps its own. tokens: of the run's tokenizer, for files that do not name them.
    Raises UserError if the files do not fit what was trained.
    """
    placing = Placing(base, source)
    shards = placing.files.files()
    shards[list(shards)[-1]].extend(placing.new)
    total_bytes = 0
    for shard, names in each(shards.items(), "writing the merged model", "files", len(shards)):
        plan = {name: (placing.dtype(name, dtype), placing.shape(name)) for name in names}
        with TensorWriter(draft / shard, plan, placing.files.metadata(shard)) as writer:
            for name in writer.order:
                writer.write(name, placing.value(name).to(plan[name][0]))
        total_bytes += sum(kind.itemsize * math.prod(shape) for kind, shape in plan.values())
    if placing.files.indexed:
        _write_index(draft, shards, total_bytes)
    copy_companions(draft, base, _decided(source, placing, dtype, tokens))
    return Merged(base, source, placing, dtype)


def _decided(
    source: Source, placing: Placing, dtype: torch.dtype | None, tokens: RunTokens | None
) -> Decided:
    config: dict[str, Any] = {}
    if placing.changed_heads and source.model["class"]:
        config |= {"architectures": [source.model["class"]], "num_labels": source.model["num_labels"]}
    labels = source.model.get("labels")
    if labels:
        config["id2label"] = {str(number): name for number, name in enumerate(labels)}
        config["label2id"] = {name: number for number, name in enumerate(labels)}
        config["problem_type"] = source.model.get("problem_type", "regression" if len(labels) == 1 else None)
    if source.model.get("pad_token_id") is not None:
        config["pad_token_id"] = source.model["pad_token_id"]
    named = dtype and str(dtype).removeprefix("torch.")
    return Decided(config, False if placing.untied else None, named, tokens)


def _write_index(draft: Path, shards: dict[str, list[str]], total_bytes: int) -> None:
    weight_map = {name: shard for shard, names in shards.items() for name in names}
    write_json(draft / INDEX, {"metadata": {"total_size": total_bytes}, "weight_map": weight_map})
