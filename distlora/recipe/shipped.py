"""The files that come with distlora: recipes, sweeps, ZeRO configs, launch scripts, examples of data.

In a source checkout they lie beside the package, in an installed package in `distlora/shipped`, in the same
folders: `configs/recipes`, `configs/sweeps`, `configs/zero`, `launch`, `examples`.
"""

import itertools
import os
import re
from pathlib import Path

from distlora.errors import UserError
from distlora.files.atomic import write_text
from distlora.sentences import nearest

_PACKAGE = Path(__file__).parents[1]

#: Of each kind: its folder, the names of its files there, and whether a file's ending belongs to its name.
_KINDS = {
    "recipes": ("configs/recipes", ("*.yaml",), False),
    "sweeps": ("configs/sweeps", ("*.yaml",), False),
    "zero": ("configs/zero", ("*.json",), False),
    "launch": ("launch", ("deepspeed.sh", "mpi.sh", "slurm.sbatch"), True),
    "examples": ("examples", ("*.jsonl",), True),
}


def shipped_root() -> Path:
    """The folder that holds `configs`, `launch` and `examples`."""
    installed = _PACKAGE / "shipped"
    return installed if installed.is_dir() else _PACKAGE.parent


def shipped_recipes() -> dict[str, Path]:
    """By name, such as mistral-7b-metamath."""
    return _of_kind("recipes")


def shipped_sweeps() -> dict[str, Path]:
    """By name, such as minilm-glue. A sweep and a recipe may have the same name."""
    return _of_kind("sweeps")


def shipped_zero() -> dict[str, Path]:
    """By name, such as zero3_offload."""
    return _of_kind("zero")


def shipped_launch() -> dict[str, Path]:
    """The scripts that start a run on several hosts, by their file names."""
    return _of_kind("launch")


def shipped_examples() -> dict[str, Path]:
    """Examples of data, by their file names."""
    return _of_kind("examples")


def _of_kind(kind: str) -> dict[str, Path]:
    folder, patterns, with_ending = _KINDS[kind]
    paths = sorted(path for pattern in patterns for path in (shipped_root() / folder).glob(pattern))
    return {path.name if with_ending else path.stem: path for path in paths}


def shipped_file(name: str) -> Path:
    """The file of this name, of whatever kind; a recipe before a sweep of the same name.

    name: as above, or the path within `shipped_root`, such as configs/sweeps/minilm-glue.yaml.
    Raises UserError for a name that is none.
    """
    known = {name: path for kind in reversed(_KINDS) for name, path in _by_name_or_path(kind).items()}
    if name not in known:
        remedy = nearest(name, known) or "; `distlora recipes` lists them"
        raise UserError(f"no file that comes with distlora is called {name}{remedy}")
    return known[name]


def file_or_shipped(path: str | os.PathLike, kind: str = "recipes") -> Path:
    """The file that a path means: the one that is there, else the shipped one of this name, or at this path
    within `shipped_root`; the path as it is where there is neither."""
    shipped = _by_name_or_path(kind).get(os.path.normpath(path))
    return shipped if shipped and not os.path.lexists(path) else Path(path)


def _by_name_or_path(kind: str) -> dict[str, Path]:
    named = _of_kind(kind)
    return named | {path.relative_to(shipped_root()).as_posix(): path for path in named.values()}


def description(path: Path) -> str:
    """The first sentence of the comment at the beginning of a recipe or a sweep; "" without one."""
    lines = itertools.takewhile(
        lambda line: line.startswith("#"), path.read_text(encoding="utf-8").split("\n")
    )
    return " ".join(line.strip("# ") for line in lines).split(". ")[0].rstrip(".")


def copy_shipped(name: str, target: Path) -> list[Path]:
    """Writes a shipped file to `target`, or into it where that is a folder, and with a script the files that
    it reads from its own folder. Returns the paths that were written. Nothing is overwritten.

    Raises UserError for an unknown name, and for a file that is there already.
    """
    source = shipped_file(name)
    if target.is_dir():
        target = target / source.name
    text = source.read_text(encoding="utf-8")
    beside = re.findall(r'^\. "\$\(dirname .*\)/(\w+\.sh)"$', text, re.MULTILINE)
    written = {target: source} | {target.parent / name: source.parent / name for name in beside}
    for path in written:
        if os.path.lexists(path):
            raise UserError(f"{path} exists already; name another file, or a folder")
    if not target.parent.is_dir():
        raise UserError(f"{target}: there is no folder {target.parent}; make it first")
    for path, origin in written.items():
        write_text(path, origin.read_text(encoding="utf-8"))
    return list(written)
