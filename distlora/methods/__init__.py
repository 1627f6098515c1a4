"""Every method of the package, found by its file."""

import importlib
import pkgutil

from distlora.methods.contract import Factors, Init, Method, Recomposition

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")


def registry() -> dict[str, type[Method]]:
    """All methods by name, sorted."""
    found, pending = {}, [Method]
    while pending:
        for cls in pending.pop().__subclasses__():
            pending.append(cls)
            name = cls.model_fields["name"].default
            if isinstance(name, str):
                found[name] = cls
    return dict(sorted(found.items()))


__all__ = ["Factors", "Init", "Method", "Recomposition", "registry"]
