"""Every key that the installed DeepSpeed reads in a config, at every depth."""

from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel, ValidationError

from distlora.engine.zero.config_reader import read_config
from distlora.recipe.strict import nested_model

#: A name that no DeepSpeed has.
_STRANGE = "a name that is no key"
_BATCH = {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1}
#: Sections of which DeepSpeed reads a part only if another key has the right value.
_SWITCHES = {
    ("optimizer",): {"type": "adam"},
    ("scheduler",): {"type": "WarmupLR"},
    ("expert_parallel",): {"enabled": False},
}


def deepspeed_keys() -> set[str]:
    """The dotted names of all keys: those of DeepSpeed's models, and those that its readers ask for."""
    return {".".join(path) for path in _keys(())} | _removed() | _pipeline()


def _keys(path: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    model = _model_at(path)
    names = _fields(model) if model else dict.fromkeys(_asked_at(path))
    for name, inner in names.items():
        yield (*path, name)
        if model:
            yield from _nested(inner, (*path, name))
        else:
            yield from _keys((*path, name))


def _nested(annotation: Any, path: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    model = nested_model(annotation)
    if model is not None:
        for name, inner in _fields(model).items():
            yield (*path, name)
            yield from _nested(inner, (*path, name))


def _fields(model: type[BaseModel]) -> dict[str, Any]:
    """DeepSpeed takes a field by its name as well as by its alias."""
    fields = model.model_fields.items()
    return {key: field.annotation for name, field in fields for key in (name, field.alias) if key}


class _Recorder(dict):
    """A dictionary that records the keys that it is asked for; copies record in the same set."""

    def __init__(self, *content):
        super().__init__(*content)
        self.asked: set[str] = set()

    def __iter__(self):  # without this method, `**` would not call `keys`
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


def _asked_at(path: tuple[str, ...]) -> set[str]:
    recorder = _Recorder(_SWITCHES.get(path, {}) if path else _BATCH)
    try:
        read_config(_around(path, recorder))
    except Exception:  # of any kind: not every key may hold a mapping
        pass
    return {name for name in recorder.asked if name != _STRANGE}


def _model_at(path: tuple[str, ...]) -> type[BaseModel] | None:
    """DeepSpeed's model of a section, if it has one."""
    try:
        read_config(_around(path, {_STRANGE: 1}))
    except ValidationError as error:
        mistakes = error.errors()
        if mistakes[0]["type"] == "extra_forbidden":
            return _descend(_model_named(error.title), mistakes[0]["loc"][:-1])
    except Exception:  # see `_asked_at`
        pass
    return None


def _descend(model: type[BaseModel], sections: tuple[str, ...]) -> type[BaseModel]:
    for section in sections:
        model = nested_model(_fields(model)[section])
    return model


def _model_named(title: str) -> type[BaseModel]:
    from deepspeed.runtime.config_utils import DeepSpeedConfigModel

    return next(model for model in _descendants(DeepSpeedConfigModel) if model.__name__ == title)


def _descendants(cls: type) -> Iterator[type]:
    for child in cls.__subclasses__():
        yield child
        yield from _descendants(child)


def _around(path: tuple[str, ...], section: dict) -> dict:
    for name in reversed(path):
        section = {name: section}
    return section if not path else _BATCH | section


def _removed() -> set[str]:
    """Keys that this DeepSpeed knows only to refuse them."""
    from deepspeed.runtime import config

    top = getattr(config, "_REMOVED_TOP_LEVEL_CONFIG_KEYS", {})
    zero = getattr(config, "_REMOVED_ZERO_CONFIG_KEYS", {})
    return set(top) | {f"zero_optimization.{name}" for name in zero}


def _pipeline() -> set[str]:
    """DeepSpeed takes any key of this section, and has defaults for those that mean something."""
    from deepspeed.runtime.config import get_pipeline_config

    return {f"pipeline.{name}" for name in get_pipeline_config({})}
