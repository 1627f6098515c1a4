"""Checkpoints that survive a crash at any moment and do not know the number of ranks or the ZeRO stage.

    RUN/checkpoint-<step>/   adapter.safetensors     every factor as the forward pass uses it, and other trained parameters
                             ledger.safetensors      what was added to frozen weights, by which they are made again from the
                                                     pretrained ones; absent without any. A frozen weight
                                                     itself is never here
                             recompose.safetensors   what the next recompositions need, absent without such
                             optimizer.safetensors   <tensor>/master and <tensor>/<moment> of every trained
                             tensor, float32
                             state.json              step, method, what the caller adds, random-number states of all ranks
                             manifest.json           written last: the size and SHA-256 of every other file

Groups of tensors above 2 GiB are split over files with an index. Rank 0 writes and reads; it holds one
tensor at a time beside the file that is being filled.
"""

import base64
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from distlora.adapter.attach import Attached
from distlora.checkpoints.directory import (
    FORMAT,
    MANIFEST,
    STATE,
    Checkpoint,
    newest,
    of_step,
    prune,
    put_in_place,
)
from distlora.engine.comm import Comm
from distlora.engine.coordination import on_main, stream_to_main
from distlora.engine.ledger import Ledger
from distlora.engine.protocol import Engine
from distlora.engine.random_state import random_states, restore_random_states
from distlora.errors import UserError
from distlora.files.atomic import flush_directory, sha256_of, write_json
from distlora.files.tensors import TensorFiles, write_split

__all__ = ["Checkpoint", "Stateful", "describe_model", "ledger_files", "newest", "of_step", "restore", "save"]

SPLIT_BYTES = 2 << 30
ADAPTER, LEDGER, RECOMPOSE, OPTIMIZER = "adapter", "ledger", "recompose", "optimizer"

_log = logging.getLogger(__name__)


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

    def restore(self, state: dict[str, Any], read: Callable[[str], Tensor] | None) -> None:
        """Takes both back. read: the tensor of a name, on rank 0; None elsewhere."""


# ---------------------------------------------------------------------- saving


def save(
    engine: Engine,
    attached: Attached,
    run_dir: str | os.PathLike,
    step: int,
    identity: dict,
    extra: dict | None = None,
    keep: int = 2,
    split_bytes: int = SPLIT_BYTES,
    recomposer: Stateful | None = None,
) -> Path:
    """Writes `run_dir/checkpoint-<step>` and returns it; then removes all but the newest `keep` of the steps
    up to this one.

    Collective. A crash at any moment leaves the earlier checkpoints, or this one, whole. identity: what a run
    must have in common with this one to resume it; extra: anything else of the caller's; both JSON. One of
    the same step is replaced. Errors: UserError on all ranks where the disk refuses; nothing is left behind
    then.
    """
    final = Path(run_dir) / f"checkpoint-{step}"
    state = {
        "format": FORMAT,
        "step": step,
        "method": attached.method.name,
        "rank": attached.method.rank,
        "targets": attached.targets,
        "model": describe_model(engine),
        "optimizer_steps": engine.steps_taken(),
        "identity": identity,
        "extra": extra or {},
        "ledger": {} if engine.ledger is None else engine.ledger.describe(),
        "recompose": None if recomposer is None else recomposer.state(),
        "rng": _gather_random_states(engine.comm),
    }
    tensors = _tensors(engine, attached, recomposer)
    stream_to_main(engine.comm, final, tensors, lambda tensors: _write(final, tensors, state, split_bytes))
    on_main(engine.comm, final, lambda: prune(final, keep))
    return final


def describe_model(engine: Engine) -> dict[str, Any]:
    """The model's class, and how many labels its head tells apart: what an export has to say about a new
    head.
    """
    config = getattr(engine.module, "config", None)
    return {"class": type(engine.module).__name__, "num_labels": getattr(config, "num_labels", None)}


def _tensors(
    engine: Engine, attached: Attached, recomposer: Stateful | None
) -> Iterator[tuple[str, str, Tensor | None]]:
    """(group, name, tensor) of everything to be saved, the tensors on rank 0 only. Collective."""
    for name in _adapter_shapes(engine, attached):
        yield ADAPTER, name, engine.read_parameter(name)
    for group, owner in ((LEDGER, engine.ledger), (RECOMPOSE, recomposer)):
        for name, tensor in () if owner is None else owner.tensors():
            yield group, name, tensor
    for name in engine.trained_shapes():
        for key, tensor in (engine.read_trained(name) or {}).items():
            yield OPTIMIZER, f"{name}/{key}", tensor


def _adapter_shapes(engine: Engine, attached: Attached) -> dict[str, tuple[int, ...]]:
    """Every factor of every layer, then the trained parameters that are none."""
    factors = {
        f"{name}.{factor}": tuple(shape)
        for name, layer in attached.layers.items()
        for factor, shape in layer.method.shapes(*layer.shape).items()
    }
    return factors | {name: shape for name, shape in engine.trained_shapes().items() if name not in factors}


def _write(final: Path, tensors: Iterable[tuple[str, str, Tensor]], state: dict, split_bytes: int) -> None:
    final.parent.mkdir(parents=True, exist_ok=True)
    for leftover in final.parent.glob(".checkpoint-*.partial"):
        shutil.rmtree(leftover, ignore_errors=True)
    partial = final.with_name(f".{final.name}.partial")
    partial.mkdir()
    try:
        digests = {}
        for group, members in groupby(tensors, key=lambda item: item[0]):
            digests |= write_split(
                partial, group, ((name, tensor) for _, name, tensor in members), split_bytes
            )
        digests[STATE] = write_json(partial / STATE, state)
        write_json(
            partial / MANIFEST,
            {"format": FORMAT, "step": state["step"], "files": _verified(partial, digests)},
        )
        flush_directory(partial)
        put_in_place(partial, final)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _verified(directory: Path, digests: dict[str, str]) -> dict[str, dict]:
    """Reads every file again; its size and checksum for the manifest."""
    for name, digest in digests.items():
        if sha256_of(directory / name) != digest:
            raise UserError(f"{directory / name}: what was written reads back differently; check the disk")
    return {
        name: {"bytes": (directory / name).stat().st_size, "sha256": digest}
        for name, digest in digests.items()
    }


# ---------------------------------------------------------------------- restoring


def restore(
    engine: Engine, attached: Attached, checkpoint: Checkpoint, recomposer: Stateful | None = None
) -> dict[str, Any]:
    """Writes a checkpoint into an engine that has started, and returns its state (step, identity, extra, …).
    Collective.

    Where there is a ledger, the engine must hold the pretrained weights, and `engine.ledger` be empty: the
    frozen weights are made first, entry by entry. recomposer: None leaves what belongs to it alone, as an
    evaluation does. Any stage and world size will do. At the same world size the random-number states of all
    ranks are restored as well. Errors: UserError on all ranks, naming the tensor, where checkpoint and model
    do not fit; nothing is written then.
    """
    comm, trained = engine.comm, engine.trained_shapes()
    shapes = _adapter_shapes(engine, attached)
    files = on_main(
        comm,
        checkpoint.path,
        lambda: _open_fitting(checkpoint, attached, engine.ledger, shapes, trained, recomposer),
    )

    def on_all(read: str) -> Callable[[str], Tensor | None]:
        """Reads on rank 0; an error there is everyone's."""
        return lambda name: on_main(comm, checkpoint.path, lambda: getattr(files, read)(name))

    if checkpoint.state.get("ledger"):
        engine.ledger.replay(engine, attached.layers, checkpoint.state["ledger"], on_all("of_ledger"))
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
    _restore_random_states(comm, checkpoint)
    return checkpoint.state


def ledger_files(checkpoint: Checkpoint, layers: dict[str, tuple[int, int]]) -> TensorFiles | None:
    """The ledger's files; None without entries. layers: (out, in) of every adapted layer.

    Raises UserError, naming the tensor, where the files do not hold what `state.json` says of them.
    """
    described, path = checkpoint.state.get("ledger") or {}, checkpoint.path
    wanted, dtypes = {}, {}
    for layer, entries in described.items():
        if layer not in layers:
            raise UserError(
                f"{path}: the run has no layer {layer}; the ledger was written with another model or targets"
            )
        out_features, in_features = layers[layer]
        for index, entry in enumerate(entries):
            sides = {"left": (out_features, entry["columns"]), "right": (entry["columns"], in_features)}
            wanted |= {f"{layer}/{index}/{side}": shape for side, shape in sides.items()}
            dtypes |= dict.fromkeys(
                (f"{layer}/{index}/{side}" for side in sides), getattr(torch, entry["dtype"])
            )
    if not wanted:
        return None
    files = TensorFiles(path, LEDGER)
    _compare(path, files, wanted)
    for name, dtype in dtypes.items():
        if files.dtype(name) != dtype:
            raise UserError(
                f"{path}: tensor {name} is of {files.dtype(name)}, and {STATE} says {dtype}; take another checkpoint"
            )
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
    attached: Attached,
    ledger: Ledger | None,
    shapes: dict,
    trained: dict,
    recomposer: Stateful | None,
) -> _Files:
    """The checkpoint's files, once all names and shapes are right."""
    path, state = checkpoint.path, checkpoint.state
    if state["method"] != attached.method.name:
        raise UserError(f"{path} is of method {state['method']}, and the run of {attached.method.name}")
    if state.get("ledger") and ledger is None:
        raise UserError(
            f"{path} holds updates of frozen weights, and the run of {attached.method.name} keeps no ledger"
        )
    if recomposer is not None and recomposer.active and state.get("recompose") is None:
        raise UserError(f"{path} does not say how far recomposition was; it was written without it")
    adapter, optimizer = TensorFiles(path, ADAPTER), TensorFiles(path, OPTIMIZER)
    keys = sorted({"master"} | {name.rpartition("/")[2] for name in optimizer.names})
    _compare(path, adapter, shapes)
    _compare(path, optimizer, {f"{name}/{key}": shape for name, shape in trained.items() for key in keys})
    ledger_file = ledger_files(checkpoint, {name: layer.shape for name, layer in attached.layers.items()})
    recompose = TensorFiles(path, RECOMPOSE) if any(path.glob(f"{RECOMPOSE}*.safetensors")) else None
    return _Files(path, adapter, optimizer, keys, ledger_file, recompose)


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
    for name in files.names:
        if name not in wanted:
            raise UserError(
                f"{path}: the run has no tensor {name}; it was written with another model, method or targets"
            )


# ---------------------------------------------------------------------- random-number states


def _gather_random_states(comm: Comm) -> dict[str, list[str]] | None:
    """On rank 0 the states of all ranks' global generators, which dropout draws from, in base64."""
    gathered = {
        kind: comm.gather_to(state.to(comm.device), 0) for kind, state in random_states(comm.device).items()
    }
    if not comm.is_main:
        return None
    return {
        kind: [base64.b64encode(bytes(state.cpu().numpy())).decode() for state in of_ranks]
        for kind, of_ranks in gathered.items()
    }


def _restore_random_states(comm: Comm, checkpoint: Checkpoint) -> None:
    states = comm.share(
        on_main(comm, checkpoint.path, lambda: json.loads((checkpoint.path / STATE).read_bytes())["rng"])
    )
    if len(states["cpu"]) != comm.world_size:
        _log.info("%s was written by %d ranks: dropout draws anew", checkpoint.path, len(states["cpu"]))
        return
    own = {
        kind: torch.frombuffer(bytearray(base64.b64decode(of_ranks[comm.rank])), dtype=torch.uint8)
        for kind, of_ranks in states.items()
    }
    restore_random_states(own, comm.device)
