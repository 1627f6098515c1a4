"""Extremely parameter-efficient fine-tuning of large models, native to DeepSpeed ZeRO."""

__version__ = "0.1.0"
