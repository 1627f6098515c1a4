"""The merged model: the pretrained files again, with the trained weights in their places, written tensor by
tensor.
"""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distlora.errors import UserError
from distlora.exports.sources import Source
from distlora.files.atomic import write_json
from distlora.files.tensors import TensorFiles, TensorWriter, stored_name
from distlora.maths.linalg import with_row_norms

INDEX = "model.safetensors.index.json"

#: What goes with a model beside its weights.
_COMPANIONS = (".json", ".jinja", ".txt", ".model", ".tiktoken")


def write_merged(draft: Path, base: Path, source: Source, dtype: torch.dtype | None) -> None:
    """The pretrained files again, under the same names, with the trained weights in their places."""
    files = TensorFiles(base, "model")
    new_heads = _check_names(base, files, source)
    updated = {stored_name(files, f"{layer}.weight"): layer for layer in source.layers}
    heads = {stored_name(files, name): name for name in source.heads}

    def value(name: str) -> Tensor:
        if name in heads:
            return source.read(heads[name])
        if name in updated:
            layer = updated[name]
            pair = source.low_rank(layer)
            weight = torch.addmm(files.read(name).float(), pair.left.float(), pair.right.float())
            return with_row_norms(weight, source.magnitude(layer)) if layer in source.magnitudes else weight
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


def _check_names(base: Path, files: TensorFiles, source: Source) -> list[str]:
    """The heads that the pretrained files lack. Raises UserError where they lack a target or hold it in
    another shape.
    """
    for layer, (_, *shape) in source.layers.items():
        name = stored_name(files, f"{layer}.weight")
        if name in files and files.shape(name) != tuple(shape):
            raise UserError(f"{base}: {name} has shape {files.shape(name)}, the adapter {tuple(shape)}")
    weights = [f"{layer}.weight" for layer in source.layers]
    weights += [name for name in source.heads if name.rpartition(".")[0] in source.targets]
    for name in weights:
        if stored_name(files, name) not in files:
            raise UserError(
                f"{base}: the weights files hold no {name}; a layer that shares its weight with another, or is stored "
                "under another name, cannot be merged: export with --format peft"
            )
    return [name for name in source.heads if stored_name(files, name) not in files]


def _config_changes(source: Source, new_heads: list[str], dtype: torch.dtype | None) -> dict[str, Any]:
    """new_heads: those that the files lacked, or held in another size."""
    changes: dict[str, Any] = {}
    if dtype is not None:
        changes["dtype"] = str(dtype).removeprefix("torch.")
    if new_heads and source.model["class"]:
        changes |= {"architectures": [source.model["class"]], "num_labels": source.model["num_labels"]}
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
