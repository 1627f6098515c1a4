"""DeepSpeed's own opinion of a DeepSpeed config: names that it does not know, and values that it cannot take.

Left to itself DeepSpeed ignores most names that it does not know, and breaks off at the others, with a
traceback on every rank, once the weights are loaded. Here it reads the config before anything is started,
from dictionaries that note what they are asked for: what it never asks for, it does not know.
"""

from collections.abc import Iterable
from typing import Any

from pydantic import ValidationError

from distlora.engine.zero.config_reader import deepspeed_section, read_config
from distlora.errors import UserError
from distlora.recipe.deepspeed_config import AUTO, given_deepspeed, resolve_deepspeed
from distlora.recipe.sections import Recipe
from distlora.recipe.strict import dotted, nested_model, sentence, show
from distlora.sentences import first_line, nearest

#: Names that DeepSpeed reads elsewhere than in its config class, only sometimes, or (thread_count) in its
#: documentation alone.
_ALSO_KNOWN = {
    "": ("data_parallel_size", "sequence_parallel_size"),
    "aio": ("thread_count",),
    "optimizer": ("params",),
    "scheduler": ("params",),
}
#: Batch sizes that are right for any number of ranks: DeepSpeed completes them. The real ones are settled
#: with the recipe.
_BATCH = {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1}
_WHOLE_BATCH = "train_batch_size"


def checked_deepspeed(recipe: Recipe, world_size: int, hidden_size: int | None) -> dict[str, Any]:
    """The config of `resolve_deepspeed`, read by DeepSpeed without complaint.

    Errors: UserError as there, and for a name or a value that DeepSpeed refuses or would ignore.
    """
    given, source = given_deepspeed(recipe)
    _check_names(given, source)
    config, _ = resolve_deepspeed(recipe, world_size, hidden_size)
    _check_values(config, source)
    return config


class _Noting(dict):
    """A dictionary that notes the keys it is asked for; `**` asks for all that it has. Copies go on noting in
    the same set.
    """

    def __init__(self, *content):
        super().__init__(*content)
        self.asked: set[str] = set()

    def __iter__(self):  # without one of its own, `**` would pass by all that stands here
        return super().__iter__()

    def __getitem__(self, key):
        self.asked.add(key)
        return super().__getitem__(key)

    def __contains__(self, key):
        self.asked.add(key)
        return super().__contains__(key)

    def get(self, key, default=None):
        self.asked.add(key)
        return super().get(key, default)

    def keys(self):
        return self  # which may be asked whether a key is in it

    def items(self):
        self.asked |= set(self)
        return super().items()


def _with_batch(config: dict) -> dict:
    return {key: value for key, value in config.items() if key != _WHOLE_BATCH} | _BATCH


# ---------------------------------------------------------------------- names


def _check_names(config: dict, source: str) -> None:
    """UserError for a key that DeepSpeed does not know, at the top or in a section, and further down where
    DeepSpeed has a model of its own of what stands there. Whatever the values are, "auto" included."""
    everything = _Noting(_with_batch({}))
    read_config(everything)
    known = everything.asked | set(_ALSO_KNOWN[""])
    for key, section in config.items():
        if key not in known:
            raise _unknown(source, (key,), known)
        if isinstance(section, dict):
            _check_section(key, section, source)


def _check_section(key: str, section: dict, source: str) -> None:
    section = _Noting(_without_autos(section))
    given = list(section)  # DeepSpeed adds to it
    try:
        read_config(_with_batch({key: section}))
    except ValidationError as error:
        path = next(
            (mistake["loc"] for mistake in error.errors() if mistake["type"] == "extra_forbidden"), None
        )
        if path is not None:
            within = path if path[0] == key else (key, *path)
            raise _unknown(source, within, _fields(error.title, path[:-1])) from None
    except (
        Exception
    ):  # of whatever kind: a value that DeepSpeed cannot take, which is judged when no "auto" is left
        return
    if not section.asked:
        return  # handed on whole to one of DeepSpeed's models, which has found nothing to complain of
    known = section.asked | set(_ALSO_KNOWN.get(key, ()))
    for name in given:
        if name not in known:
            raise _unknown(source, (key, name), known)


def _without_autos(section: dict) -> dict:
    """DeepSpeed drops every "auto" with its key, and so would not look at the key."""
    blank = {key: "?" if value == AUTO else value for key, value in section.items()}
    return {key: _without_autos(value) if isinstance(value, dict) else value for key, value in blank.items()}


def _fields(title: str, sections: Iterable[str]) -> list[str]:
    """The names in a section of DeepSpeed's model that is called `title`."""
    model = deepspeed_section(title)
    for section in sections:
        names = model.model_fields.items()
        model = nested_model(
            next(field.annotation for name, field in names if section in (name, field.alias))
        )
    return [field.alias or name for name, field in model.model_fields.items()]


def _unknown(source: str, path: Iterable[str], known: Iterable[str]) -> UserError:
    *sections, name = map(str, path)
    return UserError(
        f"{source}: {dotted(*sections, name)}: unknown key{nearest(name, known) or '; remove it'}"
    )


# ---------------------------------------------------------------------- values


def _check_values(config: dict, source: str) -> None:
    """UserError where DeepSpeed does not take a config without any "auto"."""
    try:
        read_config(_with_batch(config))
    except Exception as error:
        raise _refusal(error, config, source) from None


def _refusal(error: Exception, config: dict, source: str) -> UserError:
    for key, value in config.items():
        try:
            read_config(_with_batch({key: value}))
        except Exception as alone:
            if str(alone) == str(error):
                return UserError(_about(key, value, error, source))
    return UserError(f"{source}: DeepSpeed refuses it: {first_line(error)}")


def _about(key: str, value: Any, error: Exception, source: str) -> str:
    if not isinstance(error, ValidationError):
        return f"{source}: {key}: found {show(value)}, which DeepSpeed refuses: {first_line(error)}"
    named = error.errors()[0]["loc"][:1] == (key,)  # some of DeepSpeed's models hold several sections
    return sentence(
        error, {key: value} if named else value, "" if named else key, lambda place: f"{source}: {place}"
    )
