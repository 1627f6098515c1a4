"""Model directories of strangers: what is looked at before transformers reads them, and what is said of what
it raises then.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import nn
from transformers.utils import logging as transformers_logging

from distlora.errors import Ending, UserError
from distlora.files.json_files import read_json
from distlora.files.tensors import TensorFiles
from distlora.sentences import first_line

NO_TOKENIZER = "no usable tokenizer files: tokenizer.json is missing; copy it from where the model is from"
MISFIT = "the sizes of the weights are not those of config.json; fetch it again"

#: Weights in formats that can execute code when they are loaded.
_EXECUTABLE = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle", "*.h5", "*.msgpack")
#: JSON files that transformers reads, and bytes of one at most.
_JSON_FILES = (
    "config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "preprocessor_config.json", "processor_config.json",
)  # fmt: skip
_LARGEST_CONFIG, _LARGEST_TOKENIZER = 32 << 20, 1 << 30
#: Layers of a model at most; there is none with nearly as many.
_MOST_LAYERS = 10_000
_SIZES = ("num_hidden_layers", "hidden_size", "num_attention_heads")
#: Parameters that the files lack start at random: a head, and embeddings. A model has at most so many times
#: the numbers of the files, and so many more.
_MOST_PARAMETERS, _NEW_PARAMETERS = 2, 1 << 28
#: Keys of a config that may name code of a repository, or files beside those that were looked at.
_IMPLEMENTATIONS = ("attn_implementation", "_attn_implementation", "experts_implementation")
_OTHER_FILE = "transformers_weights"
_DTYPES, _TOKENS = ("dtype", "torch_dtype"), ("bos_token_id", "eos_token_id", "pad_token_id")


def check_configs(path: str, directory: Path) -> None:
    """Looks at the JSON files of a model directory. Raises UserError for what is none or too large, and for a
    config that names code. path: what messages call the model."""
    for name in _JSON_FILES:
        try:
            content = read_json(directory / name, _LARGEST_CONFIG, unique=False)
        except FileNotFoundError:
            continue
        except OSError as error:
            raise UserError(f"model.path={path}: {name}: {error.strerror}") from None
        except ValueError as error:
            raise UserError(
                f"model.path={path}: {name} is not a valid JSON file ({first_line(error)}); fetch it again"
            ) from None
        if not isinstance(content, dict):
            raise UserError(f"model.path={path}: {name} is not a valid JSON object; fetch it again")
        if name in ("config.json", "generation_config.json"):
            _check_values(f"model.path={path}: {name}", content)
        if name == "config.json":
            _check_config(path, content)
    tokenizer = directory / "tokenizer.json"
    if tokenizer.is_file() and tokenizer.stat().st_size > _LARGEST_TOKENIZER:
        raise UserError(f"model.path={path}: tokenizer.json has more than {_LARGEST_TOKENIZER} bytes")


def _check_values(where: str, content: dict[str, Any]) -> None:
    """What other code takes without a look: names of dtypes, and numbers of tokens."""
    for key, value in content.items():
        if key in _DTYPES:
            fits, wanted = value is None or isinstance(value, str), "the name of a dtype"
        elif key in _TOKENS:
            numbers = value if isinstance(value, list) else [value]
            fits = value is None or all(type(number) is int for number in numbers)
            wanted = "the number of a token, or a list of them"
        else:
            continue
        if not fits:
            raise UserError(f"{where}: {key} is {str(value)[:40]}, wanted {wanted}; fetch it again")


def _check_config(path: str, content: dict[str, Any]) -> None:
    """The config and the configs within it."""
    for key, value in content.items():
        if key in _IMPLEMENTATIONS and "/" in str(value):
            raise UserError(
                f"model.path={path}: config.json: {key} names code of its own ({str(value)[:60]}), which is "
                "never executed here; remove the key"
            )
        if key == _OTHER_FILE and value is not None:
            raise UserError(f"model.path={path}: config.json: {key} is not supported; remove the key")
        too_many = key.endswith("layers") and type(value) is int and value > _MOST_LAYERS
        if too_many or (key in _SIZES and type(value) is int and value < 1):
            raise UserError(f"model.path={path}: config.json: {key} is {str(value)[:40]}; fetch it again")
        if isinstance(value, dict) and key != "label2id":
            _check_config(path, value)


def check_weights(path: str, directory: Path, model: nn.Module | None = None) -> None:
    """Looks at the headers of the weights files, before anything is allocated by them or by the config.

    model: without weights, to be compared with the files. Raises UserError.
    """
    if not any(directory.glob("*.safetensors")):
        others = sorted(found.name for ending in _EXECUTABLE for found in directory.glob(ending))
        executable = "is in a format that can execute code when it is loaded; convert it to safetensors"
        hint = f"; {others[0]} {executable}" if others else ""
        raise UserError(
            f"model.path={path}: no *.safetensors in {directory}; only this format is loaded{hint}"
        )
    with explained(path):
        files = TensorFiles(directory, "model")
        files.check()
        stored = sum(math.prod(files.shape(name)) for name in files.names)
    wanted = sum(parameter.numel() for parameter in model.parameters()) if model is not None else 0
    if wanted > _MOST_PARAMETERS * stored + _NEW_PARAMETERS:
        raise UserError(f"model.path={path}: {MISFIT}")


# ---------------------------------------------------------------------- what transformers says


@contextmanager
def explained(path: str) -> Iterator[None]:
    """Turns what transformers raises for a bad model directory into one sentence."""
    try:
        yield
    except SafetensorError as error:
        raise UserError(
            f"model.path={path}: a weights file is broken ({first_line(error)}); fetch it again"
        ) from error
    except ImportError as error:
        what = first_line(str(error).strip())
        raise UserError(f"model.path={path}: a package is missing: {what}") from error
    except (OSError, ValueError, KeyError) as error:
        what = first_line(error)
        if "backend tokenizer" in what:
            what = NO_TOKENIZER
        elif "custom code" in what:
            what = "the model needs code of its own, which is never executed here"
        raise UserError(f"model.path={path}: {what}") from error
    except RuntimeError as error:
        if "ignore_mismatched_sizes" not in str(error):
            raise
        raise UserError(f"model.path={path}: {MISFIT}") from error


@contextmanager
def readable(path: str, what: str) -> Iterator[None]:
    """The same around what makes something of files whose content a stranger has chosen: whatever libraries
    raise is one sentence. what: the files, for the sentence."""
    try:
        with explained(path):
            yield
    except (Ending, MemoryError):
        raise
    except BaseException as error:
        name = type(error).__name__
        if not isinstance(error, Exception) and name != "PanicException":  # of a library in Rust
            raise
        if isinstance(error, (AttributeError, TypeError, LookupError)):  # which say nothing of the files
            raise UserError(
                f"model.path={path}: {what} cannot be used, since a value in there is of another kind than "
                "expected; fetch it again"
            ) from error
        raise UserError(f"model.path={path}: {what} cannot be used ({name}: {first_line(error)})") from error


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bar, and no table of new or unused heads: every rank would draw its own."""
    shown, level = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if shown:
            transformers_logging.enable_progress_bar()
