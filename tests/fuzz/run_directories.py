"""What lies in the directories of runs and sweeps, and is read by later starts, reports and `verify`."""

import functools
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from distlora.checkpoints.best import BEST, best_of
from distlora.checkpoints.directory import newest, of_step
from distlora.checkpoints.soundness import MARK, soundness, why_bad
from distlora.checkpoints.stored import MANIFEST
from distlora.cluster.environment import ENVIRONMENT, note_resumed
from distlora.cluster.status import STATUS
from distlora.evaluation.predictions import Predictions
from distlora.files.atomic import sha256_of
from distlora.recipe.load import load_run_recipe
from distlora.report.compare import comparable_groups, different_facts
from distlora.report.costs import initialisation_table, speed_table
from distlora.report.curves import curves
from distlora.report.hardware import command_of, hardware_of, revision_of, versions_of
from distlora.report.records import has_step, read_lines
from distlora.report.runs import find_runs
from distlora.report.scores import scores_table
from distlora.sweeps.file import read_sweep_file
from distlora.sweeps.states import keep_table, table_of
from distlora.training.about import scores_of
from distlora.training.bad_batches import _write as write_batch
from distlora.training.bad_steps import BadSteps, read_left_out
from distlora.training.continued import check_extra
from distlora.training.monitor import _keep_until
from distlora.training.run_directory import RATE_SEARCH, RECIPE, RECOMPOSITIONS, SUMMARY
from distlora.training.verified import verify
from tests.fuzz.damage import damaged, written
from tests.fuzz.recipes import RECIPE as SWEPT
from tests.fuzz.recipes import SWEEP
from tests.fuzz.rule import Loader
from tests.fuzz.saved import HEADER_WORDS, HELD, METRICS, RATES, a_file, as_json, edited, json_or_damaged

KEPT = Path(__file__).parents[1] / "data" / "runs_of_format_4" / "lora_sb"
START = {
    "resumed_at": None, "started": "2026-01-01T00:00:00+00:00", "command": ["python"], "accelerator": "A100",
    "versions": {"torch": "2.8"}, "topology": {"ranks": 2, "hosts": {"a": [0, 1]}, "device": "cuda"},
}  # fmt: skip
TOLD = {
    "trained": 90, "lora_trained": 400, "rank": 3, "steps": 3, "init_seconds": 0.5, "step_seconds": 0.1,
    "first_step": 0, "epoch_seconds": 2.0, "tokens_per_second": 80.0, "peak_memory_bytes": 2**30,
    "device": "cuda", "ranks": 2, "before": {"loss": 3.0}, "after": {"loss": "nan"},
}  # fmt: skip
SETTINGS = {"data": "0a1b", "limit": 3, "model": "m"}
EVALUATED = {
    "task": "gsm8k", "step": 3, "by": "generation", "samples": 3, "scores": {"exact_match": 0.5},
    "data": "x", "split": "test", "settings": SETTINGS,
}  # fmt: skip
DECISION = b'{"step": 2, "swapped": true, "reason": "interval", "layers": {"a": {"loss": 0.1}}}\n'

# ---------------------------------------------------------------------- runs in a report

#: By the name of the file: what lies beside the recipe of a run that a report reads.
FILES: dict[str, bytes] = {
    "metrics.jsonl": METRICS + b'{"step": 3, "eval/loss": 2.0, "train/tokens_per_second": 5}\n',
    RECOMPOSITIONS: DECISION,
    ENVIRONMENT: as_json([START, START]),
    SUMMARY: as_json(TOLD),
    STATUS: as_json(HELD),
    RATE_SEARCH: as_json(RATES),
    "eval/gsm8k-3.json": as_json(EVALUATED),
    RECIPE: (KEPT / RECIPE).read_bytes(),
}


@st.composite
def edited_runs(draw) -> tuple[str, bytes]:
    """Another content of one of a run's files."""
    name = draw(st.sampled_from(sorted(FILES)))
    if name.endswith(".json") and draw(st.integers(0, 3)):
        return name, as_json(draw(edited(json.loads(FILES[name]))))
    return name, draw(damaged([FILES[name]], [b'"step": ', b'"nan"']))


def _report(example: tuple[str, bytes], folder: Path) -> None:
    for name, content in (FILES | {example[0]: example[1]}).items():
        written(folder / "run", content, name)
    runs = find_runs([folder])
    scores_of(folder / "run", 3)
    groups = comparable_groups(runs)
    different_facts(groups)
    for group in groups:
        scores_table(group), initialisation_table(group), speed_table(group)
        for tag in ("train/loss", "eval/loss"):
            curves(group.settings, tag, None, True)
    for run in runs:
        hardware_of(run), command_of(run), versions_of(run), revision_of(run)
    assert all(sorted(run.swaps) == run.swaps and (run.rate_found, run.steps) for run in runs)


# ---------------------------------------------------------------------- runs that go on


def _environment(path: Path) -> None:
    note_resumed(path.parent, 3)
    (*_, own) = json.loads(path.read_bytes())
    assert not isinstance(own, dict) or own["resumed_at"] == 3


def _recompositions(path: Path) -> None:
    read_lines(path, has_step)
    _keep_until(path, 3)
    assert all(line["step"] <= 3 for line in read_lines(path, has_step))


def _left_out(path: Path) -> None:
    memory = BadSteps()
    memory.recall(read_left_out(path.parents[1]))
    memory.go_on_from(3, None)
    assert memory.position(5) >= 5 and set(memory.row) <= set(memory.left_out)
    memory.meet_again(3)


def _batch(content: bytes, folder: Path) -> None:
    written(folder, content, "step-7.json")
    write_batch(folder, {"step": 7, "batch": 9, "rows": []})


def _extra(content: Any, folder: Path) -> None:
    found = of_step(KEPT, 3)
    found.state["extra"] = content
    check_extra(found, load_run_recipe(KEPT / RECIPE))
    BadSteps().go_on_from(3, content.get("bad_steps"))


BEST_SO_FAR = {"metric": "loss", "value": 2.0, "step": 2}
EXTRA = {
    "before": {"loss": 3.0}, "init_seconds": 1.0, "evaluation_due": True, "found_rate": None,
    "unwritten": {"metrics.jsonl": '{"step": 1}\n'},
    "bad_steps": {"left_out": [1, 4], "row": [4], "latest": 5, "losses": [2.5, 2.0]},
    "improvement": {"waiting": {"metric": "loss", "best": 2.0, "waited": 1}, "best": BEST_SO_FAR},
}  # fmt: skip

# ---------------------------------------------------------------------- a run that is verified


@st.composite
def damaged_kept_runs(draw) -> tuple[str, bytes]:
    """Another content of any file of a run that is done. What lies in its checkpoint fits the manifest half
    the time."""
    files = sorted(path for path in KEPT.rglob("*") if path.is_file())
    path = draw(st.sampled_from(files))
    right = path.read_bytes()
    if path.suffix == ".json" and draw(st.booleans()):
        return str(path.relative_to(KEPT)), as_json(draw(edited(json.loads(right))))
    return str(path.relative_to(KEPT)), draw(damaged([right], HEADER_WORDS, 2))


@functools.cache
def _near() -> Path:
    """A copy of the run on the file system of the examples."""
    return Path(shutil.copytree(KEPT, Path(tempfile.mkdtemp(prefix="fuzz-kept-")) / "run"))


def _with(folder: Path, name: str, content: bytes) -> Path:
    """The run with one other file; its other files are hard links."""
    run = Path(shutil.copytree(_near(), folder / "run", copy_function=os.link))
    (run / name).unlink()
    written(run, content, name)
    return run


def _verify(example: tuple[str, bytes], folder: Path) -> None:
    run = _with(folder, *example)
    path = run / example[0]
    if path.parent.name == "checkpoint-3" and path.name != MANIFEST and len(example[1]) % 2:
        manifest = json.loads((path.parent / MANIFEST).read_bytes())
        manifest["files"][path.name] = {"bytes": len(example[1]), "sha256": sha256_of(path)}
        (path.parent / MANIFEST).unlink()
        written(path.parent, as_json(manifest), MANIFEST)
    for finding in [*verify(run), *verify(run / "checkpoint-3"), *verify(run / "adapter")]:
        assert finding.line().isprintable() and (finding.problem or finding.can)


MARKED = json.loads((KEPT / "checkpoint-3" / MARK).read_bytes())


def _mark(content: bytes, folder: Path) -> None:
    run = _with(folder, f"checkpoint-3/{MARK}", content)
    place = run / "checkpoint-3"
    assert soundness(place) in ("good", "bad", "unproven") and isinstance(why_bad(place), str)
    assert (newest(run) is None) == (soundness(place) == "bad")


# ---------------------------------------------------------------------- predictions, sweeps

LINES = b'{"index": 0, "output": "1", "right": true}\n{"index": 2, "output": "2", "right": false}\n'
BEGUN = as_json(SETTINGS)


def _predictions(example: tuple[bytes, bytes, bytes | None], folder: Path) -> None:
    found = Predictions(folder, "gsm8k", 3, SETTINGS, 3, ("right",))
    contents = dict(zip((found.lines, found._begun, found.summary), example))
    for path, content in contents.items():
        if content is not None:
            path.write_bytes(content)
    assert set(found.found()) <= {0, 1, 2}
    found.finished()
    found.begin()
    found.add([{"index": 1, "output": "3", "right": True}])


def _sweep(content: bytes, folder: Path) -> None:
    written(folder, SWEPT, "recipe.yaml")
    sweep = read_sweep_file(written(folder, SWEEP, "sweep.yaml"))
    for ending in ("json", "claim"):
        written(sweep.output / "points", content, f"{sweep.points[0].name}.{ending}")
    written(sweep.points[0].run_dir, content, STATUS)
    table_of(keep_table(sweep))


NOTE = {"failed": "", "evaluated": {"tasks": "gsm8k"}, "predictions": {"gsm8k": "a"}}

LOADERS = (
    Loader("run in a report", edited_runs(), _report),
    Loader("starts", json_or_damaged([START, START]), a_file(ENVIRONMENT, _environment), 0.3, False),
    Loader("recompositions", damaged([DECISION]), a_file(RECOMPOSITIONS, _recompositions), 0.3),
    Loader(
        "what is left out",
        json_or_damaged({"left_out": [1, 4, 9], "row": [4], "in_row": 1, "latest": 5}),
        a_file("bad_steps/left_out.json", _left_out),
        0.5,
    ),
    Loader("best", json_or_damaged(BEST_SO_FAR), a_file(BEST, lambda path: best_of(path.parent)), 0.2, False),
    Loader("kept batch", json_or_damaged({"step": 7, "batch": 9, "rows": []}), _batch, 0.2, False),
    Loader("extra state", edited(EXTRA), _extra, 0.5),
    Loader("run to verify", damaged_kept_runs(), _verify, refuses=False),
    Loader("mark", json_or_damaged(MARKED), _mark, 0.3, False),
    Loader(
        "predictions",
        st.tuples(
            damaged([LINES], [b'{"index": 1, ']),
            json_or_damaged(SETTINGS) | st.just(BEGUN),
            st.none() | json_or_damaged(EVALUATED),
        ),
        _predictions,
        0.5,
    ),
    Loader("sweep's notes", json_or_damaged(NOTE) | json_or_damaged(HELD), _sweep, 0.3, False),
)  # fmt: skip
