"""From a checkpoint back into an engine, at any ZeRO stage and world size. See
`distlora.checkpoints.save`.
"""

import base64
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from distlora.adapter.attach import Attached
from distlora.checkpoints.contents import ADAPTER, LEDGER, OPTIMIZER, RECOMPOSE, Stateful, adapter_shapes
from distlora.checkpoints.directory import Checkpoint
from distlora.checkpoints.stored import STATE
from distlora.engine.comm import Comm
from distlora.engine.coordination import on_main
from distlora.engine.protocol import Engine
from distlora.engine.random_state import restore_random_states
from distlora.errors import UserError
from distlora.files.json_files import read_json
from distlora.files.tensors import TensorFiles
from distlora.methods import Method
from distlora.sentences import first_line

_log = logging.getLogger(__name__)


def restore(
    engine: Engine,
    attached: Attached,
    checkpoint: Checkpoint,
    recomposer: Stateful | None = None,
    random_states: bool = True,
) -> dict[str, Any]:
    """Writes a checkpoint into an engine that has started, and returns its state (step, identity, extra, …).
    Collective.

    Where there is a ledger, the engine must hold the pretrained weights, and `engine.ledger` be empty: the
    frozen weights are made first, entry by entry. (Where others write them too, they may hold the updates
    already.) recomposer: None leaves what belongs to it alone, as an evaluation does. Any stage and world
    size will do. random_states: at the same world size those of all ranks are restored as well. Errors:
    UserError on all ranks, naming the tensor, where checkpoint and model do not fit; nothing is written then.
    """
    comm, trained = engine.comm, engine.trained_shapes()
    shapes = adapter_shapes(engine, attached)
    files = on_main(
        comm,
        checkpoint.path,
        lambda: _open_fitting(checkpoint, engine, attached, shapes, recomposer),
    )
    states = _random_states(comm, checkpoint) if random_states else None

    def on_all(read: str) -> Callable[[str], Tensor | None]:
        """Reads on rank 0; an error there is everyone's."""
        return lambda name: on_main(comm, checkpoint.path, lambda: getattr(files, read)(name))

    if checkpoint.state.get("ledger"):
        layers, ledger = attached.layers, checkpoint.state["ledger"]
        updated = engine.ledger.already_updated(engine, layers, checkpoint.state.get("weights", {}))
        engine.ledger.replay(engine, layers, ledger, on_all("of_ledger"), updated)
    for name in shapes:
        if name not in trained:
            engine.write_parameter(
                name, on_main(comm, checkpoint.path, lambda name=name: files.adapter.read(name))
            )
    for name in trained:
        tensors = on_main(comm, checkpoint.path, lambda name=name: files.trained(name))
        engine.write_trained(name, tensors, checkpoint.state["optimizer_steps"])
    if recomposer is not None and checkpoint.state.get("recompose") is not None:
        recomposer.restore(checkpoint.state["recompose"], on_all("of_recomposer"))
    if states is not None:
        restore_random_states(states, comm.device)
    return checkpoint.state


def ledger_files(checkpoint: Checkpoint, layers: dict[str, tuple[int, ...]]) -> TensorFiles | None:
    """The ledger's files; None without entries. layers: (out, in) of every adapted layer, (E, out, in)
    of a stack.

    Raises UserError, naming the tensor, where the files do not hold what `state.json` says of them.
    """
    described, path = checkpoint.state.get("ledger") or {}, checkpoint.path
    wanted, dtypes = {}, {}
    for layer, entries in described.items():
        if layer not in layers:
            raise UserError(
                f"{path}: the run has no layer {layer}; the ledger was written with another model or targets"
            )
        *stack, out_features, in_features = layers[layer]
        for index, entry in enumerate(entries):
            left, right = (*stack, out_features, entry["columns"]), (*stack, entry["columns"], in_features)
            sides = {"left": left, "right": right}
            wanted |= {f"{layer}/{index}/{side}": shape for side, shape in sides.items()}
            dtypes |= dict.fromkeys(
                (f"{layer}/{index}/{side}" for side in sides), getattr(torch, entry["dtype"])
            )
    if not wanted:
        return None
    files = TensorFiles(path, LEDGER, checkpoint.files)
    _compare(path, files, wanted)
    for name, dtype in dtypes.items():
        if files.dtype(name) != dtype:
            where = f"{path}: tensor {name} is of {files.dtype(name)}"
            raise UserError(f"{where}, and {STATE} says {dtype}; take another checkpoint")
    return files


@dataclass(frozen=True)
class _Files:
    """Of one checkpoint. keys: "master" and the optimizer's moments. ledger, recompose: None where there is
    nothing of it.
    """

    path: Path
    adapter: TensorFiles
    optimizer: TensorFiles
    keys: list[str]
    ledger: TensorFiles | None
    recompose: TensorFiles | None

    def trained(self, name: str) -> dict[str, Tensor]:
        return {key: self.optimizer.read(f"{name}/{key}") for key in self.keys}

    def of_ledger(self, name: str) -> Tensor:
        return self.ledger.read(name)

    def of_recomposer(self, name: str) -> Tensor:
        if self.recompose is None or name not in self.recompose:
            raise UserError(f"{self.path}: tensor {name} is missing; take another checkpoint")
        return self.recompose.read(name)


def _open_fitting(
    checkpoint: Checkpoint,
    engine: Engine,
    attached: Attached,
    shapes: dict[str, Any],
    recomposer: Stateful | None,
) -> _Files:
    """The checkpoint's files, once all names and shapes are right."""
    path, state, trained = checkpoint.path, checkpoint.state, engine.trained_shapes()
    if state["method"] != attached.method.name:
        raise UserError(f"{path} is of method {state['method']}, and the run of {attached.method.name}")
    _refuse_other_settings(path, state.get("settings"), attached.method)
    if state.get("ledger") and engine.ledger is None:
        raise UserError(
            f"{path} holds updates of frozen weights, and the run of {attached.method.name} keeps no ledger"
        )
    if recomposer is not None and recomposer.active and state.get("recompose") is None:
        raise UserError(f"{path} does not say how far recomposition was; it was written without it")
    adapter, optimizer = (TensorFiles(path, group, checkpoint.files) for group in (ADAPTER, OPTIMIZER))
    keys = sorted({"master"} | {name.rpartition("/")[2] for name in optimizer.names})
    lacking = set(engine.optimizer.moments()) - set(keys)
    if lacking and lacking != set(engine.optimizer.moments()):
        raise UserError(f"{path}: the optimizer's {min(lacking)} is missing; take another checkpoint")
    unknown = state.get("weights", {}).keys() - attached.layers.keys()
    if unknown:
        raise UserError(f"{path}: the run has no layer {min(unknown)}; take another checkpoint")
    _compare(path, adapter, shapes)
    _compare(path, optimizer, {f"{name}/{key}": shape for name, shape in trained.items() for key in keys})
    ledger_file = ledger_files(
        checkpoint, {name: layer.whole_shape for name, layer in attached.layers.items()}
    )
    recompose = _recompose_files(checkpoint, recomposer)
    return _Files(path, adapter, optimizer, keys, ledger_file, recompose)


def _recompose_files(checkpoint: Checkpoint, recomposer: Stateful | None) -> TensorFiles | None:
    """Those of what recomposition needs; None without any. Raises UserError where they are not what the run
    needs."""
    state, path = checkpoint.state.get("recompose"), checkpoint.path
    there = any(name.startswith(RECOMPOSE) for name in checkpoint.files)
    files = TensorFiles(path, RECOMPOSE, checkpoint.files) if there else None
    if recomposer is None or state is None or not recomposer.active:
        return files
    problem = recomposer.problem_with(state, checkpoint.state.get("ledger") or {})
    if problem:
        raise UserError(f"{path}: {STATE} says of recomposition what does not fit the run ({problem})")
    wanted = recomposer.wanted(state)
    if wanted and files is None:
        raise UserError(f"{path}: tensor {next(iter(wanted))} is missing; take another checkpoint")
    if files is not None:
        _compare(path, files, wanted)
    return files


def _refuse_other_settings(path: Path, there: dict[str, Any] | None, method: Method) -> None:
    """there: None in checkpoints of before this was written down. A key that a method got later has its
    default there, which stands for what was done without it.
    """
    if there is None:
        return
    try:
        there = type(method).model_validate(there).model_dump(mode="json")
    except ValidationError as error:
        raise UserError(
            f"{path}: its settings of the method {method.name} are not those of this version "
            f"({first_line(error.errors()[0]['msg'])})"
        ) from None
    for key, value in method.model_dump(mode="json").items():
        if there[key] != value:
            raise UserError(
                f"{path} is of a run with {key}={json.dumps(there[key])} of the method, "
                f"and this one has {json.dumps(value)}"
            )


def _compare(path: Path, files: TensorFiles, wanted: dict[str, tuple[int, ...]]) -> None:
    for name, shape in wanted.items():
        if name not in files:
            raise UserError(
                f"{path}: tensor {name} is missing; it was written with another model, method or targets"
            )
        if files.shape(name) != tuple(shape):
            raise UserError(
                f"{path}: tensor {name} has shape {files.shape(name)}, and the run's is {tuple(shape)}"
            )
        if not files.dtype(name).is_floating_point:
            raise UserError(f"{path}: tensor {name} is of {files.dtype(name)}; take another checkpoint")
    for name in files.names:
        if name not in wanted:
            raise UserError(
                f"{path}: the run has no tensor {name}; it was written with another model, method or targets"
            )


def _random_states(comm: Comm, checkpoint: Checkpoint) -> dict[str, Tensor] | None:
    """This rank's; None where they were written by another number of ranks. Collective."""
    path, device = checkpoint.path, comm.device
    states = comm.share(on_main(comm, path, lambda: _usable_random_states(checkpoint, device)))
    if len(states["cpu"]) != comm.world_size:
        _log.info("%s was written by %d ranks: dropout draws anew", checkpoint.path, len(states["cpu"]))
        return None
    return {kind: _decoded(of_ranks[comm.rank]) for kind, of_ranks in states.items()}


def _usable_random_states(checkpoint: Checkpoint, device: torch.device) -> dict[str, list[str]]:
    """As they are in `state.json`, those of devices that are not here left out. Raises UserError."""
    states = read_json(checkpoint.path / STATE)["rng"]
    here = ("cpu", "cuda") if device.type == "cuda" else ("cpu",)
    for kind in here:
        for rank, text in enumerate(states.get(kind, ())):
            try:
                torch.Generator(kind).set_state(_decoded(text))
            except (RuntimeError, TypeError):
                raise UserError(
                    f"{checkpoint.path}: {STATE} has no state of random numbers for rank {rank}; take "
                    "another checkpoint"
                ) from None
    return {kind: states[kind] for kind in here if kind in states}


def _decoded(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text) or b"\0"), dtype=torch.uint8)
