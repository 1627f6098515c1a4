"""Training loops as users write them, around engines that they made: what every rank of these tests runs.

    python -m tests.distributed.users_engine PLAN.json OUT.json

Without ranks in the environment the same loop is plain PyTorch with the user's own optimizer, on whole
batches. The plan is a list of cases, see `Case`; rank 0 writes {key: losses of all steps}.
"""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import distlora
from tests.tiny_runs import Net, samples

RATE, BATCH, PROBE, CLIP = 1e-2, 12, 6, 0.3
TARGETS = ["first", "second"]


@dataclass(frozen=True)
class Case:
    """config_optimizer: made by DeepSpeed from its config. frozen: whether the engine's own checkpoint holds
    the frozen weights. resume: after the step `at` a new engine goes on from "distlora"'s checkpoint alone,
    or from the engine's own besides ("both").
    """

    method: str
    settings: dict[str, Any] = field(default_factory=dict)
    stage: int = 0
    bf16: bool = False
    config_optimizer: bool = False
    offload: bool = False
    accumulation: int = 1
    head: bool = False
    steps: int = 7
    resume: str = ""
    frozen: bool = True
    at: int = 3

    @property
    def key(self) -> str:
        set_here = {name: value for name, value in vars(self).items() if value != getattr(Case, name, None)}
        return "-".join(f"{name}={value}" for name, value in set_here.items() if name != "settings")


def network(dtype: torch.dtype) -> Net:
    net, generator = Net(), torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / max(parameter.shape) ** 0.5)
    return net.to(dtype)


def loss_of(net: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(net(batch["x"]).float(), batch["labels"])


def batches(number: int, count: int, dtype: torch.dtype, rank: int, world: int, pieces: int) -> list[dict]:
    """This rank's share of the samples of this number, in equal pieces."""
    whole = samples(number, dtype, count)
    size = count // (world * pieces)
    return [
        {key: value[(rank * pieces + i) * size :][:size] for key, value in whole.items()}
        for i in range(pieces)
    ]


def told(case: Case, dtype: torch.dtype, rank: int, world: int, pieces: int) -> dict[str, Any]:
    """What `initialise` and `load` are told."""

    def probe(number: int) -> list[dict]:
        return batches(500 + number, PROBE, dtype, rank, world, pieces)

    clip = CLIP if case.method == "lora_pro" else None
    plan = {"probe": probe, "loss": loss_of, "steps": case.steps, "first_rate": RATE}
    return plan | {"seed": 11, "clip": clip}


def adapted_network(case: Case) -> distlora.Adapted:
    dtype = torch.bfloat16 if case.bf16 else torch.float32
    also = ["head.weight", "head.bias"] if case.head else []
    return distlora.attach(network(dtype), case.method, targets=TARGETS, also_train=also, **case.settings)


# ---------------------------------------------------------------------- plain PyTorch


def plain(case: Case) -> list[float]:
    """The same run in plain PyTorch, on the batches of two ranks together."""
    adapted = adapted_network(case)
    dtype = next(adapted.model.parameters()).dtype
    optimizer = torch.optim.AdamW(adapted.parameters(), lr=RATE, weight_decay=0.0)
    distlora.initialise(adapted, optimizer=optimizer, **told(case, dtype, 0, 1, 2))
    losses = []
    for step in range(case.steps):
        optimizer.zero_grad()
        (batch,) = batches(step, BATCH, dtype, 0, 1, 1)
        loss = loss_of(adapted.model, batch)
        loss.backward()
        if case.method != "lora_pro":  # which clips by the norm of before
            torch.nn.utils.clip_grad_norm_(adapted.parameters(), CLIP)
        adapted.before_step()
        optimizer.step()
        adapted.after_step(loss)
        losses.append(loss.item())
    return losses


# ---------------------------------------------------------------------- DeepSpeed


def config_of(case: Case, world: int) -> dict[str, Any]:
    zero = {"stage": case.stage, "stage3_param_persistence_threshold": 200, "memory_efficient_linear": False}
    if case.offload:
        zero["offload_optimizer"] = {"device": "cpu"}
    config = {
        "train_micro_batch_size_per_gpu": BATCH // (world * case.accumulation),
        "gradient_accumulation_steps": case.accumulation,
        "gradient_clipping": 0.0 if case.method == "lora_pro" else CLIP,
        "bf16": {"enabled": case.bf16},
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
    }
    if case.config_optimizer:
        settings = {"lr": RATE, "weight_decay": 0.0, "torch_adam": True}
        config["optimizer"] = {"type": "AdamW", "params": settings}
    return config


def engine_of(case: Case, adapted: distlora.Adapted, world: int):
    import deepspeed

    made = None
    if not case.config_optimizer:
        made = torch.optim.AdamW(adapted.parameters(), lr=RATE, weight_decay=0.0)
    engine, *_ = deepspeed.initialize(model=adapted.model, optimizer=made, config=config_of(case, world))
    return engine


def under_deepspeed(case: Case, rank: int, world: int, folder: Path) -> list[float]:
    dtype = torch.bfloat16 if case.bf16 else torch.float32
    plan = told(case, dtype, rank, world, 1)
    adapted = adapted_network(case)
    engine = engine_of(case, adapted, world)
    distlora.initialise(adapted, engine, **plan)
    losses = train(case, adapted, engine, dtype, rank, world, case.at if case.resume else case.steps)
    if case.resume:
        distlora.save(adapted, folder / "distlora")
        if case.resume == "both":
            engine.save_checkpoint(str(folder / "engine"), exclude_frozen_parameters=not case.frozen)
        adapted = adapted_network(case)
        engine = engine_of(case, adapted, world)
        if case.resume == "both":
            engine.load_checkpoint(str(folder / "engine"), load_module_strict=case.frozen)
            with pytest.raises(distlora.UserError, match="go on with distlora.load"):
                distlora.initialise(adapted, engine, **plan)
        distlora.load(adapted, engine, folder / "distlora", **plan)
        losses += train(case, adapted, engine, dtype, rank, world, case.steps)
    return losses


def train(case: Case, adapted, engine, dtype: torch.dtype, rank: int, world: int, until: int) -> list[float]:
    """From the adapter's step on; the losses are means over all ranks."""
    losses = []
    while adapted.steps < until:
        total = torch.zeros(())
        for batch in batches(adapted.steps, BATCH, dtype, rank, world, case.accumulation):
            loss = nn.functional.cross_entropy(engine(batch["x"]).float(), batch["labels"])
            engine.backward(loss)
            adapted.before_step()
            engine.step()
            adapted.after_step(loss)
            total += loss.detach()
        torch.distributed.all_reduce(total)
        losses.append(total.item() / (case.accumulation * world))
    return losses


def main(plan: str, out: str) -> None:
    import deepspeed

    torch.set_num_threads(1)
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False, verbose=False)
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    found = {}
    for number, content in enumerate(json.loads(Path(plan).read_text())):
        case = Case(**content)
        try:
            found[case.key] = under_deepspeed(case, rank, world, Path(out).parent / f"case-{number}")
        except Exception as error:  # rank 0's is as good as another's: all ranks do the same
            found[case.key] = f"{type(error).__name__}: {error}"
    if rank == 0:
        Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
