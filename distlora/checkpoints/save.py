"""Checkpoints that survive a crash at any moment and do not know the number of ranks or the ZeRO stage.

    RUN/checkpoint-<step>/
        adapter.safetensors     every factor as the forward pass uses it, and other trained parameters
        ledger.safetensors      what was added to frozen weights, by which they are made again from the
                                pretrained ones; absent without any. A frozen weight itself is never here
        recompose.safetensors   what the next recompositions need; absent without such
        optimizer.safetensors   <tensor>/master and <tensor>/<moment> of every trained tensor, float32
        state.json              step, method, what the caller adds, random-number states of all ranks
        manifest.json           written last: the size and SHA-256 of every other file

Groups of tensors above 2 GiB are split over files with an index. Rank 0 writes and reads; it holds one
tensor at a time beside the file that is being filled.
"""

import base64
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

from torch import Tensor

from distlora.adapter.attach import Attached
from distlora.checkpoints.contents import (
    ADAPTER,
    LEDGER,
    OPTIMIZER,
    RECOMPOSE,
    Stateful,
    adapter_shapes,
    describe_model,
)
from distlora.checkpoints.directory import prune, put_checkpoint_in_place, refuse_others
from distlora.checkpoints.stored import FORMAT, MANIFEST, STATE
from distlora.engine.comm import Comm
from distlora.engine.coordination import on_main, stream_to_main
from distlora.engine.protocol import Engine
from distlora.engine.random_state import random_states
from distlora.errors import UserError
from distlora.files.atomic import flush_directory, sha256_of, write_json
from distlora.files.tensors import write_split

SPLIT_BYTES = 2 << 30


def save(
    engine: Engine,
    attached: Attached,
    run_dir: str | os.PathLike[str],
    step: int,
    identity: dict[str, Any],
    extra: dict | None = None,
    keep: int = 2,
    split_bytes: int = SPLIT_BYTES,
    recomposer: Stateful | None = None,
    about: dict | None = None,
    claimed: bool = True,
    check: Callable[[], None] = lambda: None,
) -> Path:
    """Writes `run_dir/checkpoint-<step>` and returns it; then removes all but the newest `keep` of the steps
    up to this one.

    Collective. A crash at any moment leaves the earlier checkpoints, or this one, whole. identity: what a run
    must have in common with this one to resume it; extra: anything else of the caller's; both JSON. One of
    the same step is replaced. about: more that `restore` is to find in the state. claimed: all checkpoints in
    the directory are of this run, broken ones too; else those of others are left alone, or refused where they
    are in the way. check: raises UserError, on rank 0, where the caller must not write any more; asked before
    anything is changed. Errors: UserError on all ranks where the disk refuses; nothing is left behind then.
    """
    final = Path(run_dir) / f"checkpoint-{step}"
    if not claimed:
        on_main(engine.comm, final, lambda: refuse_others(final))
    state = {
        "format": FORMAT,
        "step": step,
        "method": attached.method.name,
        "settings": attached.method.model_dump(mode="json"),
        "seed": None if engine.ledger is None else engine.ledger.seed,
        "rank": attached.method.rank,
        "targets": attached.targets,
        "model": describe_model(engine),
        "optimizer_steps": engine.steps_taken(),
        "identity": identity,
        "extra": extra or {},
        "ledger": {} if engine.ledger is None else engine.ledger.describe(),
        "weights": {} if engine.ledger is None else engine.ledger.checksums(engine, attached.layers),
        "recompose": None if recomposer is None else recomposer.state(),
        "rng": _gather_random_states(engine.comm),
    } | (about or {})
    tensors = _tensors(engine, attached, recomposer)
    stream_to_main(
        engine.comm, final, tensors, lambda tensors: _write(final, tensors, state, split_bytes, check)
    )
    on_main(engine.comm, final, lambda: prune(final, keep, claimed))
    return final


def _tensors(
    engine: Engine, attached: Attached, recomposer: Stateful | None
) -> Iterator[tuple[str, str, Tensor | None]]:
    """(group, name, tensor) of everything to be saved, the tensors on rank 0 only. Collective."""
    for name in adapter_shapes(engine, attached):
        yield ADAPTER, name, engine.read_parameter(name)
    for group, owner in ((LEDGER, engine.ledger), (RECOMPOSE, recomposer)):
        for name, tensor in () if owner is None else owner.tensors():
            yield group, name, tensor
    for name in engine.trained_shapes():
        for key, tensor in (engine.read_trained(name) or {}).items():
            yield OPTIMIZER, f"{name}/{key}", tensor


def _write(
    final: Path,
    tensors: Iterable[tuple[str, str, Tensor]],
    state: dict,
    split_bytes: int,
    check: Callable[[], None],
) -> None:
    check()
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
        check()  # writing may have taken long
        put_checkpoint_in_place(partial, final)
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


def _gather_random_states(comm: Comm) -> dict[str, list[str]] | None:
    """On rank 0 the states of all ranks' global generators, which dropout draws from, in base64."""
    gathered = {
        kind: comm.all_gather(state.to(comm.device)) for kind, state in random_states(comm.device).items()
    }
    if not comm.is_main:
        return None
    return {
        kind: [base64.b64encode(bytes(state.cpu().numpy())).decode() for state in of_ranks]
        for kind, of_ranks in gathered.items()
    }
