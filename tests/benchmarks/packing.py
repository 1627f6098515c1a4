"""Tokens a second with one sample a row, with samples of like length together, and with packed rows.

    python -m tests.benchmarks.packing [--samples 64] [--micro 4] [--rounds 2] [--width 512] [--layers 1]

Steps of a LoRA of rank 16 on all linear layers of a random Llama, in float32 on this machine's cores. All
three train the same samples in turn, step by step, so that whatever else the machine does weighs on all; the
printed ratio is that of the sums. The lengths are drawn like those of MetaMath's samples, cut to 512 tokens:
three of five as those made from GSM8K, with a median of 190, the others as those made from MATH, longer and
more uneven. A third of a sample is its prompt, which has no loss.
"""

import argparse
import os
import time

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from distlora.adapter.attach import ALL_LINEAR, attach
from distlora.data import Arrangement, Sample, by_length, collate, in_a_row, one_by_one, packed
from distlora.engine.comm import Comm, Topology
from distlora.engine.local import LocalEngine
from distlora.engine.optimizers import OptimizerSpec
from distlora.methods import registry
from distlora.models.losses import response_loss
from distlora.models.targets import IGNORE
from tests.stepping import train_step

VOCABULARY, LONGEST, RATE = 4096, 512, 1e-3


def lengths(count: int, generator: np.random.Generator) -> list[int]:
    """Tokens of MetaMath-like samples."""
    short = 190 * np.exp(0.4 * generator.standard_normal(count))
    long = 250 * np.exp(0.65 * generator.standard_normal(count))
    drawn = np.where(generator.random(count) < 0.6, short, long)
    return np.clip(drawn, 40, LONGEST).astype(int).tolist()


def samples(count: int, generator: np.random.Generator) -> list[Sample]:
    found = []
    for length in lengths(count, generator):
        ids = generator.integers(5, VOCABULARY, length).tolist()
        found.append(Sample(ids, [IGNORE] * (length // 3) + ids[length // 3 :], []))
    return found


def engine_of(width: int, layers: int) -> LocalEngine:
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=width, intermediate_size=8 * width // 3, num_hidden_layers=layers,
        num_attention_heads=width // 64, num_key_value_heads=width // 64, attn_implementation="sdpa",
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    attach(model, registry()["lora"](rank=16), ALL_LINEAR)
    engine = LocalEngine(Comm(Topology(), torch.device("cpu"), distributed=False), clip=1.0)
    engine.start(model, OptimizerSpec(lr=RATE))
    engine.train_mode(True)
    return engine


def step(engine: LocalEngine, taken: list[Sample], arrangement: Arrangement, packs: bool) -> float:
    """Seconds of one step, the making of its batches included."""
    began = time.perf_counter()
    rows = [[[taken[place] for place in row] for row in part] for part in arrangement.ranks[0]]
    batches = [collate([in_a_row(row) if packs else row[0] for row in part], 0) for part in rows]
    train_step(engine, batches, response_loss, RATE)
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=64, help="of a step")
    parser.add_argument("--micro", type=int, default=4, help="samples or rows of a micro-batch")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(os.cpu_count() or 1)
    engine, generator = engine_of(options.width, options.layers), np.random.default_rng(0)
    passes = -(-options.samples // options.micro)
    ways = {
        "one by one": lambda sizes: one_by_one(len(sizes), 1, options.micro, passes),
        "group_by_length": lambda sizes: by_length(sizes, 1, options.micro),
        "packing": lambda sizes: packed(sizes, LONGEST, 1, options.micro),
    }
    seconds, padding = dict.fromkeys(ways, 0.0), dict.fromkeys(ways, 0.0)
    tokens = 0
    step(
        engine, samples(options.micro, generator), one_by_one(options.micro, 1, options.micro, 1), packs=False
    )
    for _ in range(options.rounds):
        taken = samples(options.samples, generator)
        sizes = [len(sample.input_ids) for sample in taken]
        tokens += sum(sizes)
        for name, arranged in ways.items():
            arrangement = arranged(sizes)
            seconds[name] += step(engine, taken, arrangement, packs=name == "packing")
            padding[name] += arrangement.padding(sizes) / options.rounds
    print(
        f"random Llama, width {options.width}, layers {options.layers}, float32, {os.cpu_count()} CPU cores; "
        f"{options.samples} samples and {tokens / options.rounds:.0f} tokens a step, "
        f"micro-batch {options.micro}"
    )
    for name, total in seconds.items():
        print(
            f"  {name:<16}{tokens / total:8.0f} tokens/s   {padding[name]:6.1%} padding   "
            f"{seconds['one by one'] / total:.2f} times one by one"
        )


if __name__ == "__main__":
    main()
