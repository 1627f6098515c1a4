"""The names that a model's parameters have in its files, where transformers renames them while it loads.

It gives published weights of some types, ViT's among them, other names than those under which they were
published: `encoder.layer.0.attention.attention.query.weight` becomes `vit.layers.0.attention.q_proj.weight`.
"""

from collections.abc import Iterable
from pathlib import Path

import torch
import transformers
from transformers import AutoConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from distlora.models.loading import explained


def renamed(directory: Path, model_class: str | None, stored: Iterable[str]) -> dict[str, str]:
    """By the name of a parameter in the model, its name among `stored`, the names in the files; without those
    that are the same, and without weights that are more than renamed, such as several in one tensor.

    directory: of the config. model_class: the name of a class of transformers; for any other one there are no
    new names. Reads no weights. Raises UserError for a config that is missing or of another class.
    """
    cls = getattr(transformers, model_class or "", None)
    if not (isinstance(cls, type) and issubclass(cls, PreTrainedModel)):
        return {}
    with torch.device("meta"), explained(str(directory)):
        model = cls(AutoConfig.from_pretrained(directory, trust_remote_code=False))
    mapping, own = get_model_conversion_mapping(model), model.state_dict()
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    found: dict[str, str] = {}
    for name in stored:
        new, converter = rename_source_key(name, renamings, converters, model.base_model_prefix, own)
        if converter is None and new != name and new in own:
            found.setdefault(new, name)
    return found
