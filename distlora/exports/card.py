"""The model card of an export: README.md, with the metadata that the hub reads at its top.

It names no directory of this machine: of a local model or data set only the last part of its path.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import yaml

from distlora.exports.vllm import rank_for_vllm
from distlora.files.atomic import write_text
from distlora.files.confidential import hidden

if TYPE_CHECKING:  # late elsewhere: it brings the hub's library to users of `distlora.api`
    from distlora.models.base_names import BaseName

CARD = "README.md"

_PIPELINES = {
    "ForCausalLM": "text-generation",
    "ForSequenceClassification": "text-classification",
    "ForImageClassification": "image-classification",
}


@dataclass(frozen=True)
class About:
    """What a card says of a run. method: its name. data: what was learned from, in parts of sentences by
    their titles. scores: "before" and "after" training, by metric. facts: settings by their names. datasets:
    names on the hub.
    """

    method: str | None = None
    facts: Mapping[str, object] = field(default_factory=dict)
    data: Mapping[str, str] = field(default_factory=dict)
    datasets: tuple[str, ...] = ()
    scores: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Form:
    """What was written. kind: "adapter" or "merged". model_class: of transformers. rank: of the adapter.
    vllm: the end of a sentence on why vLLM does not load it. dtype: its name.
    """

    kind: str
    model_class: str | None
    rank: int | None = None
    vllm: str | None = None
    dtype: str = "float32"


def write_card(draft: Path, base: "BaseName", about: About, form: Form) -> None:
    """Writes the card into the directory of an export."""
    head = yaml.safe_dump(_metadata(base, about, form), sort_keys=False, allow_unicode=True)
    parts = [f"---\n{head}---\n", _title(base, about, form), *_sections(base, about, form)]
    write_text(draft / CARD, hidden("\n".join(parts)))


def shown_data(path: str | None, is_local: bool) -> tuple[str, str | None]:
    """How a card calls a data set, and its name on the hub, if it is one there. path: as in `data.path`.
    is_local: whether it means files of the machine that it was read on.
    """
    if path is None:
        return "the task's own data set", None
    if "://" in path:  # an address may hold a password
        parts = urlsplit(path)
        return f"{PurePosixPath(parts.path).name or 'a file'} of {parts.hostname}", None
    name, _, configuration = path.partition(":")
    if is_local:
        return f"{PurePosixPath(name).name} (local)", None
    return f"{name} ({configuration})" if configuration else name, name


def _metadata(base: "BaseName", about: About, form: Form) -> dict:
    found: dict = {}
    if base.on_the_hub and base.name:
        relation = "adapter" if form.kind == "adapter" else "finetune"
        found |= {"base_model": base.name, "base_model_relation": relation}
    found["library_name"] = "peft" if form.kind == "adapter" else "transformers"
    pipeline = [task for ending, task in _PIPELINES.items() if (form.model_class or "").endswith(ending)]
    if pipeline:
        found["pipeline_tag"] = pipeline[0]
    tags = ["distlora", "lora" if form.kind == "adapter" else None, about.method]
    found["tags"] = list(dict.fromkeys(filter(None, tags)))
    if about.datasets:
        found["datasets"] = list(about.datasets)
    return found


def _title(base: "BaseName", about: About, form: Form) -> str:
    what = "LoRA adapter for" if form.kind == "adapter" else "Fine-tuned"
    name = base.shown or "a pretrained model"
    by = f" with the method {about.method}" if about.method else ""
    known = name if base.on_the_hub else f"{name}, a model from a local directory"
    at = f", revision {base.revision}" if base.revision else ""
    return f"# {what} {name}\n\nTrained by distlora{by} on {known}{at}.\n"


def _sections(base: "BaseName", about: About, form: Form) -> list[str]:
    facts = dict(about.facts) | ({"rank of the adapter": form.rank} if form.rank else {})
    facts["weights"] = form.dtype
    found = [_list("Training", facts), _list("Data", about.data), _scores(about.scores)]
    return [*filter(None, found), _loading(base, form)]


def _list(title: str, values: Mapping[str, object]) -> str:
    lines = [f"- {name}: {value}" for name, value in values.items() if value is not None]
    return "\n".join([f"## {title}", "", *lines, ""]) if lines else ""


def _scores(scores: Mapping[str, Mapping[str, float]]) -> str:
    after, before = scores.get("after") or {}, scores.get("before") or {}
    if not after:
        return ""
    lines = ["## Evaluation", "", "| | before | after |", "| --- | --- | --- |"]
    for name, value in after.items():
        earlier = f"{before[name]:.4f}" if isinstance(before.get(name), int | float) else "-"
        if isinstance(value, int | float):
            lines.append(f"| {name.replace('_', ' ')} | {earlier} | {value:.4f} |")
    return "\n".join([*lines, ""])


def _loading(base: "BaseName", form: Form) -> str:
    cls = form.model_class or "AutoModel"
    name = base.name if base.on_the_hub and base.name else f"DIRECTORY_OF_{base.shown or 'THE_MODEL'}"
    revision = f', revision="{base.revision}"' if base.revision else ""
    if form.kind == "merged":
        serve = "\nvLLM:\n\n```shell\nvllm serve THIS_DIRECTORY\n```\n" if cls.endswith("ForCausalLM") else ""
        return (
            f"## How to load\n\n```python\nfrom transformers import {cls}\n\n"
            f'model = {cls}.from_pretrained("THIS_DIRECTORY")\n```\n{serve}'
        )
    text = (
        "## How to load\n\nPEFT:\n\n```python\n"
        f"from peft import PeftModel\nfrom transformers import {cls}\n\n"
        f'base = {cls}.from_pretrained("{name}"{revision})\n'
        'model = PeftModel.from_pretrained(base, "THIS_DIRECTORY")\n```\n\n'
        "A merged model without PEFT: `model.merge_and_unload()`, or `distlora export RUN --format merged "
        "--out DIRECTORY`.\n"
    )
    if form.vllm is None:
        text += (
            f"\nvLLM:\n\n```shell\nvllm serve {name} --enable-lora "
            f"--max-lora-rank {rank_for_vllm(form.rank or 1)} --lora-modules adapter=THIS_DIRECTORY\n```\n"
        )
    elif cls.endswith("ForCausalLM"):
        text += f"\nvLLM {form.vllm}: export the run with `--format merged` for it.\n"
    return text
