"""Any method in TRL's `SFTTrainer`: see `distlora.integrations.transformers`."""

from trl import SFTTrainer

from distlora.integrations.transformers import AdapterMixin


class AdapterSFTTrainer(AdapterMixin, SFTTrainer):
    """TRL's `SFTTrainer` for an adapted model; its configuration is an `SFTConfig`."""


__all__ = ["AdapterSFTTrainer"]
