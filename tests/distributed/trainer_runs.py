"""Runs of transformers' `Trainer` on the batches of a recipe: what every rank of these tests runs.

    python -m tests.distributed.trainer_runs PLAN.json OUT.json

Without ranks in the environment the same function is a plain run. The plan holds a list of cases, see `Case`;
rank 0 writes {key: losses of all steps}.
"""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import (
    AutoModelForCausalLM,
    DataCollatorForSeq2Seq,
    PreTrainedTokenizerFast,
    TrainingArguments,
)

import distlora
from distlora.integrations.transformers import AdapterTrainer

#: Of the recipe: samples of a step, and of a pass.
BATCH, MICRO, RATE, SEED = 4, 2, 0.02, 3


@dataclass(frozen=True)
class Case:
    """stage: of ZeRO; None for plain PyTorch. resume: whether the run ends after half of its steps, and a new
    trainer goes on from its checkpoint. early: whether the model is loaded before the `TrainingArguments` are
    made. more: other `TrainingArguments`.
    """

    method: str
    settings: dict[str, Any] = field(default_factory=dict)
    stage: int | None = None
    resume: bool = False
    early: bool = False
    clip: float = 0.5
    more: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        words = ("resumed" * self.resume, "early" * self.early, *self.more)
        return "-".join(filter(None, (self.method, str(self.stage), *words)))


def arguments(case: Case, out: Path, steps: int, world: int) -> TrainingArguments:
    zero = None
    if case.stage is not None:
        zero = {
            "zero_optimization": {"stage": case.stage, "memory_efficient_linear": False},
            "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto",
            "gradient_clipping": "auto",
            "bf16": {"enabled": "auto"},
        }  # fmt: skip
    usual = dict(
        output_dir=str(out), use_cpu=True, deepspeed=zero, max_steps=steps, learning_rate=RATE, seed=SEED,
        per_device_train_batch_size=MICRO, gradient_accumulation_steps=BATCH // (MICRO * world),
        lr_scheduler_type="constant", max_grad_norm=case.clip, logging_steps=1, save_steps=steps // 2,
        train_sampling_strategy="sequential", report_to=[], disable_tqdm=True, save_only_model=False,
    )  # fmt: skip
    return TrainingArguments(**(usual | case.more))


def trainer_of(case: Case, model_dir: Path, rows: list[dict], out: Path, world: int = 1) -> AdapterTrainer:
    """rows: in the order of the steps."""
    early = AutoModelForCausalLM.from_pretrained(model_dir) if case.early else None
    args = arguments(case, out, len(rows) // BATCH, world)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model_dir)
    tokenizer.pad_token = tokenizer.eos_token
    model = early or AutoModelForCausalLM.from_pretrained(model_dir)
    adapted = distlora.attach(model, case.method, **case.settings)
    return AdapterTrainer(
        args=args, train_dataset=rows, data_collator=DataCollatorForSeq2Seq(tokenizer),
        processing_class=tokenizer, adapted=adapted,
    )  # fmt: skip


def losses(case: Case, model_dir: Path, rows: list[dict], out: Path, world: int = 1) -> list[float]:
    """Of every step; where the case resumes, those after the checkpoint come from another trainer."""
    trainer = trainer_of(case, model_dir, rows, out, world)
    trainer.train()
    found = {line["step"]: line["loss"] for line in trainer.state.log_history if "loss" in line}
    if case.resume:
        half = len(rows) // BATCH // 2
        found = {step: loss for step, loss in found.items() if step <= half}
        trainer = trainer_of(case, model_dir, rows, out, world)
        trainer.train(resume_from_checkpoint=str(out / f"checkpoint-{half}"))
        later = {line["step"]: line["loss"] for line in trainer.state.log_history if "loss" in line}
        found |= {step: loss for step, loss in later.items() if step > half}
    trainer.save_model(str(out / "adapter"))
    return [found[step] for step in sorted(found)]


def main(plan: str, out: str) -> None:
    import torch

    content, folder = json.loads(Path(plan).read_text()), Path(out).parent
    found: dict[str, Any] = {}
    for number, fields in enumerate(content["cases"]):
        case = Case(**fields)
        try:
            place = folder / f"case-{number}"
            found[case.key] = losses(case, Path(content["model"]), content["rows"], place, world=2)
        except Exception as error:  # rank 0's is as good as another's: all ranks do the same
            found[case.key] = f"{type(error).__name__}: {error}"
    if torch.distributed.get_rank() == 0:
        Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
