"""Any method in transformers' `Trainer` and its subclasses, plain or with `deepspeed=` at ZeRO stage 0 to 3.

    args = TrainingArguments(…)                                   # first, if it has deepspeed=
    model = AutoModelForCausalLM.from_pretrained(…)
    adapted = distlora.attach(model, "lora_sb", rank=32)
    trainer = AdapterTrainer(args=args, train_dataset=rows, adapted=adapted)
    trainer.train()
    trainer.save_model("adapter")                                 # in PEFT's format

For another trainer: `class MyTrainer(AdapterMixin, TheirTrainer)`; TRL's is in `distlora.integrations.trl`.

Where our work goes. The factors are made once accelerate has prepared model and optimizer. Gradients are
looked at and transformed between the backward pass and clipping. There the Trainer calls no callback, and
under DeepSpeed accelerate's `backward` makes the engine's step at once, so that belongs into `training_step`,
and into the wrapper through which accelerate drives the engine.

What the Trainer does otherwise than `distlora train`:

- Loss. With `average_tokens_across_devices` (its default) and a model that takes `num_items_in_batch`, as
  transformers' language models do, it is the mean over all tokens of the global batch, as ours. Otherwise it
  is the mean of the micro-batches' means.
- Learning rate. `lr_scheduler_type` is linear by default, and the first step of its warm-up has the rate 0.
- Clipping. `max_grad_norm` is 1 by default. Under DeepSpeed the config's `gradient_clipping` alone counts
  ("auto" is `max_grad_norm`), so without it nothing is clipped. Where a method transforms gradients
  (LoRA-Pro), they are clipped by their norm of before, here as well, and `grad_norm` is that norm.
- Optimizer. `optim`, `weight_decay` and the betas are the Trainer's; AdamW, Adam and SGD will do. The decay
  is on all factors. LoRA+ is `lora_plus_ratio=`.
- Precision. In plain PyTorch a model that was loaded in bfloat16 has no float32 masters: load it in float32,
  with `bf16=True` if wanted.
"""

import copy
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer

from distlora import api
from distlora.engine.protocol import transforming
from distlora.errors import UserError
from distlora.integrations.checkpoints import STATE, Schedule, refuse_no_state, save_adapter
from distlora.integrations.mistakes import (
    refuse_arguments,
    refuse_model,
    refuse_other_ranks,
    refuse_surroundings,
)
from distlora.integrations.parameters import add_left_factors
from distlora.integrations.probes import probe_of_trainer
from distlora.integrations.steps import AfterStep, PausingEngine
from distlora.methods import TrainsWeight


class AdapterMixin:
    """Before a `Trainer` class among the bases of a class: its runs then train what `attach` has put on the
    model.

    adapted: of `distlora.attach`; `model` may be left out then. lora_plus_ratio: learning rate of B over that
    of everything else (LoRA+, arXiv 2402.12354). Everything else is the Trainer's. The probe of a method that
    starts from gradients are `samples` of the training set, drawn by `args.seed`, through the trainer's
    collator and `compute_loss`. In a pass of `micro_batch_size` samples all tokens count alike.

    A checkpoint holds the adapter in PEFT's format, and under `distlora` what `resume_from_checkpoint` needs,
    which any ZeRO stage and number of ranks will do for. Errors: UserError for what cannot be trained so.
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        args: Any = None,
        *others: Any,
        adapted: api.Adapted | None = None,
        lora_plus_ratio: float | None = None,
        **settings: Any,
    ):
        refuse_model(model, adapted, settings)
        if args is not None:
            refuse_arguments(args)
        self.adapted, self._lora_plus_ratio = adapted, lora_plus_ratio
        #: This rank's loss since the last step, and numbers that the next line of the log tells.
        self._loss_of_step: float | torch.Tensor = 0.0
        self._news: dict[str, float] = {}
        super().__init__(adapted.model, args, *others, **settings)
        refuse_surroundings(self, adapted)
        self._clip = self._take_over_clipping()
        self.add_callback(AfterStep(self._check_begun, self._after_step))

    # ------------------------------------------------------------------ the start

    def train(self, resume_from_checkpoint: str | bool | None = None, *others: Any, **settings: Any):
        """See `Trainer.train`. Errors: UserError for a checkpoint that cannot be gone on from, and in a
        second run of the same adapter.
        """
        self.adapted.refuse_second_start()
        if resume_from_checkpoint and not isinstance(resume_from_checkpoint, bool):
            refuse_no_state(resume_from_checkpoint)
        return super().train(resume_from_checkpoint, *others, **settings)

    def create_optimizer(self, *model: nn.Module):
        """See `Trainer.create_optimizer`; with the group of LoRA+."""
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(*model)
        if self._lora_plus_ratio is not None and is_new:
            add_left_factors(optimizer, self.adapted, self._lora_plus_ratio)
        return optimizer

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None
    ):
        # The checkpoint is ours, not one of the model's weights or of DeepSpeed's engine.
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        self._begin(max_steps, resume_from_checkpoint)
        return prepared

    def _begin(self, steps: int, checkpoint: str | None) -> None:
        """Gives the adapter its factors, of the start or of a checkpoint."""
        engine, schedule = None, Schedule(self.lr_scheduler, self.optimizer)
        if self.is_deepspeed_enabled:
            engine = self.deepspeed
            refuse_other_ranks(self.args, engine.dp_world_size)
            self.accelerator.deepspeed_engine_wrapped = PausingEngine(engine, self.adapted.before_step)
        told: dict[str, Any] = {
            "optimizer": None if engine is not None else self.optimizer.optimizer,
            "probe": lambda number: probe_of_trainer(self, number),
            "steps": steps,
            "first_rate": schedule.rate,
            "clip": self._clip,
            "clips_after": True,
            "seed": self.args.seed,
        }
        kept = copy.deepcopy(
            getattr(self, "_metrics", None)
        )  # TRL's trainers count every loss that they compute
        if checkpoint is None:
            report = api.initialise(self.adapted, engine, **told)
            self._news |= {f"init/{name}": value for name, value in report.scalars.items()}
        else:
            refuse_no_state(checkpoint)
            state = api.load(self.adapted, engine, Path(checkpoint) / STATE, **told)
            schedule.restore(state["extra"]["schedule"])
        if kept is not None:
            self._metrics = kept

    def _check_begun(self) -> None:
        """Errors: UserError where the base class has prepared its run in another way."""
        if not self.adapted.begun:
            raise UserError(
                "this trainer does not prepare its runs as transformers' Trainer does, so the adapter has no "
                "factors: write a loop of your own around distlora.initialise"
            )

    def _take_over_clipping(self) -> float | None:
        """The norm that our start is told, see `distlora.initialise`. DeepSpeed must not clip what a method
        has transformed and clipped."""
        if not self.is_deepspeed_enabled:
            return self.args.max_grad_norm or None
        if not transforming(self.adapted.layers):
            return None
        config = self.accelerator.state.deepspeed_plugin.deepspeed_config
        clip = config.get("gradient_clipping")
        config["gradient_clipping"] = 0.0
        return (self.args.max_grad_norm if clip == "auto" else clip) or None

    # ------------------------------------------------------------------ steps

    def training_step(self, *arguments: Any, **settings: Any) -> torch.Tensor:
        """See `Trainer.training_step`; with what belongs between the last backward pass and clipping."""
        loss = super().training_step(*arguments, **settings)
        self._loss_of_step = self._loss_of_step + loss
        if not self.is_deepspeed_enabled and self.accelerator.sync_gradients:
            self.adapted.before_step()
        return loss

    def _clip_grad_norm(self, model: nn.Module):
        before = self.adapted.norm_before_transform
        return super()._clip_grad_norm(model) if before is None else before

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None):
        before = self.adapted.norm_before_transform
        return super()._get_grad_norm(model, grad_norm=grad_norm) if before is None else before

    def _after_step(self) -> None:
        loss, self._loss_of_step = self._loss_of_step, 0.0
        decided = self.adapted.after_step(loss)
        if decided is not None:
            self._news |= decided.means()

    def log(self, logs: dict[str, float], *others: Any, **settings: Any) -> None:
        """See `Trainer.log`; with what the start or a recomposition has told since the last line."""
        news, self._news = self._news, {}
        super().log(logs | news, *others, **settings)

    # ------------------------------------------------------------------ files

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Writes the adapter in PEFT's format, and the tokenizer, into `output_dir`, which may hold other
        files; with method full the whole model. Collective.
        """
        if isinstance(self.adapted.method, TrainsWeight):
            super().save_model(output_dir, _internal_call)
            return
        if not self.adapted.begun:
            raise UserError("there is no adapter to save yet: call train first")
        out = Path(output_dir or self.args.output_dir)
        save_adapter(self.adapted, out)
        tokenizer = self.processing_class or getattr(self.data_collator, "tokenizer", None)
        if self.args.should_save and tokenizer is not None:
            tokenizer.save_pretrained(out)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        schedule = Schedule(self.lr_scheduler, self.optimizer)
        api.save(self.adapted, Path(output_dir) / STATE, extra={"schedule": schedule.state()}, keep=1)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Nothing: the model keeps its pretrained weights until `_begin`."""


class AdapterTrainer(AdapterMixin, Trainer):
    """transformers' `Trainer` for an adapted model."""


__all__ = ["AdapterMixin", "AdapterTrainer", "UserError"]
