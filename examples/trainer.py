"""transformers' Trainer with LoRA-SB: plain, or under DeepSpeed at any ZeRO stage on any number of ranks.

    python examples/trainer.py MODEL ROWS.jsonl OUT
    deepspeed --num_gpus 2 examples/trainer.py MODEL ROWS.jsonl OUT --deepspeed ZERO.json

ROWS.jsonl has "prompt" and "response". --resume goes on from the last checkpoint. PEFT loads OUT/adapter.
"""

import argparse
import json

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, TrainingArguments

import distlora
from distlora.integrations.transformers import AdapterTrainer

parser = argparse.ArgumentParser()
for word in ("model", "rows", "out"):
    parser.add_argument(word)
parser.add_argument("--deepspeed")
parser.add_argument("--steps", type=int, default=100)
parser.add_argument("--lr", type=float, default=1e-3)
parser.add_argument("--accumulation", type=int, default=1)
parser.add_argument("--resume", action="store_true")
parser.add_argument("--local_rank", type=int)  # of DeepSpeed's launcher
options = parser.parse_args()

args = TrainingArguments(  # before the model: with deepspeed= every rank then loads its own part at stage 3
    output_dir=options.out,
    deepspeed=options.deepspeed,
    max_steps=options.steps,
    learning_rate=options.lr,
    per_device_train_batch_size=1,
    gradient_accumulation_steps=options.accumulation,
    logging_steps=1,
    save_steps=50,
    use_cpu=not torch.cuda.is_available(),
)
tokenizer = AutoTokenizer.from_pretrained(options.model, trust_remote_code=False)
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32, trust_remote_code=False)
adapted = distlora.attach(model, "lora_sb", rank=4, init={"eta": 0.01})


def encode(line):  # only the response has a loss
    row = json.loads(line)
    prompt = tokenizer(row["prompt"] + "\n").input_ids
    ids = prompt + tokenizer(row["response"], add_special_tokens=False).input_ids + [tokenizer.eos_token_id]
    return {"input_ids": ids, "labels": [-100] * len(prompt) + ids[len(prompt) :]}


rows = [encode(line) for line in open(options.rows)]
trainer = AdapterTrainer(
    args=args, train_dataset=rows, data_collator=DataCollatorForSeq2Seq(tokenizer), adapted=adapted
)
trainer.train(resume_from_checkpoint=options.resume)
trainer.save_model(f"{options.out}/adapter")
trainer.save_state()
