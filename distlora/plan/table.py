"""The plan as a table for a terminal: one column a cluster, and changes that make the recipe fit."""

from collections.abc import Sequence
from math import prod

from distlora.errors import UserError
from distlora.methods import probe_of
from distlora.plan.advice import advice, fits
from distlora.plan.columns import Plan
from distlora.plan.memory import GIB
from distlora.plan.setup import Setup
from distlora.plan.traffic import Traffic, over_links
from distlora.recipe.deepspeed_config import given_deepspeed
from distlora.recipe.deepspeed_resolution import look_up

#: Stands in the cells of a cluster on which the recipe cannot run.
NONE = "-"

Columns = Sequence[tuple[int, Plan | UserError]]


def table(columns: Columns, gpus: int, gpu_memory: float) -> str:
    """The plans of `side_by_side` as text. gpus: of one node. gpu_memory: GiB of one GPU."""
    plans = [plan for _, plan in columns]
    first = next(plan for plan in plans if isinstance(plan, Plan))
    rows = [
        ("nodes x GPUs", [f"{nodes} x {gpus}" for nodes, _ in columns]),
        ("GPUs", [str(nodes * gpus) for nodes, _ in columns]),
        ("micro-batches a step", _each(plans, lambda plan: str(plan.setup.accumulation))),
        None,
        ("memory of a GPU", None),
        ("  weights", _sizes(plans, lambda plan: plan.memory.weights)),
        ("  adapters", _sizes(plans, lambda plan: plan.memory.adapters)),
        ("  gradients", _sizes(plans, lambda plan: plan.memory.gradients)),
        ("  optimizer", _sizes(plans, lambda plan: plan.memory.optimizer)),
        ("  activations", _sizes(plans, lambda plan: plan.memory.activations)),
        ("  whole weights, buffers", _sizes(plans, lambda plan: plan.memory.gathered)),
        *((f"  peak of {phase}", _peak(plans, phase)) for phase in first.memory.peaks if phase != "idle"),
        ("host memory of a node", _sizes(plans, lambda plan: plan.memory.host * gpus)),
        ("  while it loads", _sizes(plans, lambda plan: plan.memory.loading * gpus)),
        None,
        *_traffic_rows(plans),
        None,
        ("checkpoint", _sizes(plans, lambda plan: plan.memory.checkpoint)),
        (
            f"fits into {gpu_memory:g} GiB",
            _each(plans, lambda plan: "yes" if fits(plan, gpu_memory) else "NO"),
        ),
    ]
    return "\n".join([*_headline(first), "", *_aligned(rows), "", *_remarks(columns, gpu_memory)])


def _headline(plan: Plan) -> list[str]:
    setup, shapes = plan.setup, plan.setup.shapes
    recipe, trained = setup.recipe, sum(shapes.trained.values())
    engine = f"ZeRO stage {setup.stage}{_asked(setup)}" if setup.config else "plain PyTorch"
    moved = [what for what in ("param", "optimizer") if setup.offloads(what)]
    return [
        f"{recipe.model.path}: {shapes.elements - shapes.factors:,} parameters "
        f"in {recipe.model.dtype}{_packed(plan)}",
        f"{setup.method.name}: {trained:,} trained parameters",
        f"{engine}{', offloaded: ' + ' and '.join(moved) if moved else ''}; "
        f"micro-batch {recipe.train.micro_batch_size} of {setup.length} tokens, "
        f"{'' if setup.checkpointing else 'not '}checkpointed, {shapes.attention} attention",
        "in GiB, where no other unit is named",
    ]


def _asked(setup: Setup) -> str:
    """The stage that the config names, where the run takes another."""
    asked = look_up(given_deepspeed(setup.recipe)[0], "zero_optimization.stage", 0)
    return "" if asked == setup.stage else f" in the place of {asked}, to sum gradients in float32"


def _packed(plan: Plan) -> str:
    packings = plan.setup.shapes.packings
    if not packings:
        return ""
    kind = plan.setup.recipe.model.quantization.kind
    return f", of which {sum(prod(packing.shape) for packing in packings.values()):,} in {kind}"


def _each(plans: Sequence[Plan | UserError], show) -> list[str]:
    return [show(plan) if isinstance(plan, Plan) else NONE for plan in plans]


def _sizes(plans: Sequence[Plan | UserError], size) -> list[str]:
    return _each(plans, lambda plan: amount(size(plan)))


def _peak(plans: Sequence[Plan | UserError], phase: str) -> list[str]:
    return _sizes(plans, lambda plan: plan.memory.peaks[phase])


def amount(size: float) -> str:
    """Bytes as GiB with about three significant digits; 0 without any."""
    value = size / GIB
    if size == 0:
        return "0"
    return f"{value:.2f}" if value >= 0.995 else f"{value:.3f}" if value >= 0.001 else f"{value:.1e}"


def _traffic_rows(plans: Sequence[Plan | UserError]) -> list:
    rows = []
    for title, traffic in (
        ("traffic of a step", lambda plan: plan.step),
        ("traffic of the initialisation", lambda plan: plan.init),
        ("traffic of a try of eta", lambda plan: plan.search),
        ("traffic of a recomposition", lambda plan: plan.recomposition),
    ):
        if (
            not any(traffic(plan) for plan in plans if isinstance(plan, Plan))
            and title != "traffic of a step"
        ):
            continue
        rows.append((title, None))
        rows.append(
            ("  out of a node", _each(plans, lambda plan, t=traffic: amount(_links(plan, t(plan)).inter)))
        )
        rows.append(
            (
                "  out of a GPU within its node",
                _each(plans, lambda plan, t=traffic: amount(_links(plan, t(plan)).intra)),
            )
        )
    return rows


def _links(plan: Plan, traffic: Traffic):
    return over_links(traffic, plan.nodes, plan.gpus, plan.setup.group)


def _aligned(rows: list) -> list[str]:
    cells = [row for row in rows if row is not None and row[1] is not None]
    label = max(len(row[0]) for row in rows if row is not None)
    widths = [max(len(row[1][column]) for row in cells) for column in range(len(cells[0][1]))]
    lines = []
    for row in rows:
        if row is None:
            lines.append("")
        elif row[1] is None:
            lines.append(row[0])
        else:
            lines.append(
                "  ".join([row[0].ljust(label), *(cell.rjust(width) for cell, width in zip(row[1], widths))])
            )
    return lines


def _remarks(columns: Columns, gpu_memory: float) -> list[str]:
    lines = [f"{nodes} nodes: {plan}" for nodes, plan in columns if isinstance(plan, UserError)]
    lines += advice([plan for _, plan in columns if isinstance(plan, Plan)], gpu_memory)
    setup = next(plan for _, plan in columns if isinstance(plan, Plan)).setup
    probe = probe_of(setup.method)
    if setup.samples is None and probe is not None and probe.samples < 1:
        lines.append(
            "The size of the training set is not known here: a probe of a share of it counts 25 samples; "
            "--samples N says it."
        )
    if setup.recipe.data.packing:
        lines.append("Packed rows hold several samples: a step has as many micro-batches as this at most.")
    return lines + [f"{line[0].upper()}{line[1:]}." for line in setup.shapes.remarks]
