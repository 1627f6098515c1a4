"""Parameter groups of an optimizer that a trainer has made."""

import torch

from distlora.api import Adapted
from distlora.engine.protocol import left_factors
from distlora.errors import UserError


def add_left_factors(optimizer: torch.optim.Optimizer, adapted: Adapted, ratio: float) -> None:
    """Moves what LoRA+ calls B out of every group into one of its own, with `ratio` times the group's rate.

    Before the first step. Errors: UserError for an optimizer that DeepSpeed is going to make of its config.
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise UserError(
            "lora_plus_ratio needs an optimizer of the trainer: remove the optimizer section from the "
            "DeepSpeed config"
        )
    names = left_factors(adapted.layers)
    left = {id(p) for name, p in adapted.model.named_parameters() if name in names}
    for group in list(optimizer.param_groups):
        own = [parameter for parameter in group["params"] if id(parameter) in left]
        if own:
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in left]
            settings = {key: value for key, value in group.items() if key != "params"}
            optimizer.add_param_group(settings | {"params": own, "lr": ratio * group["lr"]})
