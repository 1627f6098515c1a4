"""A plain DeepSpeed script: LoRA-SB on a causal language model, at any ZeRO stage, on any number of ranks.

    deepspeed --num_gpus 2 examples/deepspeed_script.py MODEL ROWS.jsonl ZERO.json OUT

ROWS.jsonl has "prompt" and "response"; the micro-batch of ZERO.json is 1. PEFT loads OUT/adapter.
"""

import argparse
import itertools
import json

import deepspeed
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.integrations import HfDeepSpeedConfig

import distlora

parser = argparse.ArgumentParser()
for word in ("model", "rows", "config", "out"):
    parser.add_argument(word)
parser.add_argument("--steps", type=int, default=100)
parser.add_argument("--lr", type=float, default=1e-3)
parser.add_argument("--local_rank", type=int)  # of DeepSpeed's launcher
options = parser.parse_args()

deepspeed.init_distributed()
config = json.load(open(options.config))
zero3 = HfDeepSpeedConfig(config)  # while it lives, every rank loads its own part only at stage 3
tokenizer = AutoTokenizer.from_pretrained(options.model, trust_remote_code=False)
model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32, trust_remote_code=False)
adapted = distlora.attach(model, "lora_sb", rank=4, init={"eta": 0.01})
optimizer = torch.optim.AdamW(adapted.parameters(), options.lr, weight_decay=0.0)
engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)


def encode(line):  # as a batch of one; only the response has a loss
    row = json.loads(line)
    prompt = tokenizer(row["prompt"] + "\n").input_ids
    ids = prompt + tokenizer(row["response"], add_special_tokens=False).input_ids + [tokenizer.eos_token_id]
    batch = {"input_ids": [ids], "labels": [[-100] * len(prompt) + ids[len(prompt) :]]}
    return {key: torch.tensor(value, device=engine.device) for key, value in batch.items()}


rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
rows = [encode(line) for line in itertools.islice(open(options.rows), rank, None, world)]
distlora.initialise(adapted, engine, probe=rows[:2], loss=lambda model, batch: model(**batch).loss)
micro_steps = options.steps * engine.gradient_accumulation_steps()
for batch in itertools.islice(itertools.cycle(rows), micro_steps):
    loss = engine(**batch).loss
    engine.backward(loss)
    adapted.before_step()
    engine.step()
    adapted.after_step(loss)
    torch.distributed.all_reduce(mean := loss.detach() / world)
    if rank == 0:
        print(f"step {adapted.steps} loss {mean.item():.7f}", flush=True)
distlora.save(adapted, f"{options.out}/checkpoints")
distlora.export(adapted, f"{options.out}/adapter")
