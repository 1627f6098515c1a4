"""A DeepSpeed config before anything starts: names that are unknown, and values that DeepSpeed cannot take.

DeepSpeed by itself ignores most names that it does not know. At the others, and at values, it breaks off when
the weights are loaded, with a traceback on every rank.
"""

from typing import Any

from pydantic import ValidationError

from distlora.engine.zero.config_reader import read_config
from distlora.errors import UserError
from distlora.files.confidential import is_secret_name
from distlora.recipe.deepspeed_config import given_deepspeed, resolve_deepspeed
from distlora.recipe.deepspeed_keys import AUTO, RULES, SWITCHES, names_in
from distlora.recipe.sections import Recipe
from distlora.recipe.strict import dotted, sentence, show
from distlora.sentences import first_line, nearest

#: Batch sizes that are right for any number of ranks; DeepSpeed completes them. The real ones are checked
#: with the recipe.
_BATCH = {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1}
_WHOLE_BATCH = "train_batch_size"


def checked_deepspeed(recipe: Recipe, world_size: int, hidden_size: int | None) -> dict[str, Any]:
    """The config of `resolve_deepspeed`, once its names are known and DeepSpeed has read it.

    Raises UserError as `resolve_deepspeed` does, and for names that `deepspeed_keys` does not have and values
    that DeepSpeed refuses.
    """
    given, source = given_deepspeed(recipe)
    check_names(given, source)
    config, _ = resolve_deepspeed(recipe, world_size, hidden_size)
    _check_values(config, source)
    return config


def check_names(config: dict[Any, Any], source: str, sections: tuple[str, ...] = ()) -> None:
    """Raises UserError for a key, at any depth, that is not in the table of keys, whatever its value is; and
    for what stands in the place of a section or of true and false.
    """
    known = names_in(dotted(*sections))
    if known is None:
        return
    for key, value in config.items():
        if key not in known:
            raise UserError(f"{source}: {dotted(*sections, key)}: unknown key{_hint(str(key), known)}")
        _check_kind(dotted(*sections, key), value, source)
        if isinstance(value, dict):
            check_names(value, source, (*sections, key))


def _check_kind(key: str, value: Any, source: str) -> None:
    wanted = None
    if value is not None and not isinstance(value, dict) and names_in(key) is not None:
        wanted = "a mapping"
    elif key in SWITCHES and value not in (True, False, None, AUTO):
        wanted = "true or false"
    if wanted:
        raise UserError(f"{source}: {key}: found {show(value, key)}, wanted {wanted}")


def _hint(key: str, known: list[str]) -> str:
    """The end of the sentence for an unknown key."""
    if not key[:1].isalnum():
        return "; remove it: a config has no comments"
    return nearest(key, known) or _elsewhere(key) or "; remove it"


def _elsewhere(name: str) -> str:
    """The end of the sentence for a key that belongs in one other section."""
    places = [key for key in RULES if key.rsplit(".", 1)[-1] == name]
    return f"; it belongs at {places[0]}" if len(places) == 1 else ""


def _with_batch(config: dict) -> dict:
    return {key: value for key, value in config.items() if key != _WHOLE_BATCH} | _BATCH


def _check_values(config: dict, source: str) -> None:
    """Raises UserError if DeepSpeed refuses a config. The config has no "auto" any more."""
    try:
        read_config(_with_batch(config))
    except Exception as error:
        raise _refusal(error, config, source) from None


def _refusal(error: Exception, config: dict, source: str) -> UserError:
    """The sentence for an error of DeepSpeed's. It names the key that causes the error alone, if one does."""
    keys, value = (), config
    while isinstance(value, dict):
        found = next((key for key in value if _fails_alike((*keys, key), value[key], error)), None)
        if found is None:
            break
        keys, value = (*keys, found), value[found]
    if not keys:
        return UserError(f"{source}: DeepSpeed refuses it: {first_line(error)}")
    if isinstance(error, ValidationError):
        return UserError(_about(keys[0], config[keys[0]], error, source))
    key = dotted(*keys)
    why = "which DeepSpeed refuses" + ("" if is_secret_name(key) else f": {first_line(error)}")
    if names_in(key) is not None and not isinstance(value, dict):
        why = "wanted a mapping"
    elif isinstance(error, TypeError | AttributeError):  # words of Python on DeepSpeed's inside
        why = "which is of another kind than DeepSpeed takes; correct it or remove it"
    return UserError(f"{source}: {key}: found {show(value, key)}, {why}")


def _fails_alike(keys: tuple[str, ...], value: Any, error: Exception) -> bool:
    """Whether DeepSpeed refuses a config of this key alone in the same words."""
    for key in reversed(keys):
        value = {key: value}
    try:
        read_config(_with_batch(value))
    except Exception as alone:
        return str(alone) == str(error)
    return False


def _about(key: str, value: Any, error: ValidationError, source: str) -> str:
    named = error.errors()[0]["loc"][:1] == (key,)  # some of DeepSpeed's models hold several sections
    return sentence(
        error, {key: value} if named else value, "" if named else key, lambda place: f"{source}: {place}"
    )
