"""Fine-tuning methods: one file each, in tensors alone. Of the package they know `maths` and `errors`.

contract        what every method answers
capabilities    what only some methods can do, and questions that any method answers
all other files one method each, found by its name; see `registry`

Other folders use the names below.
"""

import importlib
import pkgutil

from distlora.methods.capabilities import (
    CorrectsGradients,
    HasMagnitude,
    HoldsPretrained,
    NeedsProbe,
    ProbeSettings,
    Recomposes,
    Recomposition,
    StartsFromAdapter,
    TakesFromWeight,
    TrainsWeight,
    TransformsGradients,
    core_of,
    last_trained_factor,
    magnitude_of,
    probe_of,
    recomposing,
    start_of,
    writes_weight,
)
from distlora.methods.contract import Factors, Init, LayerInit, Method

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")


def registry() -> dict[str, type[Method]]:
    """All methods by name, sorted. A class without a default for `name` is a base of methods, and left
    out.
    """
    found, pending = {}, [Method]
    while pending:
        for cls in pending.pop().__subclasses__():
            pending.append(cls)
            name = cls.model_fields["name"].default
            if isinstance(name, str):
                found[name] = cls
    return dict(sorted(found.items()))


__all__ = [
    "CorrectsGradients",
    "Factors",
    "HasMagnitude",
    "HoldsPretrained",
    "Init",
    "LayerInit",
    "Method",
    "NeedsProbe",
    "ProbeSettings",
    "Recomposes",
    "Recomposition",
    "StartsFromAdapter",
    "TakesFromWeight",
    "TrainsWeight",
    "TransformsGradients",
    "core_of",
    "last_trained_factor",
    "magnitude_of",
    "probe_of",
    "recomposing",
    "registry",
    "start_of",
    "writes_weight",
]
