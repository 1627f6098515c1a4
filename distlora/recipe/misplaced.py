"""What is given in the place of a recipe, and keys that stand elsewhere in one, or have another name in other
programs. Each mistake becomes one sentence that says what to write instead.
"""

import functools
import os
import re
from collections import defaultdict
from typing import Any

from pydantic import BaseModel

from distlora.errors import UserError
from distlora.files.user_paths import expanded
from distlora.methods import Method, registry
from distlora.recipe.sections import Recipe
from distlora.recipe.strict import Place, dotted, nested_model, show, unknown_keys

#: Sections of which every recipe has at least one.
_SECTIONS = ("model", "method", "data", "train")
_OF_DEEPSPEED = ("zero_optimization", "train_batch_size", "train_micro_batch_size_per_gpu")
#: Keys of PEFT, transformers, TRL, LLaMA-Factory and axolotl, and what they are called here.
_OTHER_NAMES = {
    here: names.split()
    for here, names in {
        "model.path": "model_name_or_path model_name base_model",
        "model.dtype": "bf16 torch_dtype",
        "model.attention": "attn_implementation flash_attn flash_attention",
        "model.quantization": "load_in_4bit load_in_8bit quantization_bit",
        "method.rank": "r lora_r lora_rank",
        "method.alpha": "lora_alpha",
        "method.dropout": "lora_dropout",
        "method.name": "finetuning_type use_peft use_dora use_rslora",
        "targets": "target_modules lora_target lora_target_modules",
        "data.path": "dataset dataset_name datasets train_file",
        "data.split": "dataset_split train_split",
        "data.max_length": "cutoff_len max_seq_length sequence_len model_max_length",
        "train.lr": "learning_rate",
        "train.epochs": "num_train_epochs num_epochs",
        "train.steps": "max_steps",
        "train.micro_batch_size": "per_device_train_batch_size",
        "train.global_batch_size": "gradient_accumulation_steps train_batch_size",
        "train.schedule": "lr_scheduler lr_scheduler_type",
        "train.clip": "max_grad_norm gradient_clipping",
        "train.save_every": "save_steps",
        "train.label_smoothing": "label_smoothing_factor",
        "train.neftune_alpha": "neftune_noise_alpha noisy_embedding_alpha",
        "train.early_stopping": "early_stopping_patience",
        "train.keep_best": "metric_for_best_model load_best_model_at_end",
        "method.modules_to_save": "additional_target lora_modules_to_save",
        "train.eval_every": "eval_steps",
    }.items()
}


def refuse_other_files(content: dict[str, Any], name: str) -> None:
    """Raises UserError for the content of a file that has other keys, and none of a recipe's sections."""
    if content.keys() <= Recipe.model_fields.keys() or any(section in content for section in _SECTIONS):
        return
    if any(key in content for key in _OF_DEEPSPEED):
        raise UserError(f"{name} is a DeepSpeed config and no recipe; name it in a recipe's key deepspeed")
    if "recipe" in content:
        raise UserError(f"{name} is a sweep and no recipe; give it to `distlora sweep`")
    raise UserError(
        f"{name} is no recipe: it has none of the sections {', '.join(_SECTIONS)}; "
        "begin with one that `distlora recipes` lists"
    )


def refuse_misplaced(content: dict[str, Any], place: Place) -> None:
    """Raises UserError for a section that is one value, and for an unknown key of which it is known where it
    belongs."""
    for section in ("model", "data"):
        value = content.get(section)
        if isinstance(value, str):
            raise UserError(
                f"{place(section)}: found {show(value)}, wanted a mapping, "
                f"as in {section}: {{path: {show(value)}}}"
            )
    for *sections, name in _unknown(content):
        home = _home(str(name))
        if home is not None:
            raise UserError(f"{place(dotted(*sections, name))}: unknown key, did you mean {home}?")


def _unknown(content: dict[str, Any]) -> list[tuple]:
    """Paths of keys that a recipe does not have, or its method, where that is known."""
    found = unknown_keys(Recipe, {key: value for key, value in content.items() if key != "method"})
    method = content.get("method")
    if isinstance(method, dict) and method.get("name") in registry():
        found += [("method", *path) for path in unknown_keys(registry()[method["name"]], method)]
    return found


def _home(name: str) -> str | None:
    """The dotted key that a name belongs to, and in a file the section; None where there is none, or more."""
    homes = _homes().get(name, ())
    if len(homes) != 1:
        return None
    section, _, key = homes[0].rpartition(".")
    return f"{homes[0]} (the key {key} of {section})" if section else key


@functools.cache
def _homes() -> dict[str, list[str]]:
    """Dotted keys by names: the last parts of keys, and what other programs call them, which comes first."""
    own, others = defaultdict[str, list[str]](list), defaultdict[str, list[str]](list)
    for path in _keys():
        own[path.rpartition(".")[2]].append(path)
    for path, names in _OTHER_NAMES.items():
        for name in names:
            others[name].append(path)
    return own | others


def _keys() -> list[str]:
    sections = {name: nested_model(field.annotation) for name, field in Recipe.model_fields.items()}
    sections["method"] = Method
    return [path for name, section in sections.items() for path in (name, *_keys_below(name, section))]


def _keys_below(name: str, section: type[BaseModel] | None) -> list[str]:
    below = {} if section is None else section.model_fields
    return [
        path
        for key, field in below.items()
        for path in (f"{name}.{key}", *_keys_below(f"{name}.{key}", nested_model(field.annotation)))
    ]


def refuse_variables(recipe: Recipe, place: Place) -> None:
    """Raises UserError for a path with a shell's variable in it that leads to nothing: no shell reads it."""
    paths = {
        "model.path": recipe.model.path,
        "data.path": recipe.data.path,
        "output_dir": recipe.output_dir,
    }
    for key, path in paths.items():
        if path and re.search(r"\$(\w|\{\w)", path) and not os.path.lexists(expanded(path)):
            raise UserError(
                f"{place(key)}: found {show(path)}, and no shell fills in its variable; write the path out, "
                f'or give it on the command line, as in {key}="$HOME/…"'
            )
