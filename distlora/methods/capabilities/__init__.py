"""What only some methods can do: a base class for each, which a method takes on by inheriting from it.

Others ask `isinstance(method, HasMagnitude)`. A capability may be off in a method's settings: `facts` answers
what a method does as it is set, for any method.
"""

from distlora.methods.capabilities.facts import (
    core_of,
    last_trained_factor,
    magnitude_of,
    probe_of,
    recomposing,
    start_of,
    writes_weight,
)
from distlora.methods.capabilities.from_adapter import StartsFromAdapter
from distlora.methods.capabilities.from_weight import HoldsPretrained, TakesFromWeight
from distlora.methods.capabilities.gradients import CorrectsGradients, TransformsGradients
from distlora.methods.capabilities.magnitude import HasMagnitude
from distlora.methods.capabilities.probing import NeedsProbe, ProbeSettings
from distlora.methods.capabilities.recomposing import Recomposes, Recomposition
from distlora.methods.capabilities.trained_weight import TrainsWeight

__all__ = [
    "CorrectsGradients",
    "HasMagnitude",
    "HoldsPretrained",
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
    "start_of",
    "writes_weight",
]
