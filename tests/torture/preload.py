"""What every rank would import: done once, before the ranks are forked."""

import deepspeed
import torch
import transformers.models.llama.modeling_llama

import distlora.training.train
from distlora.cli import main

torch.set_num_threads(1)

__all__ = ["deepspeed", "distlora", "main", "transformers"]
