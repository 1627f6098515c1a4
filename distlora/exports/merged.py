"""The merged model: the pretrained files with the trained weights in their places, tensor by tensor."""

import json
import math
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distlora.adapter.attach import Attached
from distlora.engine.coordination import stream_to_main
from distlora.engine.protocol import Engine
from distlora.errors import UserError
from distlora.exports.draft import new_directory
from distlora.exports.sources import Collected, EngineSource, Source
from distlora.files.atomic import write_json
from distlora.files.tensors import TensorFiles, TensorWriter, stored_name
from distlora.maths.linalg import with_row_norms

INDEX = "model.safetensors.index.json"

#: Endings of the files that belong to a model beside its weights.
_COMPANIONS = (".json", ".jinja", ".txt", ".model", ".tiktoken")


def export_merged_from_engine(
    engine: Engine,
    attached: Attached,
    out: str | os.PathLike,
    base: Path,
    step: int,
    dtype: torch.dtype | None = None,
) -> Path:
    """The live model as merged weights in the new directory `out`. Collective, layer by layer.

    base: the directory of the pretrained safetensors files. Rank 0 holds the updates, and the parameters that
    were trained whole, in host memory. Errors: UserError on all ranks.
    """
    out, source = Path(out).absolute(), EngineSource(engine, attached, step)
    collected = Collected(source)

    def write(tensors: Iterable[tuple[str, str, Any]]) -> None:
        collected.take(tensors)
        with new_directory(out) as draft:
            write_merged(draft, base, collected, dtype)

    stream_to_main(engine.comm, out, collected.tensors(), write)
    return out


def write_merged(draft: Path, base: Path, source: Source, dtype: torch.dtype | None) -> None:
    """Writes the pretrained files again, under the same names, with the trained weights in their places.

    draft: the directory to fill. base: the pretrained model's. dtype: of all floating-point weights; None:
    each keeps its own. Raises UserError if the files do not fit what was trained.
    """
    from distlora.models.stored_names import (
        renamed,
    )  # late: it brings transformers to users of `distlora.api`

    files = TensorFiles(base, "model")
    renaming = renamed(base, source.model["class"], files.names)
    new_heads = _check_names(base, files, source, renaming)
    updated = {stored_name(files, f"{layer}.weight", renaming): layer for layer in source.layers}
    heads = {stored_name(files, name, renaming): name for name in source.heads}
    transposed = set(source.model.get("transposed", ()))

    def value(name: str) -> Tensor:
        if name in heads:
            return source.read(heads[name])
        if name in updated:
            layer = updated[name]
            pair = source.low_rank(layer)
            stored = files.read(name).float()
            weight = torch.addmm(
                stored.T if layer in transposed else stored, pair.left.float(), pair.right.float()
            )
            if layer in source.magnitudes:
                weight = with_row_norms(weight, source.magnitude(layer))
            return weight.T if layer in transposed else weight
        return files.read(name)

    def dtype_of(name: str) -> torch.dtype:
        own = files.dtype(name) if name in files else torch.float32
        return dtype if dtype is not None and own.is_floating_point else own

    shards = files.files()
    shards[list(shards)[-1]].extend(new_heads)
    total_bytes = 0
    for shard, names in shards.items():
        shapes = {name: source.heads[heads[name]] if name in heads else files.shape(name) for name in names}
        plan = {name: (dtype_of(name), shape) for name, shape in shapes.items()}
        with TensorWriter(draft / shard, plan, files.metadata(shard)) as writer:
            for name in writer.order:
                writer.write(name, value(name).to(plan[name][0]))
        total_bytes += sum(kind.itemsize * math.prod(shape) for kind, shape in plan.values())
    _write_index(draft, base, shards, total_bytes)
    resized = [
        name for name, head in heads.items() if name in files and files.shape(name) != source.heads[head]
    ]
    _copy_companions(draft, base, _config_changes(source, new_heads + resized, dtype))


def _check_names(base: Path, files: TensorFiles, source: Source, renaming: dict[str, str]) -> list[str]:
    """The heads that the pretrained files lack. Raises UserError for a target that is not there, or has
    another shape. renaming: see `stored_name`.
    """
    transposed = set(source.model.get("transposed", ()))
    for layer, (_, *shape) in source.layers.items():
        shape = shape[::-1] if layer in transposed else shape
        name = stored_name(files, f"{layer}.weight", renaming)
        if name in files and files.shape(name) != tuple(shape):
            raise UserError(f"{base}: {name} has shape {files.shape(name)}, the adapter {tuple(shape)}")
    weights = [f"{layer}.weight" for layer in source.layers]
    weights += [name for name in source.heads if name.rpartition(".")[0] in source.targets]
    for name in weights:
        if stored_name(files, name, renaming) not in files:
            raise UserError(
                f"{base}: the weights files hold no {name}; a layer that shares its weight with another, "
                "or is stored under another name, cannot be merged: export with --format peft"
            )
    return [name for name in source.heads if stored_name(files, name, renaming) not in files]


def _config_changes(source: Source, new_heads: list[str], dtype: torch.dtype | None) -> dict[str, Any]:
    """What changes in config.json. new_heads: those that the files lack, or hold in another size."""
    changes: dict[str, Any] = {}
    if dtype is not None:
        changes["dtype"] = str(dtype).removeprefix("torch.")
    if new_heads and source.model["class"]:
        changes |= {"architectures": [source.model["class"]], "num_labels": source.model["num_labels"]}
    labels = source.model.get("labels")
    if labels:
        changes["id2label"] = {str(number): name for number, name in enumerate(labels)}
        changes["label2id"] = {name: number for number, name in enumerate(labels)}
    return changes


def _write_index(draft: Path, base: Path, shards: dict[str, list[str]], total_bytes: int) -> None:
    if (base / INDEX).exists():
        weight_map = {name: shard for shard, names in shards.items() for name in names}
        write_json(draft / INDEX, {"metadata": {"total_size": total_bytes}, "weight_map": weight_map})


def _copy_companions(draft: Path, base: Path, config_changes: dict[str, Any]) -> None:
    for path in base.iterdir():
        if path.is_file() and path.suffix in _COMPANIONS and not path.name.endswith(".index.json"):
            shutil.copyfile(path, draft / path.name)
    config = json.loads((draft / "config.json").read_bytes())
    if "dtype" in config_changes:
        config.pop("torch_dtype", None)  # the key's older name
    write_json(draft / "config.json", config | config_changes)
