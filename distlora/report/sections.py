"""What a report says about runs that can be compared: scores, losses, costs."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from distlora.report.compare import Group
from distlora.report.costs import inference_table, initialisation_table, speed_table
from distlora.report.drawing import draw_losses, draw_scores
from distlora.report.hardware import shown
from distlora.report.page import Block, Heading, Paragraph, Picture
from distlora.report.scores import AFTER, scores_table
from distlora.sentences import counted


@dataclass(frozen=True)
class Pictures:
    """Where pictures go. smooth: steps that are averaged in training curves; None: a thirtieth of the run."""

    folder: Path
    smooth: int | None


def group_section(group: Group, number: int | None, pictures: Pictures, tasks: Sequence[str]) -> list[Block]:
    """number: of the group, None where there is one. tasks: whose scores are shown; by default all."""
    facts, suffix = group.facts, "" if number is None else f"-{number}"
    about = (
        f"Base model {shown(Path(facts['base model']))}, trained on the task {facts['data.task']}, "
        f"budget {facts['budget']}."
    )
    return [
        Heading("Results" if number is None else f"Group {number}"),
        Paragraph(about + _repeated_seeds(group)),
        *_scores(group, pictures, f"scores{suffix}.png", tasks),
        *_losses(group, pictures, f"losses{suffix}.png"),
        *_initialisation(group),
        *_speed(group),
        *_inference(group),
    ]


def _repeated_seeds(group: Group) -> str:
    """A deviation over runs of one seed is not one over seeds."""
    repeated = [s.label for s in group.settings if len({r.recipe.train.seed for r in s.runs}) < len(s.runs)]
    if not repeated:
        return ""
    return f" Some runs share their seed, so that ± says less than it seems to: {', '.join(repeated)}."


def _scores(group: Group, pictures: Pictures, name: str, tasks: Sequence[str]) -> list[Block]:
    table = scores_table(group, tasks)
    if table is None:
        return []
    text = "The best is in bold; ↓: less is better."
    if AFTER in table.header:
        text += " Only scores after the last step are compared."
    blocks: list[Block] = [Heading("Scores", 3), Paragraph(text), table]
    if draw_scores(group, pictures.folder / name, tasks):
        blocks.append(
            Picture(name, f"Scores over trained parameters, {counted(len(group.settings), 'setting')}")
        )
    return blocks


def _losses(group: Group, pictures: Pictures, name: str) -> list[Block]:
    if not draw_losses(group, pictures.folder / name, pictures.smooth):
        return []
    return [
        Heading("Losses", 3),
        Picture(name, f"Training and evaluation loss, {counted(len(group.settings), 'setting')}"),
        Paragraph(_caption(group, pictures.smooth)),
    ]


def _caption(group: Group, smooth: int | None) -> str:
    width = "a thirtieth of the run" if smooth is None else counted(smooth, "step")
    counts = sorted({len(setting.runs) for setting in group.settings})
    seeds = f"the mean over {' or '.join(map(str, counts))} seeds, " if counts[-1] > 1 else ""
    text = f"Strong lines: {seeds}the training loss averaged over {width}. Pale lines: every run as it was."
    if any(run.swaps for run in group.runs):
        text += " Triangles: after these steps components were recomposed."
    if len({run.recipe.train.eval_samples for run in group.runs}) > 1:
        text += " The evaluation losses are of different numbers of samples."
    return text


def _initialisation(group: Group) -> list[Block]:
    table = initialisation_table(group)
    text = "The initialisation of a run, once, beside an epoch of training (its steps × seconds a step)."
    return [] if table is None else [Heading("Initialisation", 3), Paragraph(text), table]


def _speed(group: Group) -> list[Block]:
    table = speed_table(group)
    if table is None:
        return []
    text = (
        "Peak memory is that of tensors on a GPU, or of the whole process where it computes on a CPU; "
        "tokens or images a second are counted with the evaluations and checkpoints between the steps."
    )
    continued = [run.name for run in group.runs if run.number("first_step")]
    if continued:
        names = ", ".join(continued)
        text += f" Seconds and memory of the last start alone, which continued its run: {names}."
    return [Heading("Speed and memory", 3), Paragraph(text), table]


def _inference(group: Group) -> list[Block]:
    table, about = inference_table(group)
    return [Heading("Inference", 3), Paragraph(f"{about}."), *([table] if table is not None else [])]
