"""A model as other software loads it, and what it computes: to compare what was written with what it is made
of.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.pytorch_utils import Conv1D

from distlora.errors import UserError
from distlora.models.foreign import explained, quiet
from distlora.models.stored_names import config_of_class, transformers_class


class NotFinite(UserError):
    """A model's logits are infinite or not a number."""


#: Tokens of the two rows of a batch; the shorter one is padded.
_LENGTHS = (8, 5)


def can_reload(model_class: str | None) -> bool:
    """Whether a class of transformers can be loaded here. A process that trains under ZeRO-3 would get only a
    part of each weight."""
    return transformers_class(model_class) is not None and not is_deepspeed_zero3_enabled()


def reloaded(
    directory: Path, model_class: str, dtype: torch.dtype, settings: dict[str, Any] | None = None
) -> tuple[PreTrainedModel, set[str]]:
    """The model of a directory on the CPU, in evaluation mode, and the names of parameters that its files
    lack.

    settings: of the config, for files that do not have them yet. Raises UserError for what cannot be loaded.
    """
    cls, settings = transformers_class(model_class), settings or {}
    with explained(str(directory)), quiet():
        config = config_of_class(AutoConfig.from_pretrained(directory, trust_remote_code=False), cls)
        for name, value in settings.items():
            setattr(config, name, value)
        model, info = cls.from_pretrained(
            directory, config=config, dtype=dtype, use_safetensors=True, trust_remote_code=False,
            output_loading_info=True, ignore_mismatched_sizes=bool(settings),
        )  # fmt: skip
    return model.eval(), set(info["missing_keys"])


def separate(model: nn.Module, module: nn.Module) -> None:
    """Gives a module a weight of its own where it shares it with others."""
    uses = sum(p is module.weight for other in model.modules() for p in other.parameters(recurse=False))
    if uses > 1:
        module.weight = nn.Parameter(module.weight.detach().clone(), requires_grad=False)


def fixed_inputs(model: PreTrainedModel, pad_token_id: int | None = None) -> dict[str, Tensor]:
    """Two rows that are the same for all models with the same config: images, or texts of ids that have no
    meaning of their own. pad_token_id: for a config that has none, which takes it over."""
    return _pixels(model) if model.main_input_name == "pixel_values" else _texts(model, pad_token_id)


@torch.no_grad()
def logits_of(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
    """The model's logits, float32, without those of padding. Raises NotFinite where they are not finite."""
    with explained(str(model.config.name_or_path)):
        logits = model(**inputs).logits.float()
    mask = inputs.get("attention_mask")
    if mask is not None and logits.ndim == 3 and logits.shape[:2] == mask.shape:
        logits = logits[mask.bool()]
    if not logits.isfinite().all():
        raise NotFinite(f"{model.config.name_or_path}: the logits are infinite or not a number")
    return logits


def _pixels(model: PreTrainedModel) -> dict[str, Tensor]:
    config = getattr(model.config, "vision_config", model.config)
    size = config.image_size
    height, width = (size, size) if isinstance(size, int) else size
    shape = (2, config.num_channels, height, width)
    return {"pixel_values": torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(model.dtype)}


def _texts(model: PreTrainedModel, pad_token_id: int | None) -> dict[str, Tensor]:
    """Ids that are no special tokens; each row ends in the end token where there is one."""
    config, text = model.config, model.config.get_text_config(decoder=True)
    special = _special_ids(config.to_dict()) | _special_ids(text.to_dict())
    ordinary = torch.tensor(
        [number for number in range(min(text.vocab_size, 30000)) if number not in special]
    )
    picked = torch.randint(len(ordinary), (2, max(_LENGTHS)), generator=torch.Generator().manual_seed(0))
    ids, mask = ordinary[picked], torch.zeros(2, max(_LENGTHS), dtype=torch.int64)
    pad = next((number for number in (text.pad_token_id, pad_token_id) if number is not None), 0)
    if text.pad_token_id is None and pad_token_id is not None:  # a classifier looks it up in its config
        text.pad_token_id = pad_token_id
    ends = text.eos_token_id
    end = ends[0] if isinstance(ends, list) and ends else ends
    for row, length in enumerate(_LENGTHS):
        mask[row, :length] = 1
        ids[row, length:] = pad
        if isinstance(end, int) and end < text.vocab_size:
            ids[row, length - 1] = end
    inputs = {"input_ids": ids, "attention_mask": mask}
    if getattr(config, "is_encoder_decoder", False) and model.can_generate():
        inputs["decoder_input_ids"] = ids
    return inputs


def _special_ids(content: dict[str, Any]) -> set[int]:
    """Ids that a config gives a meaning."""
    named = (value for key, value in content.items() if key.endswith(("token_id", "token_index")))
    return {number for value in named for number in (value if isinstance(value, list) else [value])
            if isinstance(number, int)}  # fmt: skip


def changed_weight(module: nn.Module, change: Callable[[Tensor], Tensor]) -> None:
    """Puts `change(weight)` in the place of a module's weight, (out, in) also where a layer has it turned."""
    turned = isinstance(module, Conv1D)
    weight = module.weight.detach().T if turned else module.weight.detach()
    value = change(weight)
    module.weight.data.copy_(value.T if turned else value)


def changed_experts(model: nn.Module, name: str, change: Callable[[Tensor], Tensor]) -> None:
    """The same of a 3-D parameter of experts, (E, out, in) also where it is stored transposed."""
    module, parameter = model.get_submodule(name.rpartition(".")[0]), model.get_parameter(name)
    turned = bool(getattr(module, "is_transposed", False))
    weight = parameter.detach().mT if turned else parameter.detach()
    value = change(weight)
    parameter.data.copy_(value.mT if turned else value)
