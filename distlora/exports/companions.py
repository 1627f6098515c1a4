"""The files of a model beside its weights, copied with what a run decided: labels, padding, what is tied."""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distlora.errors import UserError
from distlora.files.atomic import write_json
from distlora.files.json_files import read_json

#: Endings of weights in any format, of states of training, and of programs: none of them is of the merged
#: model.
_LEFT_BEHIND = (
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".ggml", ".onnx", ".onnx_data", ".msgpack",
    ".h5", ".hdf5", ".tflite", ".mlmodel", ".ot", ".npz", ".npy", ".pkl", ".pickle", ".index.json", ".py",
    ".pyc", ".so", ".sh", ".partial", ".lock", ".log",
)  # fmt: skip
#: What describes another model or its training: PEFT's config would make transformers look for an adapter.
_OTHERS = ("adapter_config.json", "trainer_state.json", "README.md")
#: Nothing that belongs to a tokenizer or a processor is larger.
_LARGEST = 200 << 20
#: Folders whose files transformers reads.
_FOLDERS = ("additional_chat_templates",)

#: Keys of a generation config that only say how to draw.
_DRAWING = ("temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")


@dataclass(frozen=True)
class RunTokens:
    """Of a run's tokenizer. pad, pad_id: with what texts are padded. ends: the tokens in which a trained
    answer ends; none for a classifier.
    """

    pad: str
    pad_id: int
    ends: frozenset[int] = frozenset()


@dataclass
class Decided:
    """What a run decided about a model, beyond its weights.

    config: keys of config.json. tied: False where tensors that were one no longer are; None leaves that as it
    is. dtype: of all weights. tokens: None where there is no tokenizer.
    """

    config: dict[str, Any] = field(default_factory=dict)
    tied: bool | None = None
    dtype: str | None = None
    tokens: RunTokens | None = None


def copy_companions(draft: Path, base: Path, decided: Decided) -> None:
    """Copies all that belongs to the model in `base`, and writes what the run decided into it."""
    for path in _companions(base):
        target = draft / path.relative_to(base)
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, target)
    _change(draft / "config.json", lambda content: _model_config(content, decided))
    tokens = decided.tokens
    if tokens is not None and tokens.ends:
        _make_generation_config(draft, tokens)
    _change(draft / "generation_config.json", lambda content: _generation_config(content, tokens))
    if tokens is not None:
        for name in ("tokenizer_config.json", "special_tokens_map.json"):
            _change(draft / name, lambda content: _tokenizer_config(content, tokens.pad))


def _companions(base: Path) -> Iterator[Path]:
    for folder in (base, *(base / name for name in _FOLDERS)):
        for path in sorted(folder.iterdir()) if folder.is_dir() else ():
            name = path.name.lower()
            wanted = not name.startswith(".") and not name.endswith(_LEFT_BEHIND) and path.name not in _OTHERS
            if wanted and path.is_file() and path.stat().st_size <= _LARGEST:
                yield path


def _change(path: Path, change) -> None:
    """Changes a file of JSON, if it is there and anything is to be changed."""
    if path.is_file():
        content = _read(path)
        changed = change(content)
        if changed != content:
            write_json(path, changed)


def _read(path: Path) -> dict[str, Any]:
    try:
        content = read_json(path, unique=False)
    except ValueError as error:
        raise UserError(
            f"the model's {path.name} is not a valid JSON file ({error}); fetch it again"
        ) from None
    if not isinstance(content, dict):
        raise UserError(f"the model's {path.name} is not a valid JSON object; fetch it again")
    return content


def _model_config(content: dict[str, Any], decided: Decided) -> dict[str, Any]:
    changed = content | decided.config
    if decided.dtype is not None:
        changed = _with_dtype(changed, decided.dtype) | {"dtype": decided.dtype}
    shared = {key: value for key, value in decided.config.items() if key != "architectures"}
    if decided.tied is not None:
        changed["tie_word_embeddings"] = shared["tie_word_embeddings"] = decided.tied
    if isinstance(changed.get("text_config"), dict):  # classes for text alone read this part only
        changed["text_config"] = changed["text_config"] | shared
    if decided.tokens is not None:
        for part in (changed, changed.get("text_config")):
            if isinstance(part, dict) and part.get("pad_token_id") is None:
                part["pad_token_id"] = decided.tokens.pad_id
    return changed


def _with_dtype(content: dict[str, Any], dtype: str) -> dict[str, Any]:
    """The config with another dtype wherever it says one; "torch_dtype" is the key's older name."""
    changed = {}
    for key, value in content.items():
        if key in ("dtype", "torch_dtype"):
            changed["dtype"] = dtype
        else:
            changed[key] = _with_dtype(value, dtype) if isinstance(value, dict) else value
    return changed


def _make_generation_config(draft: Path, tokens: RunTokens) -> None:
    """Writes one for a model that has none, and whose config does not say how a trained answer ends."""
    path, config = draft / "generation_config.json", _read(draft / "config.json")
    own = config.get("eos_token_id", (config.get("text_config") or {}).get("eos_token_id"))
    if not path.exists() and not tokens.ends <= set(_ids(own)):
        write_json(path, {"eos_token_id": own})


def _ids(value: Any) -> list[int]:
    return list(value) if isinstance(value, list) else [] if value is None else [value]


def _generation_config(content: dict[str, Any], tokens: RunTokens | None) -> dict[str, Any]:
    """transformers refuses to save a model with settings of drawing beside `do_sample: false`; they have no
    effect there.
    """
    changed = dict(content)
    if not changed.get("do_sample"):
        changed = {key: value for key, value in changed.items() if key not in _DRAWING}
    if tokens is not None:
        if changed.get("pad_token_id") is None:
            changed["pad_token_id"] = tokens.pad_id
        own = _ids(changed.get("eos_token_id"))
        if not tokens.ends <= set(own):
            changed["eos_token_id"] = [*own, *sorted(tokens.ends - set(own))]
    return changed


def _tokenizer_config(content: dict[str, Any], pad_token: str) -> dict[str, Any]:
    own = content.get("pad_token")
    own = own.get("content") if isinstance(own, dict) else own
    return content if own == pad_token else content | {"pad_token": pad_token}
