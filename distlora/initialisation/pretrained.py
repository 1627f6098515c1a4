"""Pretrained weights out of their files, one at a time: what a packed layer cannot tell any more.

A method that takes something out of W needs W itself: packing the rest of it then costs less than packing W
did (QPiSSA).
"""

from collections.abc import Callable, Collection
from pathlib import Path

import torch
from torch import Tensor

from distlora.errors import UserError
from distlora.files.tensors import TensorFiles, stored_name


class PretrainedFiles:
    """The weights of some layers. shapes: (out, in) by layer. dtype: the model's, in which they were before
    they were packed. renaming: from the names in the files to what `stored_name` takes. transposed: layers
    that the files hold as (in, out).

    Raises UserError where the files do not hold one of them as it is.
    """

    def __init__(
        self,
        directory: Path,
        shapes: dict[str, tuple[int, int]],
        dtype: torch.dtype,
        renaming: Callable[[list[str]], dict[str, str]] = lambda names: {},
        transposed: Collection[str] = (),
    ):
        self._files, self._dtype = TensorFiles(directory, "model"), dtype
        self._transposed = frozenset(transposed)
        names = renaming(self._files.names)
        self._names = {layer: stored_name(self._files, f"{layer}.weight", names) for layer in shapes}
        for layer, name in self._names.items():
            shape = tuple(shapes[layer])[:: -1 if layer in self._transposed else 1]
            if name not in self._files or self._files.shape(name) != shape:
                raise UserError(
                    f"{directory}: the weights files hold no {layer}.weight of shape {shape}, "
                    "which the method needs under model.quantization; set that to null, or leave the layer "
                    "out of targets"
                )

    def read(self, layer: str) -> Tensor:
        """(out, in) in float32 on the CPU, rounded to the model's dtype as when it is loaded."""
        weight = self._files.read(self._names[layer]).to(self._dtype).float()
        return weight.T.contiguous() if layer in self._transposed else weight
