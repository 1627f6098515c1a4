"""Peak memory of LoRA-SB's initialisation beside that of the training step that follows, and beside the naive way.

    python -m tests.benchmarks.init_memory [--model smollm2|mistral-7b|gemma2-9b|all] [--ranks 1,2,8] [--explain]

How to read the table. Every figure is the largest sum of live tensor bytes on one rank's compute device, in GiB, weights
included; in parentheses, its ratio to the training step. At most 1.000 means: whoever can train can initialise. Each figure
comes from a process of its own.

    idle      weights, adapters and the optimizer's float32 masters, between passes
    training  the first full step: two micro-batches, clipping, AdamW with its state
    probe     gradients of all target layers, formed in row blocks, summed on the host
    SVDs      factors of all layers from these sums, one layer at a time
    search    the line search for the size of the first step
    naive     one backward pass that keeps the gradients of all target weights (under ZeRO-3: of each the rank's own part)
    host      the probe's sums in the owner's host memory

smollm2 is a real run on the CPU, on one rank: the sums lie in the same memory as everything else there, but are counted
separately all the same, because beside an accelerator they are host memory; "process" is the largest resident size, sums,
libraries and workspaces included. The other two are shapes without memory: one rank of ZeRO-3 that gathers one module at a time.

What is not seen: workspaces inside kernels (cuSOLVER's for a 14336 × 200 QR is about as large as its operand, 11 MiB), what the
allocator keeps in its cache, and DeepSpeed's prefetched parameters and gradient buckets, which training has as well.
"""

import argparse
import json
import resource
import subprocess
import sys
import time

from tests.benchmarks.live_bytes import DEVICE, HOST
from tests.benchmarks.phases import PHASES
from tests.benchmarks.subjects import MODELS, REAL, REAL_RANK, REAL_TOKENS, SHAPES_RANK, SHAPES_TOKENS, subject

GIB = 1 << 30


def measure(model: str, world_size: int, phase: str, response: int | None = None) -> dict:
    """Bytes: "idle" before the phase, "peak" and "host" during it, "process"; "largest": what was alive at the peak."""
    with subject(model, world_size, response) as under_test:
        counter = under_test.counter
        idle = counter.now[DEVICE]
        run = PHASES[phase](under_test)
        counter.reset_peak()
        run()
        peak, host, largest = counter.peak[DEVICE], counter.peak[HOST], counter.largest_at_peak(30)
    process = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"idle": idle, "peak": peak, "host": host, "process": process, "largest": largest}


def measure_apart(model: str, world_size: int, phase: str, response: int | None) -> dict:
    """`measure` in a process of its own."""
    command = [sys.executable, "-m", "tests.benchmarks.init_memory", "--one", model, str(world_size), phase]
    command += [] if response is None else ["--response", str(response)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{model}, {world_size} ranks, {phase}:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def table(model: str, ranks: list[int], response: int | None, explain: bool) -> str:
    """The figures of one model, one line for each number of ranks."""
    real = model == REAL
    tokens, rank = (REAL_TOKENS, REAL_RANK) if real else (SHAPES_TOKENS, SHAPES_RANK)
    kind = "real run on the CPU" if real else "one rank of ZeRO-3, shapes without memory"
    lines = [
        f"{model}, {kind}: bfloat16, micro-batch 1, {tokens} tokens, checkpointed, all projections, rank {rank}",
        f"{'all' if response is None else response} tokens with a loss; GiB on the device (ratio to training)",
        f"{'ranks':>5} {'idle':>7}" + "".join(f"{phase:>17}" for phase in PHASES) + f"{'host':>8}",
    ]
    notes = []
    for world_size in [1] if real else ranks:
        found = {phase: measure_apart(model, world_size, phase, response) for phase in PHASES}
        step = found["training"]["peak"]
        cells = "".join(f"{f['peak'] / GIB:>9.3f} ({f['peak'] / step:5.3f})" for f in found.values())
        lines.append(f"{world_size:>5} {found['training']['idle'] / GIB:>7.3f}{cells}{found['probe']['host'] / GIB:>8.3f}")
        if real:
            lines.append(f"{'process':>13}" + "".join(f"{f['process'] / GIB:>9.3f}        " for f in found.values()))
        above = [phase for phase in ("probe", "SVDs", "search") if found[phase]["peak"] > step]
        notes.append(f"{world_size} ranks: " + (f"above training: {', '.join(above)}" if above else "nothing above training"))
        if explain:
            notes += [line for phase, f in found.items() for line in _explained(phase, f)]
    return "\n".join(lines + notes)


def _explained(phase: str, found: dict) -> list[str]:
    lines = [f"    at the peak of {phase}:"]
    return lines + [f"        {size / GIB:8.3f} GiB  {count:>5} × {what}" for what, count, size in found["largest"]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=(*MODELS, "all"), default="all")
    parser.add_argument("--ranks", default="1,2,8", help="world sizes for the shapes without memory")
    parser.add_argument("--response", type=int, help="tokens that have a loss; default: all but the first")
    parser.add_argument("--explain", action="store_true", help="list the largest tensors at each peak")
    parser.add_argument("--one", nargs=3, metavar=("MODEL", "RANKS", "PHASE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        model, world_size, phase = options.one
        print(json.dumps(measure(model, int(world_size), phase, options.response)))
        return
    ranks = [int(world_size) for world_size in options.ranks.split(",")]
    began = time.perf_counter()
    for model in MODELS if options.model == "all" else [options.model]:
        print(table(model, ranks, options.response, options.explain), flush=True)
        print()
    print(f"{time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
