"""Rows of a data set of the Hugging Face hub, through the `datasets` library."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from distlora.data.readers import Row
from distlora.data.splits import SplitPart
from distlora.errors import UserError
from distlora.files.problems import is_of_the_disk, sentence_on
from distlora.progress import phase
from distlora.sentences import first_line, nearest


def select_from_hub(path: str, parts: list[SplitPart]) -> Sequence[Row]:
    import datasets

    chosen = []
    for part in parts:
        whole = _undecoded(hub_split(path, part.name))
        chosen.append(whole.select(part.rows(len(whole))))
    return chosen[0] if len(chosen) == 1 else datasets.concatenate_datasets(chosen)


def _undecoded(rows):
    """The rows with images, sound and films as the bytes of their files: `datasets` would decode each that is
    looked at, also where nobody asks for that column.
    """
    for name, feature in rows.features.items():
        if getattr(feature, "decode", False):
            rows = rows.cast_column(name, replace(feature, decode=False))
    return rows


def hub_split(path: str, split: str):
    """One whole split of the hub as a `datasets.Dataset`, downloaded to the cache unless it is there."""
    import datasets  # slow to import, and not needed to read local files

    name, _, configuration = path.partition(":")
    try:
        with phase(f"reading {path}, split {split}"), _without_bars(datasets):
            return datasets.load_dataset(name, configuration or None, split=split)
    except datasets.exceptions.DatasetNotFoundError as error:
        if "gated" in str(error):
            raise UserError(
                f"data.path: {name} is a gated data set, ask for access on its page of the hub, "
                "then set HF_TOKEN or run `hf auth login`"
            ) from error
        raise UserError(
            f"data.path: {name} is neither a local path nor a data set of the hub that you can read, "
            "correct it"
        ) from error
    except ConnectionError as error:
        if datasets.config.HF_HUB_OFFLINE:
            raise UserError(
                f"data.path: {name} is no local path and not in the local cache, and HF_HUB_OFFLINE is set, "
                "unset it to download, or name local files"
            ) from error
        raise UserError(
            f"data.path: {name} is no local path, and the hub cannot be reached; correct it, or the network"
        ) from error
    except Exception as error:  # a download may raise anything, also from HTTP clients
        full = _disk_error(error)
        if full is not None:
            raise UserError(
                f"data.path: {path} cannot be brought from the hub: {sentence_on(full)}"
            ) from error
        raise UserError(_hub_problem(path, split, error)) from error


@contextmanager
def _without_bars(datasets) -> Iterator[None]:
    """The library draws its own, on every rank."""
    shown = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


def _disk_error(error: BaseException | None) -> OSError | None:
    """The error of the disk that lies behind what a library reports; None if there is none."""
    while error is not None:
        if isinstance(error, OSError) and is_of_the_disk(error):
            return error
        error = error.__cause__ or error.__context__
    return None


def _hub_problem(path: str, split: str, error: Exception) -> str:
    """A sentence for what `datasets` reports without an exception class of its own."""
    reason = first_line(error)
    if "Unknown split" in str(error):
        known = re.findall(r"'([\w.\-]+)'", reason.partition("Should be one of")[2])
        hint = nearest(split, known) or ", choose another"
        return f"data: {path} has no split {split!r}{hint} (it has {', '.join(known)})"
    if "onfig name is missing" in str(error) or "BuilderConfig" in str(error):
        # `datasets` lists the configurations on the lines after the first.
        listed = " ".join(str(error).split())
        return (
            f"data.path: {path}: name the configuration after a colon, "
            f"as in name:configuration ({listed[:300]})"
        )
    return (
        f"data.path: {path} cannot be loaded from the hub ({reason}), "
        "correct the name, or save it as local files"
    )
