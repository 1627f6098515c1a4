"""How to repeat what a report shows: every run's seed, state, hardware, command and versions."""

from collections.abc import Sequence

import distlora
from distlora.report.compare import Group, unique
from distlora.report.hardware import began, command_of, hardware_of, revision_of, versions_of
from distlora.report.page import Block, Bullets, Commands, Heading, Paragraph, Table
from distlora.report.runs import RunRecord
from distlora.report.scores import RATE_FOUND, rates_text


def appendix(groups: Sequence[Group], command: str) -> list[Block]:
    """command: that made the report."""
    runs = [run for group in groups for run in group.runs]
    return [
        Heading("Appendix: the runs"),
        _runs_table(groups),
        *_commands(runs),
        *_versions(runs),
        Paragraph("This page was made by:"),
        Commands([command]),
    ]


def _runs_table(groups: Sequence[Group]) -> Table:
    searched = any(run.rate_found is not None for group in groups for run in group.runs)
    rate = [RATE_FOUND] if searched else []
    header = ["run", "method", "seed", *rate, "state", "began", "hardware", "revision"]
    several = ["group"] if len(groups) > 1 else []
    rows = []
    for number, group in enumerate(groups, 1):
        for run in group.runs:
            recipe = run.recipe
            about = [run.name, recipe.method.name, str(recipe.train.seed)]
            about += [rates_text([run])] if searched else []
            own = [_state(run), began(run), hardware_of(run), revision_of(run)]
            rows.append([*([str(number)] if several else []), *about, *own])
    return Table([*several, *header], rows, texts=len(several) + len(header))


def _state(run: RunRecord) -> str:
    if run.status is None:
        return f"at step {run.reached}"
    whole = f" of {run.status.steps}" if run.status.steps else ""
    return f"{run.status.state}, step {run.status.step}{whole}"


def _commands(runs: Sequence[RunRecord]) -> list[Block]:
    commands = unique(filter(None, map(command_of, runs)))
    text = "The recipe.yaml in a run's directory is itself a recipe, with every key."
    if not commands:
        return [Paragraph(text)]
    return [Paragraph(f"{text} The runs were started by:"), Commands(commands)]


def _versions(runs: Sequence[RunRecord]) -> list[Block]:
    """Of every package the versions of all runs."""
    found: dict[str, list[str]] = {}
    for run in runs:
        for name, version in versions_of(run).items():
            found.setdefault(name, []).append(version)
    items = [f"{name} {' / '.join(unique(versions))}" for name, versions in found.items()]
    of_runs = [f"of the runs: {', '.join(items)}"] if items else []
    return [Paragraph("Versions:"), Bullets([*of_runs, f"of this page: distlora {distlora.__version__}"])]
