"""Extremely parameter-efficient fine-tuning of large models, native to DeepSpeed ZeRO.

What is named in `__all__` is the public API, see `distlora.api`; all else may change. It is loaded when it is
first used: `import distlora` costs no torch.
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

__all__ = [
    "Adapted",
    "Probe",
    "TrainingError",
    "UserError",
    "attach",
    "export",
    "initialise",
    "load",
    "save",
]

if TYPE_CHECKING:
    from distlora.api import Adapted, Probe, attach, export, initialise, load, save
    from distlora.errors import TrainingError, UserError

_ERRORS = ("TrainingError", "UserError")


def __getattr__(name: str) -> Any:
    """Public names and folders, imported at their first use (PEP 562)."""
    import importlib

    if name in _ERRORS:
        value = getattr(importlib.import_module("distlora.errors"), name)
    elif name in __all__:
        value = getattr(importlib.import_module("distlora.api"), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
