"""YAML into pydantic models, strictly. A mistake becomes one sentence: where, what was found, what is wanted.

A place is a function from a dotted key to the words that name it, such as "recipes/x.yaml: train.lr" or
"override train.lr".
"""

import json
import typing
from collections.abc import Callable
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from distlora.errors import UserError
from distlora.files.confidential import HIDDEN, is_secret_name, redacted
from distlora.sentences import nearest

Place = Callable[[str], str]
Model = TypeVar("Model", bound=BaseModel)

# ---------------------------------------------------------------------- keys


def dotted(*parts: Any) -> str:
    """`train.lr` for ("train", "lr"). Empty parts are left out."""
    return ".".join(str(part) for part in parts if part != "")


def unknown_keys(cls: type[BaseModel], data: dict) -> list[tuple]:
    """The paths of the keys, at any depth, that `cls` does not have."""
    unknown = []
    for key, value in data.items():
        if key not in cls.model_fields:
            unknown.append((key,))
        elif isinstance(value, dict) and (
            nested := nested_model(annotation := cls.model_fields[key].annotation)
        ):
            parts = {(name,): part for name, part in value.items()} if by_name(annotation) else {(): value}
            for name, part in parts.items():
                if isinstance(part, dict):
                    unknown += [(key, *name, *path) for path in unknown_keys(nested, part)]
    return unknown


def check_keys(cls: type[BaseModel], data: dict, prefix: str, place: Place) -> None:
    """Raises UserError for the first key of `data`, at any depth, that `cls` does not have.

    prefix: the dotted key under which `data` stands.
    """
    for *sections, name in unknown_keys(cls, data)[:1]:
        is_name = False
        for section in sections:
            if is_name:
                is_name = False
                continue
            annotation = cls.model_fields[section].annotation
            cls, is_name = nested_model(annotation), by_name(annotation)
        hint = (
            _nested(str(name), cls)
            or nearest(str(name), cls.model_fields)
            or f"; known here: {', '.join(cls.model_fields)}"
        )
        raise UserError(f"{place(dotted(prefix, *sections, name))}: unknown key{hint}")


def _nested(name: str, cls: type[BaseModel]) -> str:
    """The hint for a dotted key, as overrides and sweeps write them, in the place of a section."""
    section, _, key = name.partition(".")
    if key and section in cls.model_fields and nested_model(cls.model_fields[section].annotation):
        return f"; write {key} as a key of {section}, as in {section}: {{{key}: …}}"
    return ""


def nested_model(annotation: Any) -> type[BaseModel] | None:
    """The pydantic model in an annotation such as `Section | None`, if there is one."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, map(nested_model, typing.get_args(annotation))), None)


def by_name(annotation: Any) -> bool:
    """Whether an annotation is of a mapping from names, which are no keys, to pydantic models."""
    if typing.get_origin(annotation) is dict:
        return nested_model(annotation) is not None
    return any(map(by_name, typing.get_args(annotation)))


# ---------------------------------------------------------------------- values

#: What is wanted, by pydantic's type of the error. The error's context is filled in.
_WANTED = {
    "bool_parsing": "true or false",
    "bool_type": "true or false",
    "dict_type": "a mapping",
    "enum": "{expected}",
    "finite_number": "a finite number",
    "float_parsing": "a number",
    "float_type": "a number",
    "greater_than": "a number above {gt:g}",
    "greater_than_equal": "a number of at least {ge:g}",
    "int_from_float": "a whole number",
    "int_parsing": "a whole number",
    "int_type": "a whole number",
    "less_than": "a number below {lt:g}",
    "less_than_equal": "a number of at most {le:g}",
    "list_type": "a list",
    "literal_error": "{expected}",
    "model_type": "a mapping",
    "none_required": "null",
    "string_too_short": "a text that is not empty",
    "string_type": "a text",
    "too_long": "a list of at most {max_length}",
    "too_short": "a list of at least {min_length}",
    "tuple_type": "a list",
}


def validate(cls: type[Model], data: dict, prefix: str, place: Place) -> Model:
    """An instance of `cls`, made of YAML content. The keys are checked first, and then the values.

    prefix: the dotted key under which `data` stands. Raises UserError, in one sentence, for the first
    mistake.
    """
    check_keys(cls, data, prefix, place)
    return validate_values(cls, data, prefix, place)


def validate_values(cls: type[Model], data: dict, prefix: str, place: Place) -> Model:
    """Like `validate`, for keys that were checked. Nothing is converted: neither true nor "8" is a number."""
    try:
        # As JSON, because pydantic's strict mode wants tuples and instances of sections among Python objects.
        return cls.model_validate_json(json.dumps(data, default=str), strict=True)
    except ValidationError as error:
        raise UserError(sentence(error, data, prefix, place)) from None


def show(value: Any, key: str = "") -> str:
    """A value as it stands in a recipe, shortened and without secrets. key: the dotted key that has it."""
    if is_secret_name(key):
        return HIDDEN
    text = json.dumps(redacted(value), ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


def sentence(error: ValidationError, data: Any, prefix: str, place: Place) -> str:
    """What is wrong with `data`, which stands under the dotted key `prefix`."""
    mistakes = [(_path(mistake, data), mistake) for mistake in error.errors(include_url=False)]
    first = mistakes[0][0]
    # Each alternative of a union fails by itself. The one that got deepest into the value tells most.
    path = max((path for path, _ in mistakes if path[: len(first)] == first), key=len)
    same = [mistake for other, mistake in mistakes if other == path]
    key = dotted(prefix, *path)
    where = place(key)
    if same[0]["type"] == "missing":
        return f"{where} is missing"
    if same[0]["type"] == "value_error":
        return f"{where}: {same[0]['ctx']['error']}"
    wanted = " or ".join(dict.fromkeys(map(_wanted, same)))
    return f"{where}: found {show(same[0]['input'], key)}, wanted {wanted}"


def _wanted(mistake: dict) -> str:
    text = _WANTED.get(mistake["type"])
    if text is None:
        return mistake["msg"]
    if mistake["type"] == "string_type":
        text += _quotes(mistake)
    elif mistake["input"] is None and mistake["type"] in ("model_type", "dict_type"):
        text += " (no key stands below it: remove it, or write its keys)"
    elif mistake["input"] == "None":
        text += " (None is written null)"
    return text.format(**mistake.get("ctx", {})).replace("'", "")


def _quotes(mistake: dict) -> str:
    """The advice to write a text in quotes, where YAML has made something else of it."""
    value = mistake["input"]
    if value is None and isinstance(mistake["loc"][-1], int):
        return " (YAML reads null and ~ as null: put the word in quotes)"
    return " (put it in quotes)" if isinstance(value, int | float | dict) else ""


def _path(mistake: dict, data: Any) -> tuple:
    """The keys and list positions of a mistake: pydantic's location without the tags of union
    alternatives.
    """
    path = []
    for part in mistake["loc"]:
        if part in (data if isinstance(data, dict) else range(len(data)) if isinstance(data, list) else ()):
            path.append(part)
            data = data[part]
    return (*path, mistake["loc"][-1]) if mistake["type"] == "missing" else tuple(path)
