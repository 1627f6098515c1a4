"""How fast questions are answered, beside transformers' own `generate` over the merged model.

    python -m tests.benchmarks.generation [--questions 32] [--tokens 64] [--batch 16] [--rounds 2]
        [--dtype bfloat16|float32] [--stage 3 --ranks 2] [--data FOLDER]

SmolLM2-135M-Instruct with a LoRA of rank 16 on all linear layers, on questions of GSM8K (a folder with
test.jsonl; without one, arithmetic problems). "plain" is a loop over batches of the same size, in the order
of the file, of a plain model with the merged weights. Both answer in turn, `rounds` times, so that whatever
else the machine does weighs on both; the ratio of the samples a second is that of the sums.

    merged, beside   with --merge, and with the adapter beside the weights
    ranks            ours on so many ranks of ZeRO at this stage, each with a share of the threads, together;
                     plain on one process with all of them
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from distlora.adapter.attach import ALL_LINEAR, attach
from distlora.cluster.topology import topology_from_environment
from distlora.data import Questions, load_questions
from distlora.engine.comm import Comm, Topology
from distlora.engine.local import LocalEngine
from distlora.engine.optimizers import OptimizerSpec
from distlora.engine.protocol import Engine
from distlora.evaluation.answering import Generation
from distlora.evaluation.scoring import answer_questions, ready_to_answer
from distlora.methods import registry
from distlora.models.generation import end_tokens
from distlora.models.loading import load_model, load_tokenizer
from distlora.recipe.sections import DataSection, ModelSection
from tests.benchmarks.subjects import REAL_PATH

ROOT = Path(__file__).resolve().parents[2]
THREADS = 2


def subject(engine: Engine, section: ModelSection) -> None:
    """A LoRA whose factors are not zero, and change few answers."""
    with engine.loading():
        model, _ = load_model(section)
    with engine.attaching():
        attached = attach(model, registry()["lora"](rank=16), ALL_LINEAR)
    engine.start(model, OptimizerSpec())
    generator = torch.Generator().manual_seed(0)
    for layer in attached.layers.values():
        shapes = layer.method.shapes(*layer.shape)
        engine.write(
            layer, {name: torch.randn(shape, generator=generator) * 1e-3 for name, shape in shapes.items()}
        )


def asked(options: argparse.Namespace, tokenizer) -> Questions:
    task = "gsm8k" if options.data else "arithmetic"
    section = DataSection(task=task, path=options.data, max_length=512)
    return load_questions(section, f"test[:{options.questions}]", tokenizer)


def ours(engine: Engine, tokenizer, questions: Questions, options: argparse.Namespace, fold: bool) -> float:
    """Seconds to answer all questions, gathering included."""
    found: list[dict] = []
    way = Generation(engine, tokenizer, "gsm8k", questions, options.tokens)
    began = time.perf_counter()
    with ready_to_answer(engine, fold) as agree:
        answer_questions(way, range(len(questions.items)), agree, found.extend, options.batch)
    assert len(found) == len(questions.items)
    return time.perf_counter() - began


@torch.no_grad()
def plain_model(merged: LocalEngine, section: ModelSection):
    """Of the class in transformers, with the weights that the layers were folded into."""
    model, _ = load_model(section)
    for name, layer in merged.layers.items():
        model.get_submodule(name).weight.copy_(layer.weight)
    return model.eval()


@torch.no_grad()
def plain(model, tokenizer, questions: Questions, options: argparse.Namespace) -> float:
    """The same by `generate`."""
    began, ends = time.perf_counter(), sorted(end_tokens(model, tokenizer))
    for start in range(0, len(questions.items), options.batch):
        prompts = [item.prompt_ids for item in questions.items[start : start + options.batch]]
        batch = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt")
        answers = model.generate(
            **batch, max_new_tokens=options.tokens, do_sample=False, eos_token_id=ends,
            pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        tokenizer.batch_decode(answers[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return time.perf_counter() - began


def on_ranks(options: argparse.Namespace) -> float:
    """The seconds of rank 0, of ranks that are started for it."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = str(listener.getsockname()[1])
    with tempfile.NamedTemporaryFile("r", suffix=".json") as answer:
        words = [sys.executable, "-m", "tests.benchmarks.generation", *sys.argv[1:], "--worker", answer.name]
        ranks = [
            subprocess.Popen(
                words, cwd=ROOT, stdout=subprocess.DEVNULL,
                env=os.environ | {
                    "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(options.ranks),
                    "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "DS_ACCELERATOR": "cpu",
                },
            )
            for rank in range(options.ranks)
        ]  # fmt: skip
        if any([process.wait() for process in ranks]):
            raise SystemExit("a rank failed")
        return json.loads(answer.read())


def worker(options: argparse.Namespace, section: ModelSection) -> None:
    from distlora.engine.zero.engine import ZeroEngine
    from tests.distributed.world import deepspeed_config

    torch.set_num_threads(max(1, THREADS // options.ranks))
    comm = Comm(topology_from_environment(), torch.device("cpu"))
    config = deepspeed_config(options.stage, options.ranks, 1, 1, options.dtype)
    engine, tokenizer = ZeroEngine(comm, config), load_tokenizer(section)
    subject(engine, section)
    seconds = ours(engine, tokenizer, asked(options, tokenizer), options, fold=True)
    if comm.is_main:
        Path(options.worker).write_text(json.dumps(seconds))
    comm.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--questions", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--stage", type=int, default=3)
    parser.add_argument("--ranks", type=int, default=0, help="of ZeRO; 0: one process of plain PyTorch")
    parser.add_argument("--data", help="a folder with test.jsonl of GSM8K")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    section = ModelSection(path=REAL_PATH, dtype=options.dtype, gradient_checkpointing=False)
    if options.worker:
        return worker(options, section)
    torch.set_num_threads(THREADS)
    tokenizer = load_tokenizer(section)
    questions = asked(options, tokenizer)
    comm = Comm(Topology(), torch.device("cpu"), distributed=False)
    merged, beside = (LocalEngine(comm, getattr(torch, options.dtype)) for _ in range(2))
    subject(beside, section)
    subject(merged, section)
    kinds = {f"{options.ranks} ranks, stage {options.stage}": lambda: on_ranks(options)}
    if not options.ranks:
        kinds = {
            "merged": lambda: ours(merged, tokenizer, questions, options, fold=False),
            "beside": lambda: ours(beside, tokenizer, questions, options, fold=False),
        }
    with ready_to_answer(merged, fold=True):
        model = plain_model(merged, section)
        seconds = dict.fromkeys(("plain", *kinds), 0.0)
        for _ in range(options.rounds):
            seconds["plain"] += plain(model, tokenizer, questions, options)
            for name, run in kinds.items():
                seconds[name] += run()
    print(
        f"smollm2, {options.dtype}, {options.questions} questions, {options.tokens} tokens, "
        f"batch {options.batch}"
    )
    for name, total in seconds.items():
        speed = options.rounds * options.questions / total
        print(f"  {name:<20}{speed:8.3f} samples/s, {seconds['plain'] / total:.2f} times plain", flush=True)
    return None


if __name__ == "__main__":
    main()
