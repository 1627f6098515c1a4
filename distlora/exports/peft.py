"""An ordinary LoRA in PEFT's format, written tensor by tensor."""

import json
import logging
import math
import os
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from distlora.adapter.attach import Attached
from distlora.adapter.targets import in_short
from distlora.engine.coordination import stream_to_main
from distlora.engine.protocol import Engine
from distlora.errors import UserError
from distlora.exports.card import CARD, About, Form, write_card
from distlora.exports.draft import new_directory
from distlora.exports.experts import peft_module, to_peft
from distlora.exports.precision import dtype_for
from distlora.exports.sources import MAGNITUDE, PREFIX, Compressed, EngineSource, Source
from distlora.exports.suffixes import Names, names_in, shortest_endings
from distlora.exports.vllm import problem_with_vllm
from distlora.files.atomic import write_json
from distlora.files.tensors import TensorWriter
from distlora.methods import HasMagnitude, Method, TrainsWeight

if TYPE_CHECKING:
    from distlora.models.base_names import BaseName

ADAPTER_WEIGHTS, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
ADAPTER_FILES = (ADAPTER_WEIGHTS, ADAPTER_CONFIG, CARD)

_TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
}

#: Names by which PEFT finds a classifier's head.
_CLASSIFIERS = ("classifier", "score")

#: Classes in which PEFT adapts no `out_proj`: their fast kernels read its weight without calling it.
_STATE_SPACE = ("Mamba", "FalconMamba", "FalconH1", "NemotronH")

_log = logging.getLogger(__name__)


def export_peft_from_engine(
    engine: Engine,
    attached: Attached,
    out: str | os.PathLike,
    base_model: str,
    step: int,
    dtype: torch.dtype | None = None,
    about: About | None = None,
) -> Path:
    """Writes the live adapter as PEFT's files into `out`, which may hold an earlier export. Collective.

    Tensors are gathered layer by layer. The pairs are exact, except those that `Compressed` must approximate;
    their error is logged. base_model: the name or path by which others find the pretrained model. dtype: None
    for the model's, where that is enough; see `distlora.exports.precision`. about: what the model card says
    of the run. Raises UserError on all ranks.
    """
    refuse_peft(attached.method, stacks_of(attached))
    out, live = Path(out), EngineSource(engine, attached, step)
    if dtype is None:
        dtype = dtype_for(live, engine.dtype, lambda worst: engine.comm.share(worst))
    source = Compressed(live, dtype)

    def write(tensors: Iterable[tuple[str, Tensor]]) -> None:
        base = _base_name(base_model)
        config = _peft_config(source, base, attached.method.dropout, names_in(engine.module))
        with new_directory(out, may_hold=ADAPTER_FILES) as draft:
            write_peft(draft, source, tensors, config, dtype)
            _write_card(draft, source, base, about or About(attached.method.name), dtype)
        if source.compression():
            _log.info("%s: %s", out, source.compression())

    stream_to_main(engine.comm, out, _peft_tensors(source), write)
    return out


def problem_with_peft(method: Method, experts: Collection[str]) -> str | None:
    """Why PEFT's format cannot hold what a method trains, and what to do instead, as a sentence; None if it
    can. experts: the adapted layers that are stacks of them.
    """
    if isinstance(method, TrainsWeight):
        return f"method {method.name} trains the weights themselves, which is no adapter; export it merged"
    if experts and isinstance(method, HasMagnitude):
        return (
            f"PEFT's format holds no norms of rows of experts, which method {method.name} trains in "
            f"{in_short(experts)}; export it with --format merged"
        )
    return None


def refuse_peft(method: Method, experts: Collection[str]) -> None:
    """Raises UserError where there is such a problem."""
    problem = problem_with_peft(method, experts)
    if problem:
        raise UserError(problem)


def stacks_of(attached: Attached) -> list[str]:
    """The adapted layers that are stacks of experts."""
    return [name for name, layer in attached.layers.items() if layer.stack]


def write_peft_adapter(
    draft: Path,
    source: Source,
    base_model: str,
    dropout: float,
    dtype: torch.dtype,
    names: Names | None = None,
    about: About | None = None,
) -> None:
    """Writes the adapter of a source that reads files. draft: the directory to fill. names: in the model;
    without them every layer is called by its whole name. about: what the model card says of the run.
    """
    base = _base_name(base_model)
    config = _peft_config(source, base, dropout, names)
    write_peft(draft, source, _peft_tensors(source), config, dtype)
    _write_card(draft, source, base, about or About(), dtype)


def _base_name(base_model: str) -> "BaseName":
    # Late, because it brings the hub's library to users of `distlora.api`.
    from distlora.models.base_names import base_name_of

    return base_name_of(base_model)


def _write_card(draft: Path, source: Source, base: "BaseName", about: About, dtype: torch.dtype) -> None:
    rank, name = max(shape[0] for shape in source.layers.values()), str(dtype).removeprefix("torch.")
    write_card(
        draft, base, about, Form("adapter", source.model["class"], rank, problem_with_vllm(source), name)
    )


def _peft_tensors(source: Source) -> Iterator[tuple[str, Tensor | None]]:
    """All tensors of the adapter by PEFT's names; None for each on the ranks that do not write."""
    for layer in source.layers:
        if layer in source.magnitudes:
            yield f"{PREFIX}{layer}{MAGNITUDE}", source.magnitude(layer)
    for layer in source.layers:
        pair, module = source.low_rank(layer), _module(source, layer)
        if pair is not None and pair.left.dim() == 3:
            pair = to_peft(pair)
        yield f"{PREFIX}{module}.lora_A.weight", pair and pair.right
        yield f"{PREFIX}{module}.lora_B.weight", pair and pair.left
    for name in source.heads:
        value = source.read(name)
        for each in (name, *_shared_with(source, name)):
            yield PREFIX + each, value


def write_peft(
    draft: Path, source: Source, tensors: Iterable, config: dict[str, Any], dtype: torch.dtype
) -> None:
    """Writes PEFT's two files. tensors: those of `_peft_tensors`, in their order."""
    # The norms are in float32 whatever the dtype, because rounding them would scale whole rows. The widest
    # numbers come first in a file.
    plan = {
        f"{PREFIX}{layer}{MAGNITUDE}": (torch.float32, (shape[1],))
        for layer, shape in source.layers.items()
        if layer in source.magnitudes
    }
    for layer, (rank, *stack, out_features, in_features) in source.layers.items():
        module, columns = _module(source, layer), rank * math.prod(stack)
        plan[f"{PREFIX}{module}.lora_A.weight"] = dtype, (columns, in_features)
        plan[f"{PREFIX}{module}.lora_B.weight"] = dtype, (out_features, columns)
    for name, shape in source.heads.items():
        plan |= {PREFIX + each: (dtype, shape) for each in (name, *_shared_with(source, name))}
    found = {"step": source.step, "model": source.model, "stacked": sorted(source.stacked)}
    experts = experts_of(source)
    about = {"distlora": json.dumps(found | ({"experts": experts} if experts else {}))}
    with TensorWriter(draft / ADAPTER_WEIGHTS, plan, about) as writer:
        for name, tensor in tensors:
            writer.write(name, tensor.to(plan[name][0]))
    write_json(draft / ADAPTER_CONFIG, config)


def experts_of(source: Source) -> dict[str, int]:
    """The number of experts of each layer that is a stack of them."""
    return {layer: shape[1] for layer, shape in source.layers.items() if len(shape) == 4}


def _module(source: Source, layer: str) -> str:
    """The name under which PEFT's files hold a layer's pair."""
    experts = experts_of(source)
    return peft_module(layer, experts) if layer in experts else layer


def _peft_config(source: Source, base: "BaseName", dropout: float, names: Names | None) -> dict[str, Any]:
    """The content of adapter_config.json.

    B holds the scaling, so alpha is the rank. names: in the model, see `distlora.exports.suffixes`.
    """
    ranks = {layer: shape[0] for layer, shape in source.layers.items()}
    usual = max(set(ranks.values()), key=list(ranks.values()).count)
    # PEFT reads the keys of these patterns as regular expressions.
    model_class, experts = source.model["class"] or "", experts_of(source)
    as_weights = _named_as_weights(source)
    unusual = {
        layer.replace(".", r"\.") + r"(\.weight)?" * (layer in as_weights): rank
        for layer, rank in ranks.items()
        if rank != usual
    }
    parameters = [*experts, *(f"{layer}.weight" for layer in as_weights)]
    modules = [layer for layer in ranks if layer not in {*experts, *as_weights}]
    if names is not None:
        parameters = shortest_endings(parameters, names.parameters, parts=2)
        modules = shortest_endings(modules, names.modules)
    if parameters and dropout:
        _log.info(
            "PEFT has no dropout for %s: lora_dropout is 0 in the exported config",
            "experts" if experts else f"{as_weights[0]} of {model_class}",
        )
    if model_class.startswith(_STATE_SPACE) and any(layer.endswith(".out_proj") for layer in source.layers):
        _log.info(
            "PEFT loads no adapter of layers out_proj of %s: leave them out of targets, or export it merged",
            model_class,
        )
    return {
        "peft_type": "LORA",
        "task_type": next((task for ending, task in _TASKS.items() if model_class.endswith(ending)), None),
        "base_model_name_or_path": base.name,
        "revision": base.revision,
        "r": usual,
        "lora_alpha": usual,
        "rank_pattern": unusual,
        "alpha_pattern": unusual,
        "use_rslora": False,
        "use_dora": bool(source.magnitudes),
        "lora_dropout": 0.0 if parameters else dropout,
        "target_modules": modules,
        **({"target_parameters": parameters} if parameters else {}),
        "modules_to_save": _saved_modules(source) or None,
        "bias": "none",
        # Of a model with layers of both kinds PEFT tells each layer's by its class.
        "fan_in_fan_out": set(source.layers) <= set(source.model.get("transposed", ())),
        "init_lora_weights": True,
        "inference_mode": True,
    }


def _named_as_weights(source: Source) -> list[str]:
    """The layers that PEFT finds only as parameters, see `parts_of_experts`."""
    # Late: it brings transformers to users of `distlora.api`.
    from distlora.models.peft_targets import parts_of_experts

    parts = parts_of_experts(source.model["class"])
    found = [
        layer for layer, shape in source.layers.items() if len(shape) == 3 and layer.split(".")[-1] in parts
    ]
    if found and source.magnitudes:
        _log.info(
            "PEFT loads no DoRA of layers such as %s of %s: leave them out of targets, or export it merged",
            found[0],
            source.model["class"],
        )
        return []
    return found


def _shared_with(source: Source, head: str) -> list[str]:
    """The other names of a parameter that several modules share: PEFT gives each of these a copy, and all of
    them must hold what was trained."""
    return source.model.get("tied", {}).get(head, [])


def _saved_modules(source: Source) -> list[str]:
    """The modules that PEFT is to restore. Raises UserError for one that has a pair besides."""
    names = [each for head in source.heads for each in (head, *_shared_with(source, head))]
    for name in names:
        if name.removesuffix(".weight") in source.layers:
            raise UserError(
                f"{name} is the same as a parameter that was trained whole, and has an adapter, too, which "
                "PEFT's format cannot hold; export it merged"
            )
    return sorted({_saved_module(name) for name in names})


def _saved_module(head: str) -> str:
    """The module that PEFT is to restore: that of the parameter, or the classifier around it.

    PEFT restores a classifier in any case.
    """
    parts = head.split(".")[:-1]
    ends = [position for position, part in enumerate(parts, 1) if part in _CLASSIFIERS]
    return ".".join(parts[: ends[0]] if ends else parts)
