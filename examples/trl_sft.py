"""TRL's SFTTrainer with SRLoRA: plain, or under DeepSpeed at any ZeRO stage on any number of ranks.

    python examples/trl_sft.py MODEL ROWS.jsonl OUT
    deepspeed --num_gpus 2 examples/trl_sft.py MODEL ROWS.jsonl OUT --deepspeed ZERO.json

ROWS.jsonl has "prompt" and "completion". PEFT loads OUT/adapter.
"""

import argparse

import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig

import distlora
from distlora.integrations.trl import AdapterSFTTrainer

parser = argparse.ArgumentParser()
for word in ("model", "rows", "out"):
    parser.add_argument(word)
parser.add_argument("--deepspeed")
parser.add_argument("--steps", type=int, default=100)
parser.add_argument("--lr", type=float, default=1e-3)
parser.add_argument("--local_rank", type=int)  # of DeepSpeed's launcher
options = parser.parse_args()

args = SFTConfig(  # before the model: with deepspeed= every rank then loads its own part at stage 3
    output_dir=options.out,
    deepspeed=options.deepspeed,
    max_steps=options.steps,
    learning_rate=options.lr,
    per_device_train_batch_size=2,
    logging_steps=1,
    save_steps=50,
    use_cpu=not torch.cuda.is_available(),
    bf16=torch.cuda.is_available(),
)
model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32, trust_remote_code=False)
adapted = distlora.attach(model, "srlora", rank=4, target_rank=8)
trainer = AdapterSFTTrainer(
    args=args,
    train_dataset=load_dataset("json", data_files=options.rows, split="train"),
    processing_class=AutoTokenizer.from_pretrained(options.model, trust_remote_code=False),
    adapted=adapted,
)
trainer.train()
trainer.save_model(f"{options.out}/adapter")
trainer.save_state()
