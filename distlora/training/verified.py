"""Whether what lies in a run directory, a checkpoint or an export is whole, and what can be done with it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from distlora.checkpoints.directory import candidates, load, problem_with
from distlora.checkpoints.soundness import soundness, why_bad
from distlora.checkpoints.stored import MANIFEST
from distlora.errors import UserError
from distlora.exports.exported import AdapterSource
from distlora.exports.peft import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from distlora.exports.peft_files import PeftFiles, read_peft
from distlora.exports.sources import CheckpointSource, Source
from distlora.files.problems import dangling_link, file_errors_explained, first_unreadable
from distlora.methods import Method, registry
from distlora.models.foreign import check_configs, check_weights
from distlora.recipe.load import load_run_recipe
from distlora.training.export_run import first_not_finite
from distlora.training.run_directory import ADAPTER, RECIPE

#: What can be done with a checkpoint that is whole.
RESUMED, EXPORTED, EVALUATED = "resumed", "exported", "evaluated"
_NOT_FINITE = "whole, but {} has numbers that are infinite or not a number"


@dataclass(frozen=True)
class Finding:
    """name: of a checkpoint, or of an export. can: what can be done with it. problem: why it cannot be used.
    soundness: of a checkpoint, see `distlora.checkpoints.soundness`.
    """

    name: str
    can: tuple[str, ...] = ()
    problem: str | None = None
    soundness: str | None = None

    def line(self) -> str:
        """One line for the user."""
        if self.problem:
            return f"{self.name}: {self.problem}"
        known = f", {self.soundness}" if self.soundness else ""
        return f"{self.name}: whole{known}; can be {', '.join(self.can)}"


def verify(path: Path) -> list[Finding]:
    """Of a run directory every checkpoint, newest first, and its adapter; of a checkpoint or an export the
    thing itself. All checksums are compared.

    Raises UserError for what is none of these. Changes nothing.
    """
    if not path.is_dir():
        raise UserError(dangling_link(path) or f"{path} is no directory of a run, a checkpoint or an export")
    unreadable = first_unreadable(path)
    if unreadable:
        raise UserError(unreadable)
    if (path / RECIPE).exists():
        return _of_run(path)
    if (path / MANIFEST).exists():
        recipe = path.parent / RECIPE
        return [_of_checkpoint(path, load_run_recipe(recipe).method if recipe.exists() else None)]
    if (path / ADAPTER_CONFIG).exists() or (path / ADAPTER_WEIGHTS).exists():
        return [_finding(path, path.name, (EVALUATED,), lambda: _check_peft(path))]
    if (path / "config.json").exists():
        return [_finding(path, path.name, (EVALUATED,), lambda: _check_model(path))]
    raise UserError(
        f"{path} is no run ({RECIPE}), no checkpoint ({MANIFEST}) and no export ({ADAPTER_CONFIG} or "
        "config.json)"
    )


def _of_run(run_dir: Path) -> list[Finding]:
    method = load_run_recipe(run_dir / RECIPE).method
    found = [_of_checkpoint(path, method) for _, path in candidates(run_dir)]
    adapter = run_dir / ADAPTER
    if adapter.exists():

        def check() -> None:
            read_peft(adapter)
            _refuse_not_finite(AdapterSource(adapter))

        found.append(_finding(adapter, ADAPTER, (EXPORTED, EVALUATED), check))
    return found or [Finding(run_dir.name, problem="has no checkpoint and no adapter; train first")]


def _of_checkpoint(path: Path, method: Method | None = None) -> Finding:
    """method: of the run; None for a checkpoint alone, which says its own."""

    def check() -> None:
        unreadable = dangling_link(path) or first_unreadable(path)
        if unreadable:
            raise UserError(f"cannot be read: {unreadable}")
        problem = problem_with(path)
        if problem:
            raise UserError(f"broken: {problem}")
        checkpoint = load(path)
        source = CheckpointSource(checkpoint, method or _own_method(checkpoint.state))
        if soundness(path) == "bad":
            raise UserError(f"whole, and marked bad: {why_bad(path)}")
        if soundness(path) == "unproven":
            _refuse_not_finite(source)

    found = _finding(path, path.name, (RESUMED, EXPORTED, EVALUATED), check)
    return found if found.problem else replace(found, soundness=soundness(path))


def _own_method(state: dict) -> Method:
    known, settings = registry(), state.get("settings")
    if state["method"] not in known or settings is None:
        raise UserError("it does not say how its method was set: verify the run's directory")
    try:
        return known[state["method"]].model_validate(settings)
    except ValueError:
        raise UserError(f"its settings of {state['method']} are not those of this version") from None


def _refuse_not_finite(source: Source) -> None:
    name = first_not_finite(source)
    if name is not None:
        raise UserError(_NOT_FINITE.format(name))


def _check_peft(path: Path) -> None:
    for name, tensor in _numbers_of(read_peft(path)):
        if not tensor.isfinite().all():
            raise UserError(_NOT_FINITE.format(name))


def _numbers_of(files: PeftFiles) -> Iterator[tuple[str, Tensor]]:
    for layer in files.layers:
        pair = files.pair(layer)
        yield layer, pair.left
        yield layer, pair.right
    for layer in files.magnitudes:
        yield layer, files.magnitude(layer)
    for head in files.heads:
        yield head, files.head(head)


def _check_model(path: Path) -> None:
    check_configs(str(path), path)
    check_weights(str(path), path)


def _finding(path: Path, name: str, can: tuple[str, ...], check: Callable[[], object]) -> Finding:
    try:
        with file_errors_explained(path):
            check()
    except UserError as error:
        return Finding(name, problem=str(error))
    return Finding(name, can)
