"""What belongs to an optimizer step beside the step itself, whatever engine takes it."""

from distlora.adapter.layer import AdapterLinear
from distlora.engine.protocol import Engine, clip_factor, transforming
from distlora.methods import Factors


def before_step(engine: Engine) -> float | None:
    """After the last backward pass, before `engine.step`: methods that transform gradients do so.

    All gradients are then clipped by the norm that they had before, which is returned; None where no method
    transforms any. Collective.
    """
    layers = transforming(engine.layers)
    if not layers:
        return None
    norm = engine.gradient_norm()
    scale = clip_factor(norm, engine.clip)

    def change(layer: AdapterLinear, gradients: Factors, factors: Factors) -> Factors:
        new = gradients | layer.transform_gradients(gradients, factors)
        return {factor: scale * gradient for factor, gradient in new.items()}

    engine.map_gradients(layers, change)
    if scale != 1.0:
        transformed = {f"{layer.name}.{name}" for layer in layers for name in layer.method.trains}
        engine.scale_gradients(scale, but=transformed)
    return norm


def after_step(engine: Engine) -> None:
    """After `engine.step`: what layers have kept of the factors' old values is forgotten."""
    for layer in engine.layers.values():
        layer.changed()
