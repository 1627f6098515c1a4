"""What DeepSpeed says of a DeepSpeed config: names that it does not know, and values that it cannot take.

DeepSpeed by itself ignores most names that it does not know. At the others it breaks off when the weights are
loaded, with a traceback on every rank. Here it reads the config before anything is started, from dictionaries
that record which keys it asks for. A key that it never asks for is one that it does not know.
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

#: Names that DeepSpeed reads outside its config class, or only sometimes. It never reads thread_count, which
#: its documentation has.
_ALSO_KNOWN = {
    "": ("data_parallel_size", "sequence_parallel_size"),
    "aio": ("thread_count",),
    "optimizer": ("params",),
    "scheduler": ("params",),
}
#: Batch sizes that are right for any number of ranks; DeepSpeed completes them. The real ones are checked
#: with the recipe.
_BATCH = {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1}
_WHOLE_BATCH = "train_batch_size"


def checked_deepspeed(recipe: Recipe, world_size: int, hidden_size: int | None) -> dict[str, Any]:
    """The config of `resolve_deepspeed`, once DeepSpeed has read it without complaint.

    Raises UserError as `resolve_deepspeed` does, and for names and values that DeepSpeed refuses or ignores.
    """
    given, source = given_deepspeed(recipe)
    _check_names(given, source)
    config, _ = resolve_deepspeed(recipe, world_size, hidden_size)
    _check_values(config, source)
    return config


class _RecordingDict(dict):
    """A dictionary that records the keys that it is asked for. `**` asks for all that it has.

    Copies record in the same set.
    """

    def __init__(self, *content):
        super().__init__(*content)
        self.asked: set[str] = set()

    def __iter__(self):  # without this method, `**` would not call those below
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
        return self  # so that `key in config.keys()` is recorded, too

    def items(self):
        self.asked |= set(self)
        return super().items()


def _with_batch(config: dict) -> dict:
    return {key: value for key, value in config.items() if key != _WHOLE_BATCH} | _BATCH


# ---------------------------------------------------------------------- names


def _check_names(config: dict, source: str) -> None:
    """Raises UserError for a key that DeepSpeed does not know, whatever the values are.

    Keys are checked at the top and in each section, and deeper where DeepSpeed has a model of the section.
    """
    everything = _RecordingDict(_with_batch({}))
    read_config(everything)
    known = everything.asked | set(_ALSO_KNOWN[""])
    for key, section in config.items():
        if key not in known:
            raise _unknown(source, (key,), known)
        if isinstance(section, dict):
            _check_section(key, section, source)


def _check_section(key: str, section: dict, source: str) -> None:
    section = _RecordingDict(_without_autos(section))
    given = list(section)  # before DeepSpeed adds to it
    try:
        read_config(_with_batch({key: section}))
    except ValidationError as error:
        path = next(
            (mistake["loc"] for mistake in error.errors() if mistake["type"] == "extra_forbidden"), None
        )
        if path is not None:
            within = path if path[0] == key else (key, *path)
            raise _unknown(source, within, _fields(error.title, path[:-1])) from None
    except Exception:  # of any kind: a value that DeepSpeed cannot take. `_check_values` judges values.
        return
    if not section.asked:
        return  # DeepSpeed has given the whole section to a model of its own, which accepts it
    known = section.asked | set(_ALSO_KNOWN.get(key, ()))
    for name in given:
        if name not in known:
            raise _unknown(source, (key, name), known)


def _without_autos(section: dict) -> dict:
    """The section with another text for every "auto": DeepSpeed would drop those, and not look at their
    keys.
    """
    filled = {key: "?" if value == AUTO else value for key, value in section.items()}
    return {key: _without_autos(value) if isinstance(value, dict) else value for key, value in filled.items()}


def _fields(title: str, sections: Iterable[str]) -> list[str]:
    """The names in a section of DeepSpeed's model with this title. sections: the path to it."""
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
    """Raises UserError if DeepSpeed refuses a config. The config has no "auto" any more."""
    try:
        read_config(_with_batch(config))
    except Exception as error:
        raise _refusal(error, config, source) from None


def _refusal(error: Exception, config: dict, source: str) -> UserError:
    """The sentence for an error of DeepSpeed's. It names the key that causes the error alone, if one does."""
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
