"""What a class of language models makes of its base model's result: which linear layer gives its logits, and
how they are scaled and capped. Asked of the class itself, in a pass without weights.
"""

import inspect
import logging
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import PreTrainedModel

from distlora.maths.known_values import KnownValues, known_values
from distlora.models.dry_run import (
    asked_once,
    bare_copy,
    ordinary_text,
    text_inputs,
)

#: Tokens of the text that is passed through.
TOKENS = 4
#: Numbers that stand for logits lie between plus and minus this, where caps show.
LARGEST_LOGIT = 40.0
#: Relative differences of what is rounded on the way, by the dtype of a pass: exact; and one that all kernels
#: know.
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 0.01}

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Output:
    """The logits are c·tanh(s·z/c), or s·z without a cap, with z = the output layer of the hidden states.

    base: name of the module that gives the hidden states.
    """

    base: str
    scale: float = 1.0
    softcap: float | None = None


_known: WeakKeyDictionary[PreTrainedModel, Output | None] = WeakKeyDictionary()


def output_of(model: PreTrainedModel) -> Output | None:
    """How the model's logits follow from hidden states, given only token ids and mask; None where they do so
    in another way, or this cannot be seen without weights: then only the class itself gives them. Found once
    for each model, with a line in the log.
    """
    if model not in _known:
        found = _found(model)
        _known[model] = found.output
        _tell(type(model).__name__, found)
    return _known[model]


@dataclass(frozen=True)
class _Found:
    """seen: whether the class could be run without weights."""

    output: Output | None
    seen: bool


def _tell(name: str, found: _Found) -> None:
    if found.output is None:
        if found.seen:
            why = f"{name} makes its logits in a way of its own"
        else:
            why = f"how {name} makes its logits could not be seen without weights"
        log.info("%s: the loss is taken of the logits of all tokens, which are in memory at once", why)
    elif found.output.scale != 1:
        log.info("%s multiplies its logits by %.6g; so does the loss", name, found.output.scale)


@asked_once
def _found(model: PreTrainedModel) -> _Found:
    for dtype in ROUNDING:
        with known_values() as mode:
            try:
                return _Found(_seen(mode, bare_copy(mode, model, dtype), ROUNDING[dtype]), True)
            except Exception as error:  # whatever it is, the class's own logits are right
                log.debug("%s without weights, in %s: %r", type(model).__name__, dtype, error)
    return _Found(None, False)


def _seen(mode: KnownValues, model: PreTrainedModel, rounding: float) -> Output | None:
    passed = _pass(mode, model)
    if passed is None:
        return None
    cap = getattr(model.config.get_text_config(decoder=True), "final_logit_softcapping", None)
    before = _scale(passed.hidden, passed.layer_input, rounding)
    made, logits = passed.layer_output, passed.logits
    if (
        cap is not None
        and _is_close(logits, _capped(made, cap), rounding)
        and not _is_close(logits, made, rounding)
    ):
        after = 1.0
    else:
        after, cap = _scale(made, logits, rounding), None
    if before is None or after is None or (before * after != 1 and passed.has_bias):
        return None
    return Output(passed.base, before * after, cap)


@dataclass
class _Passed:
    """Values on the way: of the hidden states, of what the output layer is given and gives, and of the
    logits.
    """

    base: str
    hidden: Tensor
    layer_input: Tensor | None
    layer_output: Tensor
    logits: Tensor | None
    has_bias: bool


def _pass(mode: KnownValues, model: PreTrainedModel) -> _Passed | None:
    """A pass in which hidden states and the results of the output layer are replaced by known numbers. None
    if the two are not called in the way in which this project calls them.
    """
    layer, given = model.get_output_embeddings(), text_inputs(model, ordinary_text(model.config, TOKENS))
    inner = (*model.children(), model.base_model, model.get_decoder())
    kept = {id(module) for module in inner if isinstance(module, PreTrainedModel)} - {id(model)}
    bases = {name: module for name, module in model.named_modules() if id(module) in kept}
    if layer is None:
        return None
    calls, inputs, made = {}, [], {}

    def numbers(like: Tensor, largest: float) -> Tensor:
        return torch.linspace(-largest, largest, like.numel(), device="meta").reshape(like.shape)

    def after_base(name: str, args, named, result):
        made["hidden"] = numbers(result[0], 3.0)
        calls[name] = inspect.signature(bases[name].forward).bind(*args, **named).arguments
        if isinstance(result, tuple):
            return (made["hidden"], *result[1:])
        result["last_hidden_state"] = made["hidden"]
        return result

    def before_layer(module, args):
        inputs.append(args[0])
        return (args[0].to(module.weight.dtype),)

    def after_layer(module, args, result):
        made["logits"] = numbers(result, LARGEST_LOGIT)
        return made["logits"]

    for name, base in bases.items():
        base.register_forward_hook(
            lambda module, args, named, result, name=name: after_base(name, args, named, result),
            with_kwargs=True,
        )
    layer.register_forward_pre_hook(before_layer)
    layer.register_forward_hook(after_layer)
    logits = model(**given, use_cache=False).logits
    name = list(calls)[-1] if calls else None  # the outermost
    if name is None or len(inputs) != 1 or not _same(mode, calls[name], given):
        return None
    return _Passed(
        name, mode.value(made["hidden"]), mode.value(inputs[0]), mode.value(made["logits"]),
        mode.value(logits), getattr(layer, "bias", None) is not None,
    )  # fmt: skip


def _same(mode: KnownValues, call: dict, given: dict[str, Tensor]) -> bool:
    """Whether a call was given these tensors and no other ones."""
    flat = call | call.get("kwargs", {})
    tensors = {name: value for name, value in flat.items() if isinstance(value, Tensor)}
    if tensors.keys() != given.keys():
        return False
    pairs = [(mode.value(tensor), mode.value(given[name])) for name, tensor in tensors.items()]
    return all(left is not None and torch.equal(left, right) for left, right in pairs)


def _scale(before: Tensor, after: Tensor | None, rounding: float) -> float | None:
    """The number that all of `before` is multiplied by to give `after`; None if there is none."""
    if after is None or after.shape != before.shape:
        return None
    before, after = before.double(), after.double()
    scale = float((before * after).sum() / before.square().sum())
    if not _is_close(after, scale * before, rounding):
        return None
    return 1.0 if abs(scale - 1) < rounding / 10 else scale


def _is_close(left: Tensor | None, right: Tensor, rounding: float) -> bool:
    if left is None or left.shape != right.shape:
        return False
    return bool((left.double() - right.double()).abs().max() <= rounding * right.double().abs().max())


def _capped(logits: Tensor, cap: float) -> Tensor:
    return (logits.double() / cap).tanh() * cap
