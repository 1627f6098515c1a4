"""Averaged gradients of a live DeepSpeed engine: after the last backward pass, before the step."""

from collections.abc import Callable, Collection, Iterator

import torch
from deepspeed.utils import safe_get_local_grad, safe_set_local_grad
from torch import Tensor

from distlora.adapter.layer import AdapterLinear
from distlora.engine.protocol import GradientMap, Part, clip_factor
from distlora.engine.zero.layout import fragment_gradient, shard_of
from distlora.engine.zero.tensors import ZeroTensors

#: Elements that one collective makes whole when gradients are to be replaced.
GRADIENT_BUCKET = 1 << 24


class ZeroGradients(ZeroTensors):
    """What of `distlora.engine.protocol.Engine` looks at averaged gradients, or replaces them."""

    clip: float | None
    _offload: bool

    def silent_tensors(self) -> dict[str, str]:
        counts = torch.zeros(len(self._trained), 2, device=self.comm.device)
        for row, name in enumerate(self._trained):
            gradient = self._gradient(name)
            if gradient is not None:
                counts[row, 0] = gradient.count_nonzero()
                counts[row, 1] = (~gradient.isfinite()).sum()
        verdicts = {}
        for name, (nonzero, broken) in zip(self._trained, self.comm.all_reduce(counts).tolist()):
            if broken or not nonzero:
                verdicts[name] = "not finite" if broken else "zero"
        return verdicts

    def clip_factor(self) -> float:
        return clip_factor(self.gradient_norm(), self.clip)

    def gradient_norm(self) -> float:
        gradients = (self._gradient(name) for name in self._trained if self._speaks_for(name))
        squares = [gradient.double().square().sum() for gradient in gradients if gradient is not None]
        (total,) = self.comm.sum(float(sum(squares)))
        return total**0.5

    def scale_gradients(self, factor: float, but: Collection[str] = ()) -> None:
        for name in self._trained:
            gradient = None if name in but else self._gradient(name)
            if gradient is not None:
                self._set_part(name, factor * gradient)

    def parts(self, layer: AdapterLinear, gradients: bool = False) -> dict[str, Part]:
        names = {factor: f"{layer.name}.{factor}" for factor in layer.method.trains}
        return {
            factor: self._part(name, gradients)
            for factor, name in names.items()
            if self._slices[name] is not None
        }

    def _part(self, name: str, gradients: bool) -> Part:
        own, gradient = self._slices[name], self._gradient(name) if gradients else None
        keys = self.optimizer.moments_in_place() if own.flat in self._optimizer.state else ()
        moments = {key: own.moment(self._optimizer, key) for key in keys}
        if gradient is not None:  # at stage 3 DeepSpeed answers on the accelerator, wherever the master lies
            gradient = gradient.to(own.master.device, torch.float32)
        return Part(own.start, self._speaks_for(name), own.master, gradient, moments)

    def map_gradients(self, layers: list[AdapterLinear], change: GradientMap) -> None:
        for bucket in _buckets(layers, self._cut_up, GRADIENT_BUCKET):
            self._map_bucket(bucket, change)

    def _cut_up(self, layer: AdapterLinear) -> dict[tuple[str, str], int]:
        """Sizes of what a collective has to make whole to change a layer's gradients: those, and at stage 3
        the factors.
        """
        names = [("gradient", factor) for factor in layer.method.trains]
        if self.stage == 3:
            names += [("factor", factor) for factor in layer.factors()]
        return {
            (kind, f"{layer.name}.{factor}"): self._size(f"{layer.name}.{factor}") for kind, factor in names
        }

    def _map_bucket(self, layers: list[AdapterLinear], change: GradientMap) -> None:
        """One collective makes all of a bucket whole; then every rank keeps its own slices of the new
        gradients.
        """
        sizes = {key: size for layer in layers for key, size in self._cut_up(layer).items()}
        flat = torch.zeros(sum(sizes.values()), device=self.comm.device)
        views = dict(zip(sizes, flat.split(list(sizes.values()))))
        for (kind, name), view in views.items():
            if kind == "factor":
                start, length = shard_of(self._parameters[name], self.comm.rank)
                view[start : start + length] = self._parameters[name].ds_tensor.data[:length]
            elif self._speaks_for(name):
                own = self._slices[name]
                view[own.start : own.start + own.length] = self._gradient(name)
        self.comm.all_reduce(flat)
        whole = {key: view.view(self._shape(key[1])) for key, view in views.items()}
        for layer in layers:
            gradients = {
                factor: whole["gradient", f"{layer.name}.{factor}"] for factor in layer.method.trains
            }
            if self.stage == 3:
                factors = {factor: whole["factor", f"{layer.name}.{factor}"] for factor in layer.factors()}
            else:
                factors = {name: factor.detach().float() for name, factor in layer.factors().items()}
            for factor, gradient in change(layer, gradients, factors).items():
                self._set_gradient(f"{layer.name}.{factor}", gradient.float())

    def _gradient(self, name: str) -> Tensor | None:
        """The own slice (length,) of the averaged gradient; None where the rank owns nothing."""
        parameter, own = self._trained[name], self._slices[name]
        if own is None:
            return None
        if self.stage == 0:
            return None if parameter.grad is None else parameter.grad.reshape(-1)
        if self.stage == 3:
            return safe_get_local_grad(parameter)[: own.length]
        return fragment_gradient(parameter, own)

    def _set_gradient(self, name: str, gradient: Tensor) -> None:
        """Keeps the own slice of a whole gradient."""
        own = self._slices[name]
        if own is not None:
            self._set_part(name, gradient.reshape(-1)[own.start : own.start + own.length])

    def _set_part(self, name: str, part: Tensor) -> None:
        """Overwrites the own slice of a gradient, (length,); the norm that DeepSpeed clips by follows."""
        parameter, own = self._trained[name], self._slices[name]
        if self.stage == 0:
            parameter.grad.copy_(part.view_as(parameter.grad))
        elif self.stage == 3:
            # The setter wants the padding too.
            padded = torch.zeros(parameter.ds_tensor.ds_numel, device=part.device)
            padded[: own.length] = part
            safe_set_local_grad(parameter, padded)
        else:
            fragment_gradient(parameter, own).copy_(part)
            if self._offload:
                # With optimizer offload the norm was taken during backward.
                wrapper = self._engine.optimizer
                wrapper.norm_for_param_grads[wrapper.get_param_id(parameter)] = part.double().norm(2)


def _buckets(
    layers: list[AdapterLinear], sizes: Callable[[AdapterLinear], dict], limit: int
) -> Iterator[list[AdapterLinear]]:
    """Runs of layers whose sizes add up to at most `limit` (or one layer that has more)."""
    bucket, size = [], 0
    for layer in layers:
        elements = sum(sizes(layer).values())
        if bucket and size + elements > limit:
            yield bucket
            bucket, size = [], 0
        bucket.append(layer)
        size += elements
    if bucket:
        yield bucket
