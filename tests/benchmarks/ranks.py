"""Peaks of live tensor bytes on real ranks of ZeRO, with DeepSpeed's own buffers and whatever it keeps
gathered.

    python -m tests.benchmarks.ranks [--ranks 1,2,4] [--stages 2,3] [--checkpointing both|on|off]
                                     [--quantization nf4|int8] [--method lora_sb]

SmolLM2-135M with LoRA-SB on the CPU, as `init_memory` runs it on one rank of plain PyTorch; beside each
figure what `distlora plan` expects. "training" is the third step. "loading" is what is alive before DeepSpeed
gets the model: beside an accelerator that is host memory, as is pissa's ledger, which on a CPU is among the
measured bytes. Every world is a set of processes of its own.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from distlora.adapter.attach import ALL_LINEAR, attach, pack_linears
from distlora.adapter.packed import packer
from distlora.cluster.topology import topology_from_environment
from distlora.engine.comm import Comm
from distlora.engine.optimizers import OptimizerSpec
from distlora.engine.owners import open_ledger
from distlora.initialisation.factors import initialise
from distlora.initialisation.pretrained import PretrainedFiles
from distlora.methods import probe_of
from distlora.models.hub import resolve_path
from distlora.models.loading import check_sizes, load_model
from distlora.models.losses import response_loss
from distlora.models.targets import IGNORE
from distlora.plan import plan_of
from distlora.recipe.deepspeed_config import resolve_deepspeed
from distlora.recipe.sections import Recipe
from distlora.training.step import evaluation_loss
from tests.benchmarks.live_bytes import DEVICE, LiveBytes
from tests.benchmarks.phases import PHASES, Subject
from tests.benchmarks.subjects import REAL_PATH, REAL_RANK, REAL_TOKENS
from tests.stepping import train_step

ROOT = Path(__file__).resolve().parents[2]
GIB = 1 << 30
STEPS = 3


def recipe_of(
    stage: int, checkpointing: bool, world_size: int, method: str = "lora_sb", quantization: str | None = None
) -> Recipe:
    """What is run: one sample of REAL_TOKENS tokens a rank and step."""
    return Recipe(
        model={
            "path": REAL_PATH, "dtype": "bfloat16", "attention": "sdpa",
            "gradient_checkpointing": checkpointing,
            "quantization": quantization,
        },
        method={"name": method, "rank": REAL_RANK},
        data={"task": "arithmetic", "max_length": REAL_TOKENS},
        train={"steps": 10, "micro_batch_size": 1, "global_batch_size": world_size},
        deepspeed=json.loads((ROOT / f"configs/zero/zero{stage}.json").read_text())
        | {"tensorboard": {"enabled": False}},
        output_dir="runs/unused",
    )  # fmt: skip


def measure(recipe: Recipe, comm: Comm) -> dict[str, int]:
    """The peak of each phase on this rank, in bytes; "idle" between two steps."""
    from distlora.engine.zero.engine import ZeroEngine

    with LiveBytes() as counter:
        config, _ = resolve_deepspeed(recipe, comm.world_size, hidden_size=576)
        engine, asked = ZeroEngine(comm, config), recipe.model.quantization
        other_sizes = check_sizes(recipe.model)
        with engine.loading(whole=asked is not None):
            model, _ = load_model(recipe.model, other_sizes=other_sizes)
        counter.watch(
            p
            for parameter in model.parameters()
            for p in (parameter, getattr(parameter, "ds_tensor", parameter))
        )
        found = {}
        if asked is not None:
            counter.reset_peak()
            pack_linears(model, packer(asked.kind, engine.dtype, double=asked.double), comm.device)
            found["loading"] = counter.peak[DEVICE]
        with engine.attaching():
            attached = attach(model, recipe.method, ALL_LINEAR)
        engine.start(model, OptimizerSpec(lr=1e-4))
        if asked is not None:
            shapes = {name: layer.shape for name, layer in attached.layers.items()}
            open_ledger(engine, attached, 0, PretrainedFiles(resolve_path(REAL_PATH), shapes, engine.dtype))
        counter.watch(model.buffers())
        ids = torch.arange(1, REAL_TOKENS + 1)[None]
        batch = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "labels": ids.masked_fill(ids == 1, IGNORE),
        }
        subject = Subject(engine, attached, counter, batch)
        if recipe.method.source_matrix() == "weight":
            counter.reset_peak()
            initialise(engine, attached, seed=0, first_rate=1e-4)
            found["SVDs"] = counter.peak[DEVICE]
        if probe_of(recipe.method) is not None:
            run = PHASES["probe"](subject)
            run()
            counter.reset_peak()
            run()
            found["probe"] = counter.peak[DEVICE]
        PHASES["training"](subject)
        for _ in range(STEPS):
            counter.reset_peak()
            train_step(engine, [batch], response_loss, 1e-4)
        found["training"] = counter.peak[DEVICE]
        found["idle"] = counter.now[DEVICE]
        counter.reset_peak()
        evaluation_loss(engine, [batch], response_loss)
        found["evaluation"] = counter.peak[DEVICE]
    return found


def on_ranks(world_size: int, cases: list[tuple]) -> list[dict[str, int]]:
    """The answers of rank 0, one a case. cases: what `recipe_of` is told beside the number of ranks."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = str(listener.getsockname()[1])
    with tempfile.NamedTemporaryFile("r", suffix=".json") as answer:
        ranks = []
        for rank in range(world_size):
            environment = os.environ | {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size),
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1",
                "DS_ACCELERATOR": "cpu",
            }  # fmt: skip
            words = [
                sys.executable,
                "-m",
                "tests.benchmarks.ranks",
                "--worker",
                answer.name,
                "--cases",
                json.dumps(cases),
            ]
            ranks.append(subprocess.Popen(words, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL))
        if any([process.wait() for process in ranks]):
            raise SystemExit(f"a rank of {world_size} failed")
        return json.loads(answer.read())


def _worker(answer: str, cases: list[tuple]) -> None:
    torch.set_num_threads(1)
    comm = Comm(topology_from_environment(), torch.device("cpu"))
    found = [measure(recipe_of(stage, on, comm.world_size, *rest), comm) for stage, on, *rest in cases]
    if comm.is_main:
        Path(answer).write_text(json.dumps(found))
    comm.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", default="1,2,4")
    parser.add_argument("--stages", default="2,3")
    parser.add_argument("--checkpointing", choices=("both", "on", "off"), default="both")
    parser.add_argument("--quantization", choices=("nf4", "int8"))
    parser.add_argument("--method", default="lora_sb")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--cases", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        return _worker(options.worker, json.loads(options.cases))
    switches = {"both": (True, False), "on": (True,), "off": (False,)}[options.checkpointing]
    how = (options.method, options.quantization)
    cases = [(int(stage), on, *how) for stage in options.stages.split(",") for on in switches]
    stored = f"linear weights in {options.quantization}, " if options.quantization else ""
    print(
        f"smollm2 on real ranks: bfloat16, {stored}micro-batch 1, {REAL_TOKENS} tokens, "
        f"{options.method} of rank {REAL_RANK}"
    )
    print("GiB measured / planned")
    for world_size in map(int, options.ranks.split(",")):
        for (stage, checkpointing, *_), found in zip(cases, on_ranks(world_size, cases)):
            memory = plan_of(recipe_of(stage, checkpointing, world_size, *how), world_size, 1).memory
            expected = memory.peaks | {"loading": memory.loading}
            cells = "".join(
                f"  {phase} {size / GIB:.3f} / {expected[phase] / GIB:.3f} "
                f"({expected[phase] / size - 1:+.1%})"
                for phase, size in found.items()
            )
            print(
                f"{world_size} ranks, stage {stage}, {'' if checkpointing else 'not '}checkpointed:{cells}",
                flush=True,
            )
    return None


if __name__ == "__main__":
    main()
