"""Putting a method on a model, by its name and settings."""

import logging
import os
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from pydantic import ValidationError
from torch import nn

from distlora.adapter.attach import attach as attach_method
from distlora.adapter.targets import ALL_LINEAR, Targets
from distlora.adapter.whole import trained_whole
from distlora.api.adapted import Adapted
from distlora.errors import UserError
from distlora.exports.starting import start_from
from distlora.methods import Method, registry
from distlora.sentences import nearest

log = logging.getLogger(__name__)


def attach(
    model: nn.Module,
    method: str | Method,
    *,
    targets: str | Iterable[str] | Mapping[str, Any] | Targets | None = None,
    also_train: Collection[str] = (),
    start: str | os.PathLike[str] | None = None,
    **settings: Any,
) -> Adapted:
    """Puts a method on the linear layers of `model`, in place. Afterwards exactly its factors are trained.

    method: a name that the command `distlora methods` lists, with its settings as keywords (`rank`, `alpha`,
    `init={…}`), or an instance. targets: as in a recipe: "all-linear" (every linear layer that is wide
    enough, but output embeddings), names, last parts of names (`q_proj`) and patterns, one or a list, or a
    mapping `{"include": …, "exclude": […], "layers": "10-20"}`; by default "all-linear".
    also_train: names of parameters that are trained whole, such as a new head's; their layers are no targets.
    So are the parameters of the modules in the method's `modules_to_save`.
    start: for lora, rslora and dora, the directory of a LoRA in PEFT's files, whose factors `initialise`
    takes over; rank, alpha and targets are the adapter's, and must be the same where they are given.
    The model may be partitioned by `deepspeed.zero.Init` already. Call it before `deepspeed.initialize` and
    before an optimizer is made.
    """
    if start is not None:
        settings["from"] = os.fspath(start)
    chosen = _method(method, settings)
    whole = trained_whole(model, chosen.modules_to_save)
    if whole:
        also_train = {*also_train, *whole}
    begin = start_from(chosen)
    if begin is not None:
        chosen = begin.fitted(chosen)
        begin.check_model(model, getattr(getattr(model, "config", None), "name_or_path", "") or "this model")
        targets = begin.layers if targets is None else targets
        begin.check_heads(also_train)
    attached = attach_method(model, chosen, ALL_LINEAR if targets is None else targets, also_train)
    if begin is not None:
        begin.check_layers(attached.layers)
    for line in attached.remarks:
        log.info("%s", line)
    return Adapted(model, attached, begin)


def _method(method: str | Method, settings: dict[str, Any]) -> Method:
    if isinstance(method, Method):
        if settings:
            raise UserError(
                f"{', '.join(settings)}: settings belong to the name of a method, not to an instance"
            )
        return method
    known = registry()
    if method not in known:
        hint = nearest(str(method), known)
        raise UserError(f"no method is called {method}{hint} (methods: {', '.join(known)})")
    try:
        return known[method](**settings)
    except ValidationError as error:
        raise UserError(f"method {method}: {_mistake(error, known[method])}") from None


def _mistake(error: ValidationError, cls: type[Method]) -> str:
    first = error.errors(include_url=False)[0]
    place = ".".join(map(str, first["loc"]))
    if first["type"] == "extra_forbidden":
        hint = nearest(place, cls.model_fields) or f"; known: {', '.join(cls.model_fields)}"
        return f"{place} is no setting of it{hint}"
    text = str(first["ctx"]["error"]) if first["type"] == "value_error" else first["msg"]
    return f"{place}: {text}" if place else text
