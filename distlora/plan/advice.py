"""Whether a plan fits, and which changes to the recipe make it fit. Each change is planned, not guessed."""

from collections.abc import Iterator, Sequence

from distlora.errors import UserError
from distlora.plan.columns import Plan, plan_of
from distlora.plan.memory import GIB
from distlora.recipe.model_section import Quantization
from distlora.recipe.sections import Recipe

#: Share of a GPU's memory that is left for CUDA, for workspaces of kernels and for what the allocator cannot
#: use.
RESERVE = 0.1


def fits(plan: Plan, gpu_memory: float) -> bool:
    """Whether the peak fits into one GPU. gpu_memory: its GiB, of which the share RESERVE stays free."""
    return plan.memory.peak <= (1 - RESERVE) * gpu_memory * GIB


def advice(plans: Sequence[Plan], gpu_memory: float) -> list[str]:
    """Lines that say what to change for the largest cluster on which the recipe does not fit.

    One line says so where it fits everywhere.
    """
    tight = [plan for plan in plans if not fits(plan, gpu_memory)]
    if not tight:
        return [f"It fits everywhere, with {RESERVE:.0%} of the memory left to CUDA and the allocator."]
    worst = tight[-1]
    phase = max(worst.memory.peaks, key=worst.memory.peaks.get)
    where = "1 GPU" if worst.world_size == 1 else f"{worst.world_size} GPUs"
    lines = [f"On {where} the peak is that of {phase}: {worst.memory.peak / GIB:.1f} GiB of {gpu_memory:g}."]
    helpful = []
    recipe = worst.setup.recipe
    for change, what in _changes(worst):
        changed = change(recipe)
        shapes = (
            worst.setup.shapes
            if changed.model.quantization == worst.setup.recipe.model.quantization
            else None
        )
        try:
            better = plan_of(changed, worst.nodes, worst.gpus, worst.setup.samples, shapes)
        except UserError:  # such as stage 3 for int8
            continue
        recipe = changed
        helpful.append(what)
        if fits(better, gpu_memory):
            return [*lines, f"It fits ({better.memory.peak / GIB:.1f} GiB) with {', '.join(helpful)}."]
    if not helpful:
        return [
            *lines,
            "Nothing in the recipe makes it smaller; take more or larger GPUs, or a smaller model.",
        ]
    return [
        *lines,
        f"Not even {', '.join(helpful)} make it fit; "
        "take more or larger GPUs, shorter texts, or a smaller model.",
    ]


def _changes(plan: Plan) -> Iterator[tuple]:
    """Changes of the recipe with their overrides for the command line, sorted by the time they cost."""
    setup, recipe = plan.setup, plan.setup.recipe
    if not setup.checkpointing:
        yield lambda r: _with(r, "model", gradient_checkpointing=True), "model.gradient_checkpointing=true"
    if recipe.train.micro_batch_size > 1:
        yield lambda r: _with(r, "train", micro_batch_size=1), "train.micro_batch_size=1"
    yield from _of_deepspeed(plan)
    if recipe.model.quantization is None:
        nf4 = Quantization(kind="nf4")
        yield (
            lambda r: _with(r, "model", quantization=nf4),
            "model.quantization=nf4 (which trains over rounded weights)",
        )


def _of_deepspeed(plan: Plan) -> Iterator[tuple]:
    setup = plan.setup
    if not setup.config:
        return
    if setup.stage < 3 and plan.world_size > 1:
        yield lambda r: _zero(r, stage=3), "deepspeed=configs/zero/zero3.json"
    if setup.stage == 3 and plan.world_size > 1:
        small = {"stage3_max_live_parameters": 10**8, "stage3_max_reuse_distance": 10**8}
        words = " ".join(f"deepspeed.zero_optimization.{key}=1e8" for key in small)
        yield lambda r: _zero(r, **small), words
    if not setup.offloads("optimizer") and setup.stage > 0:
        yield (
            lambda r: _zero(r, offload_optimizer={"device": "cpu"}),
            "deepspeed.zero_optimization.offload_optimizer.device=cpu",
        )
    if not setup.offloads("param"):
        both = {"offload_param": {"device": "cpu"}, "offload_optimizer": {"device": "cpu"}}
        yield lambda r: _zero(r, stage=3, **both), "deepspeed=configs/zero/zero3_offload.json"


def _with(recipe: Recipe, section: str, **values) -> Recipe:
    return recipe.model_copy(update={section: getattr(recipe, section).model_copy(update=values)})


def _zero(recipe: Recipe, **values) -> Recipe:
    zero = {**recipe.deepspeed.get("zero_optimization", {}), **values}
    return recipe.model_copy(update={"deepspeed": {**recipe.deepspeed, "zero_optimization": zero}})
