"""A report of finished or running runs: a page and its pictures, in a directory of its own."""

import json
import os
from collections.abc import Sequence
from pathlib import Path

from distlora.errors import UserError
from distlora.exports.draft import new_directory
from distlora.files.json_files import read_json
from distlora.report.appendix import appendix
from distlora.report.compare import Group, comparable_groups, different_facts, unique
from distlora.report.drawing import require_matplotlib
from distlora.report.hardware import shown
from distlora.report.numbers import ABSENT
from distlora.report.page import Block, Heading, Paragraph, Table, as_html, as_markdown
from distlora.report.runs import RunRecord, find_runs
from distlora.report.sections import Pictures, group_section
from distlora.sentences import counted, nearest

MARKDOWN, HTML = "report.md", "report.html"
#: Names the files of a report, so that a later one may replace them.
MANIFEST = "report.json"


def write_report(
    paths: Sequence[Path], out: Path, command: str, smooth: int | None = None, tasks: Sequence[str] = ()
) -> Path:
    """Writes report.md, report.html and pictures into `out`, all or nothing, and returns the Markdown's path.

    paths: run directories, or folders of them. command: that makes the report again. smooth: steps over which
    training curves are averaged; None: a thirtieth of the run. tasks: whose scores are shown; by default all.
    Raises UserError for paths that are no runs, broken files of a run, and an `out` that holds anything but
    an earlier report.
    """
    require_matplotlib()
    place = Path(os.path.realpath(out))
    earlier = _earlier_report(place)
    runs = find_runs(paths)
    _check_tasks(runs, tasks)
    groups = comparable_groups(runs)
    try:
        with new_directory(place, earlier) as folder:
            blocks = _page(groups, Pictures(folder, smooth), command, tasks)
            (folder / MARKDOWN).write_text(as_markdown(blocks), "utf-8", "backslashreplace")
            (folder / HTML).write_text(as_html(blocks, folder), "utf-8", "backslashreplace")
            files = sorted([*(path.name for path in folder.iterdir()), MANIFEST])
            manifest = {"report of": [shown(path) for path in paths], "files": files}
            (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"--out {out} cannot be written ({error.strerror}); name another directory") from None
    return out / MARKDOWN


def _earlier_report(out: Path) -> set[str]:
    """Names of the files of an earlier report in `out`. Raises UserError where there is anything else."""
    if not out.exists():
        return set()
    names = {path.name for path in out.iterdir()} if out.is_dir() else {out.name}
    try:
        own = set(read_json(out / MANIFEST)["files"])
    except (OSError, ValueError, KeyError, TypeError):
        own = set()
    foreign = sorted(name for name in names if name not in own or not (out / name).is_file())
    if foreign:
        raise UserError(f"--out {out} holds what is no report, such as {foreign[0]}; name another directory")
    return own


def _check_tasks(runs: Sequence[RunRecord], tasks: Sequence[str]) -> None:
    known = sorted({score.measured.task for run in runs for score in run.scores})
    for task in tasks:
        if task not in known:
            hint = nearest(task, known) or f"; there are {', '.join(known) or 'none'}"
            raise UserError(f"--task {task}: no run has scores of this task{hint}")


def _page(groups: Sequence[Group], pictures: Pictures, command: str, tasks: Sequence[str]) -> list[Block]:
    runs = [run for group in groups for run in group.runs]
    methods = unique(run.recipe.method.name for run in runs)
    blocks: list[Block] = [
        Heading(f"{counted(len(runs), 'run')}: {', '.join(methods)}", 1),
        Paragraph(
            "Numbers are means over runs that differ in their seeds alone; ± is the standard deviation over "
            "these n runs (n − 1 in the denominator). The first columns are the settings in which the runs "
            f"differ. “{ABSENT}” is what no file of a run tells."
        ),
    ]
    several = len(groups) > 1
    if several:
        blocks += _not_comparable(groups)
    for number, group in enumerate(groups, 1):
        blocks += group_section(group, number if several else None, pictures, tasks)
    return [*blocks, *appendix(groups, command)]


def _not_comparable(groups: Sequence[Group]) -> list[Block]:
    names = different_facts(groups)
    rows = [
        [f"group {number}", str(len(group.runs)), *(group.facts[name] for name in names)]
        for number, group in enumerate(groups, 1)
    ]
    return [
        Heading("Not comparable"),
        Paragraph(
            "The runs differ in the base model, the data, or the budget (steps × global batch). Scores and "
            "losses of different groups say nothing about each other, so each group has its own tables."
        ),
        Table(["", "runs", *names], rows, texts=2 + len(names)),
    ]
