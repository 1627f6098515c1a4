"""The checkpoints in a run directory: which there are, whether they are whole, how one takes its place and
old ones go.
"""

import logging
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distlora.checkpoints.best import best_of
from distlora.checkpoints.soundness import mark, soundness, why_bad
from distlora.checkpoints.stored import MANIFEST, STATE, NewerFormat, read_manifest, read_state
from distlora.engine.comm import Comm
from distlora.engine.coordination import on_main
from distlora.errors import UserError
from distlora.files.atomic import put_in_place, sha256_of
from distlora.files.json_files import read_json
from distlora.files.places import leads_out_of
from distlora.files.problems import dangling_link, first_unreadable

#: A complete checkpoint, or the one whose place a newer of the same step was about to take when the run was
#: killed.
_NAME = re.compile(r"checkpoint-(\d+)|\.checkpoint-(\d+)\.replaced")

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint. state: `state.json` without the random-number states. files: the names of its
    files; others that lie there are not read.
    """

    path: Path
    step: int
    state: dict[str, Any]
    files: tuple[str, ...]

    @property
    def identity(self) -> dict[str, Any]:
        """What `save` was given, as JSON."""
        return self.state["identity"]

    @property
    def extra(self) -> dict[str, Any]:
        """What `save` was given, as JSON."""
        return self.state["extra"]


def newest(
    run_dir: str | os.PathLike[str], comm: Comm | None = None, only_good: bool = False
) -> Checkpoint | None:
    """The complete checkpoint of the highest step that is not marked bad, its checksums verified; None
    without one. only_good: those alone that are marked good, see `distlora.checkpoints.soundness`.

    Broken and bad ones are named in a warning and skipped. With `comm` this is collective: rank 0 looks, all
    ranks get its answer.
    """
    if comm is None:
        return _newest(Path(run_dir), only_good)
    return share_checkpoint(comm, on_main(comm, run_dir, lambda: _newest(Path(run_dir), only_good)))


def last_good(run_dir: str | os.PathLike[str]) -> Path | None:
    """Of the checkpoints that are marked good the newest complete one; their checksums are not verified."""
    complete = (path for _, path in candidates(Path(run_dir)) if problem_with(path, checksums=False) is None)
    return next((path for path in complete if soundness(path) == "good"), None)


def share_checkpoint(comm: Comm, found: Checkpoint | None) -> Checkpoint | None:
    """What rank 0 has found, on every rank."""
    shared = comm.share(
        found
        and {"path": str(found.path), "step": found.step, "state": found.state, "files": list(found.files)}
    )
    return shared and Checkpoint(
        Path(shared["path"]), shared["step"], shared["state"], tuple(shared["files"])
    )


def of_step(run_dir: str | os.PathLike[str], step: int, path: Path | None = None) -> Checkpoint:
    """That very checkpoint. path: where it lies, if not under its usual name. Raises UserError if it is
    missing or broken."""
    path = path or Path(run_dir) / f"checkpoint-{step}"
    _refuse_unreadable(path)
    if not path.is_dir():
        there = ", ".join(str(number) for number, _ in candidates(Path(run_dir))) or "none"
        raise UserError(f"{run_dir} has no checkpoint of step {step}; there are: {there}")
    problem = problem_with(path)
    if problem:
        raise UserError(f"{path} is broken: {problem}; take another one")
    return load(path)


def _newest(run_dir: Path, only_good: bool) -> Checkpoint | None:
    for _, path in candidates(run_dir):
        _refuse_unreadable(path)
        verdict = soundness(path)
        if verdict == "bad":
            _log.warning("%s is marked bad and skipped: %s", path, why_bad(path))
        if verdict == "bad" or (only_good and verdict != "good"):
            continue
        problem = problem_with(path)
        if problem is None:
            return load(path)
        _log.warning("%s is broken and skipped: %s", path, problem)
    return None


def _refuse_unreadable(path: Path) -> None:
    """Raises UserError for a checkpoint that may be whole, though it cannot be looked at. To pass over it
    would be to lose what it holds."""
    problem = dangling_link(path)
    if problem:
        raise UserError(f"{problem}; bring that back, or remove the link")
    if not path.is_dir():
        return
    problem = first_unreadable(path)
    if problem:
        raise UserError(f"{path} cannot be read: {problem}; make it readable, or move it away")


def candidates(run_dir: Path) -> list[tuple[int, Path]]:
    """(step, directory) of what may be a checkpoint, newest first; of one step the one in place comes
    first.
    """
    paths = [path for path in run_dir.iterdir() if _NAME.fullmatch(path.name)] if run_dir.is_dir() else []
    return sorted(
        ((_step_of(path), path) for path in paths), key=lambda item: (-item[0], item[1].name[0] == ".")
    )


def _step_of(path: Path) -> int:
    return int(max(_NAME.fullmatch(path.name).groups(default="")))


def problem_with(path: Path, checksums: bool = True) -> str | None:
    """What is wrong with a checkpoint; None if it is complete. Raises NewerFormat."""
    what = MANIFEST
    try:
        manifest = read_manifest(path)
        if manifest.step != _step_of(path) or STATE not in manifest.files:
            return f"{MANIFEST} is of another format or step"
        for name, entry in manifest.files.items():
            if leads_out_of(path / name, path, path.parent):
                return f"{name} is a link that leads out of the run directory"
            size = (path / name).stat().st_size
            if size != entry.bytes:
                return f"{name} has {size} bytes and not {entry.bytes}"
            if checksums and sha256_of(path / name) != entry.sha256:
                return f"{name} has another checksum than {MANIFEST} says"
        what = STATE
        read_state(path, manifest)
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except OSError as error:
        return f"it cannot be read ({error.strerror})"
    except ValueError as error:
        return f"{what} is damaged ({error})"
    return None


def load(path: Path) -> Checkpoint:
    """Of a checkpoint in which `problem_with` finds nothing."""
    manifest = read_manifest(path)
    state = read_state(path, manifest)
    rest = {key: value for key, value in state.items() if key != "rng"}
    return Checkpoint(path, manifest.step, rest, tuple(manifest.files))


# ---------------------------------------------------------------------- changing


def put_checkpoint_in_place(partial: Path, final: Path) -> None:
    """See `put_in_place`. An older one of this step may wait aside for a moment, where `newest` looks too."""
    put_in_place(partial, final, final.with_name(f".{final.name}.replaced"))


def prune(final: Path, keep: int, claimed: bool = True) -> None:
    """Removes older checkpoints once `final` is complete: of those up to its step stay the newest `keep` that
    are not bad, and the last good one and the best one in any case. Later steps are left alone: only broken
    or bad ones can be there. claimed: see `save`; else only what has our manifest is removed.
    """
    kept, has_good, best = 0, False, best_of(final.parent)
    for step, path in candidates(final.parent):
        if step > _step_of(final) or not (claimed or _is_ours(path)):
            continue
        try:
            whole = path.name[0] != "." and problem_with(path, checksums=False) is None
        except NewerFormat:
            continue
        verdict = soundness(path) if whole else "bad"
        is_last_good = verdict == "good" and not has_good
        kept, has_good = kept + (verdict != "bad"), has_good or is_last_good
        stays = kept <= max(keep, 1) or is_last_good or (best is not None and step == best.step)
        if verdict == "bad" or not stays:
            shutil.rmtree(path, ignore_errors=True)  # what stays of it is broken, and goes next time


def give_up_later(run_dir: Path, step: int | None, why: str) -> None:
    """Marks the checkpoints of later steps bad, because the run has gone back to this one. step: None where
    it begins anew: then all are removed, since none is good. Raises OSError."""
    for number, path in candidates(run_dir):
        if step is None:
            shutil.rmtree(path)
        elif number > step and problem_with(path, checksums=False) is None:
            mark(path, "bad", why)


def refuse_others(final: Path) -> None:
    """UserError where `final` would take the place of something else, or stand before another run's."""
    if final.exists() and not _is_ours(final):
        raise UserError(f"{final} is no checkpoint of distlora, and is left alone; name another directory")
    later = [step for step, path in candidates(final.parent) if step > _step_of(final) and _is_ours(path)]
    if later:
        raise UserError(
            f"{final.parent} holds a checkpoint of the later step {later[0]}, of another run; name another "
            "directory, or remove that one"
        )


def _is_ours(path: Path) -> bool:
    """Whether a directory has a manifest as this program writes it."""
    try:
        return {"format", "step", "files"} <= read_json(path / MANIFEST).keys()
    except (OSError, ValueError, AttributeError):
        return False
