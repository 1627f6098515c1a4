"""Configs of well-known models that come with distlora: enough to plan for one that is out of reach.

They hold sizes only, as the models' authors have published them: no weights and no tokenizer.
"""

from pathlib import Path

_FOLDER = Path(__file__).parent / "known"

#: From a repository on the hub, in lower case, to its folder. Those of one size have one in common.
_FOLDERS = {
    "mistralai/mistral-7b-v0.1": "mistral-7b-v0.1",
    "mistralai/mistral-7b-instruct-v0.1": "mistral-7b-v0.1",
    "mistralai/mistral-7b-v0.3": "mistral-7b-v0.3",
    "mistralai/mistral-7b-instruct-v0.3": "mistral-7b-v0.3",
    "google/gemma-2-9b": "gemma-2-9b",
    "google/gemma-2-9b-it": "gemma-2-9b",
    "google/gemma-2-2b": "gemma-2-2b",
    "google/gemma-2-2b-it": "gemma-2-2b",
    "meta-llama/llama-3.1-8b": "llama-3.1-8b",
    "meta-llama/llama-3.1-8b-instruct": "llama-3.1-8b",
    "meta-llama/llama-3.2-3b": "llama-3.2-3b",
    "meta-llama/llama-3.2-3b-instruct": "llama-3.2-3b",
    "meta-llama/llama-3.2-1b": "llama-3.2-1b",
    "meta-llama/llama-3.2-1b-instruct": "llama-3.2-1b",
    "qwen/qwen2.5-7b": "qwen2.5-7b",
    "qwen/qwen2.5-7b-instruct": "qwen2.5-7b",
    "qwen/qwen2.5-0.5b": "qwen2.5-0.5b",
    "qwen/qwen2.5-0.5b-instruct": "qwen2.5-0.5b",
    "huggingfacetb/smollm2-135m": "smollm2-135m",
    "huggingfacetb/smollm2-135m-instruct": "smollm2-135m",
    "facebookai/roberta-large": "roberta-large",
    "microsoft/deberta-v3-base": "deberta-v3-base",
    "google/vit-base-patch16-224-in21k": "vit-base-patch16-224",
    "google/vit-base-patch16-224": "vit-base-patch16-224",
}


def known_shapes(repository: str) -> Path | None:
    """The folder with the config of a repository, and for images that of what is made of them; None for one
    that is not known."""
    folder = _FOLDERS.get(repository.lower())
    return None if folder is None else _FOLDER / folder
