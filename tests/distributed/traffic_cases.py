"""What `distlora plan` says that ranks send each other equals what they send,
counted below DeepSpeed and us.
"""

from collections import Counter

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from distlora.initialisation.factors import initialise
from distlora.methods import TakesFromWeight
from distlora.plan.setup import Setup, setup_of
from distlora.plan.shapes import shapes_of
from distlora.plan.traffic import (
    ALL_GATHER,
    ALL_REDUCE,
    BROADCAST,
    REDUCE,
    REDUCE_SCATTER,
    init_traffic,
    step_traffic,
)
from distlora.recipe.sections import Recipe

SEED = 3
KINDS = {
    "allreduce_": ALL_REDUCE, "broadcast_": BROADCAST, "reduce_": REDUCE,
    "allgather_": ALL_GATHER, "_allgather_base_": ALL_GATHER, "_reduce_scatter_base_": REDUCE_SCATTER,
}  # fmt: skip


class Collectives(TorchDispatchMode):
    """Bytes of the whole tensor of every collective, by kind; whoever asks for it. Single numbers, whole
    numbers and float64, in which counts, norms and reports travel, are left out."""

    def __init__(self, world_size: int):
        super().__init__()
        self.bytes: Counter[str] = Counter()
        self._world_size = world_size

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        if function.namespace == "c10d":
            self._count(function._opname, list(_tensors(arguments)))
        return function(*arguments, **(keywords or {}))

    def _count(self, operation: str, tensors: list[Tensor]) -> None:
        sizes = [t.nbytes for t in tensors if t.dtype in (torch.float32, torch.bfloat16) and t.numel() > 1]
        if sizes:
            kind = KINDS[operation]
            self.bytes[kind] += self._world_size * min(sizes) if kind == ALL_GATHER else max(sizes)


def _tensors(argument):
    if isinstance(argument, Tensor):
        yield argument
    elif isinstance(argument, (list, tuple)):
        for item in argument:
            yield from _tensors(item)


def planned(setting, probe_samples: int = 0) -> Setup:
    """What the planner makes of the setting."""
    checkpointing = setting.build_settings.get("checkpointing", False)
    family = setting.build_settings.get("family", "")
    recipe = Recipe(
        model={
            "path": str(setting.directory / family),
            "dtype": str(setting.engine.dtype).removeprefix("torch."),
            "gradient_checkpointing": checkpointing,
            "quantization": setting.build_settings.get("quantization"),
        },
        method=setting.attached.method,
        targets=["q_proj", "experts"] if family == "experts" else "all-linear",
        data={"task": "arithmetic"},
        train={
            "steps": 20, "micro_batch_size": setting.micro_batch, "clip": setting.clip or None,
            "global_batch_size": setting.micro_batch * setting.accumulation * setting.comm.world_size,
        },
        deepspeed=getattr(setting.engine, "_config", None),
        output_dir="unused",
    )  # fmt: skip
    return setup_of(recipe, shapes_of(recipe), setting.comm.world_size, probe_samples or None)


def sent_in_a_step(setting) -> dict[str, Tensor]:
    """The third step: DeepSpeed knows the order of the modules."""
    if setting.attached.layers:
        setting.start_from_random_factors()
    losses = setting.steps(0, 2)[0]
    with Collectives(setting.comm.world_size) as seen:
        losses += setting.steps(2, 3)[0]
    expected = step_traffic(planned(setting))
    assert setting.comm.world_size == 1 or seen.bytes == expected, (
        f"{dict(seen.bytes)} and not {dict(expected)}"
    )
    return {"losses": torch.tensor(losses)}


def sent_at_the_start(setting, count: int = 6) -> dict[str, Tensor]:
    """The whole initialisation, without scales of packed weights that `Collectives` leaves out. What ZeRO-3
    gathers for the probe is only near: DeepSpeed releases more than it needs to in the passes in which it
    learns the order of the modules."""
    data = setting.probe_data(count, 1)
    with Collectives(setting.comm.world_size) as seen:
        initialise(setting.engine, setting.attached, SEED, setting.rate(0), data)
    expected = init_traffic(planned(setting, count))
    if isinstance(setting.attached.method, TakesFromWeight):
        packed = (
            layer.packing.scales() for layer in setting.attached.layers.values() if layer.packing is not None
        )
        expected[BROADCAST] -= sum(
            s.nbytes for scales in packed for s in scales if s.dtype == torch.uint8 or s.numel() == 1
        )
    if setting.comm.world_size > 1:
        gathered, wanted = seen.bytes.pop(ALL_GATHER, 0), expected.pop(ALL_GATHER, 0)
        assert abs(gathered - wanted) <= 0.05 * wanted, f"{gathered} bytes gathered, {wanted} expected"
        assert seen.bytes == expected, f"{dict(seen.bytes)} and not {dict(expected)}"
    return {"losses": torch.tensor(setting.steps(0, 1)[0])}
