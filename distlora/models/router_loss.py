"""The load-balancing loss of a mixture of experts, where the model's config asks for it.

transformers' classes add it to their own loss if `output_router_logits` is set: `router_aux_loss_coef` times
a number that is least where all experts are used alike. It is computed by the class's own function.
"""

import sys
from weakref import WeakKeyDictionary

from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

#: By model, the sum over the passes since it was last asked for, each pass weighted by its targets, and the
#: number of these.
_seen: WeakKeyDictionary[PreTrainedModel, tuple[float, int]] = WeakKeyDictionary()
#: Names of the number of experts, in a class or in its config.
EXPERTS = ("num_experts", "num_local_experts", "moe_num_experts", "n_routed_experts")


def wants_router_loss(model: PreTrainedModel) -> bool:
    """Whether the class adds such a loss to its own, as the model is configured."""
    config = model.config.get_text_config(decoder=True)
    return bool(
        getattr(config, "output_router_logits", False)
        and getattr(config, "router_aux_loss_coef", None) is not None
        and hasattr(sys.modules[type(model).__module__], "load_balancing_loss_func")
    )


def router_loss(model: PreTrainedModel, outputs: ModelOutput, mask: Tensor | None) -> Tensor | None:
    """The loss of one pass, a scalar, before it is multiplied by its coefficient; None where the class has
    none, and outside of training. outputs: of the model or of its base model. mask: of the tokens, (batch,
    length).
    """
    if not (model.training and wants_router_loss(model)):
        return None
    if getattr(outputs, "aux_loss", None) is not None:
        return outputs.aux_loss
    logits = getattr(outputs, "router_logits", None)
    if logits is None:
        return None
    function = sys.modules[type(model).__module__].load_balancing_loss_func
    return function(logits, _number(model, *EXPERTS), _number(model, "num_experts_per_tok"), mask)


def with_router_loss(model: PreTrainedModel, loss: Tensor, found: Tensor | None, targets: int) -> Tensor:
    """The sum of a pass's losses over so many targets, with what the router adds to it: its mean over the
    targets is the loss of the class's own forward pass. found: what `router_loss` gave.
    """
    if found is None:
        return loss
    total, count = _seen.get(model, (0.0, 0))
    _seen[model] = total + float(found.detach()) * targets, count + targets
    coefficient = _number(model, "router_aux_loss_coef")
    return loss + coefficient * found.to(loss.device, loss.dtype) * targets


def take_router_loss(model: PreTrainedModel) -> tuple[float, int]:
    """The sum since this was last called, each pass weighted by its targets, and the number of these."""
    return _seen.pop(model, (0.0, 0))


def _number(model: PreTrainedModel, *names: str) -> float:
    """The first of these that the class has taken from its config, or the config has."""
    places = (model, model.config.get_text_config(decoder=True))
    return next(getattr(place, name) for place in places for name in names if hasattr(place, name))
