"""Modules that are trained whole beside the adapter."""

from collections.abc import Collection

from torch import nn

from distlora.adapter.targets import is_named
from distlora.errors import UserError
from distlora.sentences import nearest


def trained_whole(model: nn.Module, modules: Collection[str]) -> set[str]:
    """Names of the parameters of these modules, `Method.modules_to_save`; each is a name, or the last part of
    names. A parameter that modules share is trained in all of them. Raises UserError for a module that the
    model does not have, and for one without parameters.
    """
    known = [name for name, _ in model.named_modules() if name]
    chosen = set[int]()
    for module in modules:
        meant = [name for name in known if is_named(name, module)]
        if not meant:
            last_parts = dict.fromkeys(name.rsplit(".", 1)[-1] for name in known)
            hint = nearest(module, [*last_parts, *known]) or "; give a name such as embed_tokens"
            raise UserError(f"method.modules_to_save: {type(model).__name__} has no module {module}{hint}")
        found = [parameter for name in meant for parameter in model.get_submodule(name).parameters()]
        if not found:
            raise UserError(f"method.modules_to_save: {module} has no parameters to train; leave it out")
        chosen |= set(map(id, found))
    return {name for name, parameter in model.named_parameters() if id(parameter) in chosen}
