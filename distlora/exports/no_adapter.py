"""What a path is that was given for an adapter in PEFT's files and is none, and where the adapter is."""

import re
from pathlib import Path

from distlora.exports.peft import ADAPTER_CONFIG

#: The name of a repository on the hub.
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)
#: Of its directories and files: a run, a checkpoint of one, a model, and a run's adapter.
_RUN, _CHECKPOINT, _MODEL, _OWN = "recipe.yaml", "manifest.json", "config.json", "adapter"


def why_no_adapter(given: str, place: Path) -> str | None:
    """Why there is no adapter, and what to do, as the end of a sentence that begins with the path; None for a
    directory that has the config of one. given: the path as the user has written it. place: what it means.
    """
    if not place.is_dir():
        return _why_no_directory(given, place)
    if (place / ADAPTER_CONFIG).exists():
        return None
    if (place / _RUN).exists():
        if (place / _OWN / ADAPTER_CONFIG).exists():
            return f" is the directory of a run; its adapter is {place / _OWN}"
        return (
            " is the directory of a run without an adapter; write one by "
            f"distlora export {place} --format peft --out DIR"
        )
    if (place / _CHECKPOINT).exists():
        return (
            " is a checkpoint; export it by "
            f"distlora export {place.parent} --step N --format peft --out DIR, and name DIR"
        )
    if (place / _MODEL).exists():
        return f" is a model and no adapter: it has no {ADAPTER_CONFIG}; name a model by model.path"
    within = sorted(path.parent.name for path in place.glob(f"*/{ADAPTER_CONFIG}"))
    if within:
        return f" holds adapters in folders of its own; name one, such as {place / within[0]}"
    return f" is no adapter, or half written: it has no {ADAPTER_CONFIG}"


def _why_no_directory(given: str, place: Path) -> str:
    if place.exists():
        return " is a file; give the directory that it is in"
    if _HUB_NAME.fullmatch(given) and not place.parent.is_dir():
        return (
            ": there is no such directory; download an adapter of the hub first: "
            f"hf download {given} --local-dir DIR, and name DIR"
        )
    return ": there is no such directory; give that of an adapter of PEFT's"
