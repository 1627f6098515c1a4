"""Peak memory of LoRA-SB's initialisation beside that of the training step that follows, and beside the naive
way.

    python -m tests.benchmarks.init_memory [--model smollm2|mistral-7b|gemma2-9b|all] [--ranks 1,2,8]
        [--response TOKENS] [--explain]

How to read the table. Every figure is the largest sum of live tensor bytes on one rank's compute device, in
GiB, weights included; in parentheses, its ratio to the training step. At most 1.000 means: whoever can train
can initialise. Each figure comes from a process of its own.

    idle      weights, adapters and the optimizer's float32 masters, between passes
    training  the first full step: forward, backward, clipping, AdamW with its state
    probe     gradients of all target layers, formed in blocks, summed on the host
    SVDs      factors of all layers from these sums, one layer at a time
    search    the line search for the size of the first step
    naive     one backward pass that keeps the gradients of all target weights (under ZeRO-3: of each the
              rank's own part)
    host      the probe's sums in the owner's host memory

smollm2 is a real run on the CPU, on one rank: the sums lie in the same memory as everything else there, but
are counted separately all the same, because beside an accelerator they are host memory; "process" is the
largest resident size, sums, libraries and workspaces included. The other two are shapes without memory: one
rank of ZeRO-3 that gathers one module at a time.

"planned" is what `distlora plan` expects of the same, without DeepSpeed's own buffers;
`tests.benchmarks.ranks` compares it with real ranks of DeepSpeed.

What is not seen: workspaces inside kernels (cuSOLVER's for a 14336 × 200 QR is about as large as its operand,
11 MiB), what the allocator keeps in its cache, and DeepSpeed's prefetched parameters and gradient buckets,
which training has as well.
"""

import argparse
import resource
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

from distlora.plan.memory import memory_of
from distlora.plan.setup import setup_of
from distlora.plan.shapes import shapes_of
from distlora.recipe.sections import Recipe
from tests.benchmarks.live_bytes import DEVICE, HOST
from tests.benchmarks.phases import PHASES
from tests.benchmarks.subjects import (
    MODELS,
    REAL,
    REAL_PATH,
    REAL_RANK,
    REAL_TOKENS,
    SHAPES,
    SHAPES_RANK,
    SHAPES_TOKENS,
    subject,
)

GIB = 1 << 30


def measure(model: str, world_size: int, phase: str, response: int | None = None) -> dict:
    """Bytes: "idle" before the phase, "peak" and "host" during it, "process"; "largest": what was alive at
    the peak.
    """
    with subject(model, world_size, response) as under_test:
        counter = under_test.counter
        idle = counter.now[DEVICE]
        run = PHASES[phase](under_test)
        counter.reset_peak()
        run()
        peak, host, largest = counter.peak[DEVICE], counter.peak[HOST], counter.largest_at_peak(20)
    process = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"idle": idle, "peak": peak, "host": host, "process": process, "largest": largest}


def measure_apart(*arguments) -> dict:
    """`measure` in a process of its own, which starts from a server that has only imported the libraries."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["tests.benchmarks.subjects"])
    with ProcessPoolExecutor(1, mp_context=context) as processes:
        return processes.submit(measure, *arguments).result()


def planned(model: str, world_size: int) -> dict[str, int]:
    """The planner's peaks by phase, in bytes."""
    real = model == REAL
    with tempfile.TemporaryDirectory() as directory:
        if not real:
            SHAPES[model].save_pretrained(directory)
        recipe = Recipe(
            model={"path": REAL_PATH if real else directory},
            method={"name": "lora_sb", "rank": REAL_RANK if real else SHAPES_RANK},
            data={"task": "arithmetic", "max_length": REAL_TOKENS if real else SHAPES_TOKENS},
            train={"steps": 1, "global_batch_size": world_size},
            deepspeed={"zero_optimization": {"stage": 3}},
            output_dir="unused",
        )
        return memory_of(setup_of(recipe, shapes_of(recipe), world_size), deepspeed=False).peaks


def table(model: str, ranks: list[int], response: int | None, explain: bool) -> Iterator[str]:
    """The figures of one model, one line for each number of ranks, as they come."""
    real = model == REAL
    tokens, rank = (REAL_TOKENS, REAL_RANK) if real else (SHAPES_TOKENS, SHAPES_RANK)
    kind = "real run on the CPU" if real else "one rank of ZeRO-3, shapes without memory"
    yield (
        f"{model}, {kind}: bfloat16, micro-batch 1, {tokens} tokens, checkpointed, "
        f"all projections, rank {rank}"
    )
    learned = "all" if response is None else response
    yield f"{learned} tokens with a loss; GiB on the device (ratio to training)"
    yield f"{'ranks':>5} {'idle':>7}" + "".join(f"{phase:>17}" for phase in PHASES) + f"{'host':>8}"
    for world_size in [1] if real else ranks:
        found = {phase: measure_apart(model, world_size, phase, response) for phase in PHASES}
        step = found["training"]["peak"]
        cells = "".join(f"{f['peak'] / GIB:>9.3f} ({f['peak'] / step:5.3f})" for f in found.values())
        above = [phase for phase in ("probe", "SVDs", "search") if found[phase]["peak"] > step]
        verdict = f"above training: {', '.join(above)}" if above else "nothing above training"
        idle, host = found["training"]["idle"] / GIB, found["probe"]["host"] / GIB
        yield f"{world_size:>5} {idle:>7.3f}{cells}{host:>8.3f}  {verdict}"
        if real:
            yield f"{'process':>13}" + "".join(f"{f['process'] / GIB:>9.3f}{'':8}" for f in found.values())
        expected = planned(model, world_size)
        errors = {phase: expected[phase] / found[phase]["peak"] - 1 for phase in found if phase in expected}
        cells = "".join(f"{expected[phase] / GIB:>9.3f} ({error:+.1%})" for phase, error in errors.items())
        yield f"{'planned':>13}{cells}"
        if explain:
            for phase, figures in found.items():
                yield f"    at the peak of {phase}:"
                yield from (
                    f"    {size / GIB:10.3f} GiB  {count:>5} x {what}"
                    for what, count, size in figures["largest"]
                )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=(*MODELS, "all"), default="all")
    parser.add_argument("--ranks", default="1,2,8", help="world sizes for the shapes without memory")
    parser.add_argument("--response", type=int, help="tokens that have a loss; default: all but the first")
    parser.add_argument("--explain", action="store_true", help="list the largest tensors at each peak")
    options = parser.parse_args()
    ranks = [int(world_size) for world_size in options.ranks.split(",")]
    began = time.perf_counter()
    for model in MODELS if options.model == "all" else [options.model]:
        for line in table(model, ranks, options.response, options.explain):
            print(line, flush=True)
        print()
    print(f"{time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
