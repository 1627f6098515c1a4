"""Seconds of a training step beside PEFT's: the same model, batch, dtype, DeepSpeed config and optimizer.

    python -m tests.benchmarks.step [--ranks 2] [--stage 3] [--batch 16] [--tokens 64] [--rank 96]
                                    [--dtype float32|bfloat16] [--rounds 3] [--steps 4] [lora lora_sb …]

SmolLM2-135M with adapters on all linear layers, on the CPU. `--ranks 1 --stage 0` is plain PyTorch on one
process. A contestant's steps run in processes of their own; contestants take turns, `rounds` times, so that
whatever else the machine does weighs on all. A turn counts by the median of its steps after the first; the
ratio is that of the sums over the turns.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from distlora.adapter.attach import ALL_LINEAR, attach
from distlora.cluster.topology import topology_from_environment
from distlora.engine.comm import Comm, Topology
from distlora.engine.local import LocalEngine
from distlora.engine.optimizers import OptimizerSpec
from distlora.methods import registry
from distlora.models.hub import resolve_path
from distlora.models.loading import load_model
from distlora.models.losses import response_loss
from distlora.recipe.sections import ModelSection
from tests.benchmarks.subjects import REAL_PATH
from tests.stepping import train_step

ROOT = Path(__file__).resolve().parents[2]
PEFT = "peft lora"
RATE, CLIP = 1e-4, 1.0


def config_of(stage: int, dtype: str, batch: int, ranks: int) -> dict[str, Any]:
    """What both sides hand to DeepSpeed, beside their optimizers."""
    return {
        "train_micro_batch_size_per_gpu": batch,
        "train_batch_size": batch * ranks,
        "gradient_clipping": CLIP,
        "zero_optimization": {"stage": stage},
        "bf16": {"enabled": dtype == "bfloat16"},
        "zero_allow_untested_optimizer": True,
    }


def our_step(name: str, options: argparse.Namespace, comm: Comm, batch: dict) -> Callable[[], object]:
    """A step of one of our methods, on the plain engine or on ZeRO."""
    section = ModelSection(
        path=REAL_PATH, dtype=options.dtype, gradient_checkpointing=False, attention="sdpa"
    )
    method = registry()[name](name=name, rank=options.rank)
    if options.stage:
        from distlora.engine.zero.engine import ZeroEngine

        engine = ZeroEngine(comm, config_of(options.stage, options.dtype, options.batch, options.ranks))
    else:
        engine = LocalEngine(comm, getattr(torch, options.dtype), clip=CLIP)
    with engine.loading():
        model, _ = load_model(section)
    with engine.attaching():
        attach(model, method, ALL_LINEAR)
    engine.start(model, OptimizerSpec(lr=RATE))
    return lambda: train_step(engine, [batch], response_loss, RATE)


def peft_step(options: argparse.Namespace, batch: dict) -> Callable[[], object]:
    """A step of PEFT's LoRA: its own model, torch's AdamW, the class's own loss."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        resolve_path(REAL_PATH), dtype=getattr(torch, options.dtype), attn_implementation="sdpa"
    )
    settings = LoraConfig(
        r=options.rank, lora_alpha=options.rank, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    model = get_peft_model(model, settings, autocast_adapter_dtype=False)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE)
    if options.stage:
        import deepspeed

        config = config_of(options.stage, options.dtype, options.batch, options.ranks)
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)

        def step() -> None:
            engine.backward(engine(**batch).loss)
            engine.step()
    else:

        def step() -> None:
            model(**batch).loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, CLIP)
            optimizer.step()
            optimizer.zero_grad()

    model.train()
    return step


def seconds_of(contestant: str, options: argparse.Namespace) -> float:
    """The median of a turn's steps, on rank 0."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = str(listener.getsockname()[1])
    with tempfile.NamedTemporaryFile("r", suffix=".json") as answer:
        words = [sys.executable, "-m", "tests.benchmarks.step", *sys.argv[1:]]
        words += ["--worker", answer.name, "--contestant", contestant]
        ranks = []
        for rank in range(options.ranks):
            place = {
                "RANK": rank,
                "LOCAL_RANK": rank,
                "WORLD_SIZE": options.ranks,
                "MASTER_ADDR": "127.0.0.1",
            }
            threads = max(1, (os.cpu_count() or 1) // options.ranks)
            place |= {"MASTER_PORT": port, "OMP_NUM_THREADS": threads, "DS_ACCELERATOR": "cpu"}
            environment = os.environ | {name: str(value) for name, value in place.items()}
            ranks.append(subprocess.Popen(words, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL))
        if any([process.wait() for process in ranks]):
            raise SystemExit(f"a rank of {contestant} failed")
        return json.loads(answer.read())


def _worker(options: argparse.Namespace) -> None:
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    distributed = options.stage > 0
    topology = topology_from_environment() if distributed else Topology()
    comm = Comm(topology, torch.device("cpu"), distributed=distributed)
    generator = torch.Generator().manual_seed(topology.rank)
    ids = torch.randint(5, 40000, (options.batch, options.tokens), generator=generator)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    is_peft = options.contestant == PEFT
    step = peft_step(options, batch) if is_peft else our_step(options.contestant, options, comm, batch)
    took = []
    for _ in range(options.steps + 1):
        began = time.perf_counter()
        step()
        took.append(time.perf_counter() - began)
    if comm.is_main:
        Path(options.worker).write_text(json.dumps(statistics.median(took[1:])))
    comm.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("methods", nargs="*", default=["lora", "lora_sb"])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--stage", type=int, default=3, choices=(0, 2, 3))
    parser.add_argument("--batch", type=int, default=16, help="sequences a rank")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rank", type=int, default=96)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--contestant", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        return _worker(options)
    layout = (
        f"ZeRO-{options.stage} on {options.ranks} ranks" if options.stage else "one process, plain PyTorch"
    )
    print(
        f"SmolLM2-135M, {options.dtype}, {layout}, {options.batch} x {options.tokens} tokens a rank, "
        f"rank {options.rank}, {os.cpu_count()} CPU cores"
    )
    contestants = [PEFT, *options.methods]
    totals = dict.fromkeys(contestants, 0.0)
    for _ in range(options.rounds):
        for contestant in contestants:
            totals[contestant] += seconds_of(contestant, options)
    for contestant, total in totals.items():
        print(f"{contestant:12} {total / options.rounds:7.3f} s a step   {total / totals[PEFT]:.2f} x PEFT's")
    return None


if __name__ == "__main__":
    main()
