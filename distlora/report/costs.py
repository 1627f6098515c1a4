"""What runs cost: tables of their initialisation, speed and memory, and of inference with their adapters."""

from collections.abc import Callable, Sequence

from distlora.report.compare import Group, Setting, unique
from distlora.report.hardware import hardware_of
from distlora.report.inference_cost import PassCost
from distlora.report.numbers import ABSENT, bytes_text, count_text, mean_text, number, scaled, spread
from distlora.report.page import Table
from distlora.report.runs import RunRecord
from distlora.training.summary import UNITS


def initialisation_table(group: Group) -> Table | None:
    """Seconds of the initialisation beside those of an epoch, as in table 6 of LoRA-SB (arXiv 2411.19557)."""

    def row(runs: Sequence[RunRecord]) -> list[str]:
        start = spread(run.init_seconds for run in runs)
        epoch = spread(run.number("epoch_seconds") for run in runs)
        share = f"{100 * start.mean / epoch.mean:.2f} %" if start and epoch and epoch.mean else ABSENT
        steps = count_text(run.number("steps_per_epoch") for run in runs)
        return [number(start and start.mean), steps, number(epoch and epoch.mean), share]

    header = ["initialisation, s", "steps an epoch", "an epoch, s", "initialisation / epoch"]
    return _table(group, header, row)


def speed_table(group: Group) -> Table | None:
    """Seconds a step, tokens or images a second, and the most memory of any rank in any run."""
    units = [unit for unit in UNITS if any(run.speed(unit) is not None for run in group.runs)]

    def row(runs: Sequence[RunRecord]) -> list[str]:
        peaks = [run.number("peak_memory_bytes") for run in runs]
        return [
            mean_text(run.number("step_seconds") for run in runs),
            *(mean_text(run.speed(unit) for run in runs) for unit in units),
            bytes_text(max((peak for peak in peaks if peak is not None), default=None)),
        ]

    return _table(group, ["a step, s", *(f"{unit} a second" for unit in units), "peak memory of a rank"], row)


def _table(
    group: Group, header: Sequence[str], row: Callable[[Sequence[RunRecord]], list[str]]
) -> Table | None:
    """A row for every setting on every hardware; None where there is no number."""
    places = [(setting, *part) for setting in group.settings for part in _by_hardware(setting)]
    rows = [row(runs) for _, _, runs in places]
    if all(cell == ABSENT for cells in rows for cell in cells):
        return None
    cells = [[*setting.values, hardware, *own] for (setting, hardware, _), own in zip(places, rows)]
    return Table([*group.columns, "hardware", *header], cells, texts=len(group.columns) + 1)


def _by_hardware(setting: Setting) -> list[tuple[str, list[RunRecord]]]:
    """Seconds of different machines have no mean."""
    kinds = [hardware_of(run) for run in setting.runs]
    return [(kind, [run for run, own in zip(setting.runs, kinds) if own == kind]) for kind in unique(kinds)]


# ---------------------------------------------------------------------- inference


def inference_table(group: Group) -> tuple[Table | None, str]:
    """Parameters, MACs and FLOPs of one sample, with adapters beside the weights and merged, as in table 7
    of LoRA-SB (arXiv 2411.19557); and what the numbers are of, or why they are unknown. Settings whose costs
    are equal are one row.
    """
    costs = [(setting, *setting.runs[0].cost) for setting in group.settings]
    known = [(setting, cost) for setting, cost, _ in costs if cost is not None]
    unknown = unique(problem for _, _, problem in costs if problem)
    if not known:
        return None, "Not counted: " + "; ".join(unknown)
    sample, plain = known[0][1].sample, known[0][1].merged
    rows = [["merged, or the pretrained model", "", *_cost_cells(plain, plain)]]
    for setting, cost in known:
        if cost.adapted is not None:
            rows.append([*setting.values[:2], *_cost_cells(cost.adapted, plain)])
    header = ["method", "rank", "parameters", "added", "MACs", "FLOPs", "added"]
    about = (
        f"One {sample} through the whole model, counted by torch's FlopCounterMode; "
        "a MAC is two FLOPs; attention is counted over the whole square of positions"
    )
    without = f". Not counted for some: {'; '.join(unknown)}" if unknown else ""
    return Table(header, [list(row) for row in unique(map(tuple, rows))], texts=2), about + without


def _cost_cells(cost: PassCost, plain: PassCost) -> list[str]:
    """plain: of the model without adapters."""
    return [
        f"{cost.parameters:,}",
        f"{100 * (cost.parameters / plain.parameters - 1):.2f} %",
        scaled(cost.macs),
        scaled(cost.flops),
        f"{100 * (cost.flops / plain.flops - 1):.2f} %",
    ]
