"""Tensors in a model's files that are of another size than its config says."""

import re
from pathlib import Path

from transformers import PreTrainedModel

from distlora.errors import UserError
from distlora.files.tensors import TensorFiles
from distlora.models.foreign import MISFIT
from distlora.models.stored_names import StoredLayout

#: What a tensor is called while it is loaded that is to be left out; no model has such a parameter.
_LEFT_OUT = "left out"


def misfits(directory: Path, model: PreTrainedModel) -> dict[str, list[str]]:
    """By the name of each parameter that the files hold in another size, what its tensors are called there.

    transformers tells of them only where it does not partition: under ZeRO-3 rank 0 alone would fail. Here
    every rank reads the headers of the files. model: without weights. Raises UserError where tensors do not
    even go together, and what safetensors raises.
    """
    files = TensorFiles(directory, "model")
    own = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    try:
        layout = StoredLayout(model, {name: files.shape(name) for name in files.names})
    except (RuntimeError, IndexError) as error:  # parts of one parameter that cannot be joined
        raise UserError(f"{directory}: {MISFIT}") from error
    return {
        name: layout.by_parameter[name].stored
        for name, shape in layout.shapes.items()
        if own.get(name, shape) != shape
    }


def left_out(misfits: dict[str, list[str]]) -> dict[str, str] | None:
    """What to give transformers as `key_mapping`, so that it loads none of these tensors under ZeRO-3."""
    stored = sorted({name for names in misfits.values() for name in names})
    mapping = {f"^{re.escape(name)}$": f"{_LEFT_OUT} {number}" for number, name in enumerate(stored)}
    return mapping or None
