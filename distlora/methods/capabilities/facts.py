"""Questions that any method answers, by its capabilities and its settings."""

from distlora.methods.capabilities.from_adapter import StartsFromAdapter
from distlora.methods.capabilities.from_weight import TakesFromWeight
from distlora.methods.capabilities.magnitude import HasMagnitude
from distlora.methods.capabilities.probing import NeedsProbe, ProbeSettings
from distlora.methods.capabilities.recomposing import Recomposes
from distlora.methods.contract import Method


def probe_of(method: Method) -> ProbeSettings | None:
    """How the gradients of the start are sampled; None for a method that needs none, as it is set."""
    return method.probe_settings() if isinstance(method, NeedsProbe) else None


def start_of(method: Method) -> str | None:
    """The directory of the adapter in PEFT's files that training starts from; None without one."""
    return method.start if isinstance(method, StartsFromAdapter) else None


def recomposing(method: Method) -> Recomposes | None:
    """The method itself if it replaces components, as it is set; else None."""
    return method if isinstance(method, Recomposes) and method.recomposes else None


def writes_weight(method: Method) -> bool:
    """Whether frozen weights are ever written, at the start or later."""
    return isinstance(method, TakesFromWeight) or recomposing(method) is not None


def magnitude_of(method: Method) -> str | None:
    """The factor that sets the norm of every row of the adapted weight; None without such a factor."""
    return method.magnitude if isinstance(method, HasMagnitude) else None


def last_trained_factor(method: Method) -> str | None:
    """The last factor of the path if it is trained, else None. LoRA+ gives it a learning rate of its own."""
    last = method.path[-1] if method.path else None
    return last if last in method.trains else None


def core_of(method: Method) -> str | None:
    """The trained factor (r, r) between the others on the path; None without one."""
    inner = method.path[1:-1]
    return inner[0] if len(inner) == 1 and inner[0] in method.trains else None
