"""A DeepSpeed config while it is compared with the recipe, key by key."""

import json
from typing import Any

from distlora.errors import UserError
from distlora.recipe.deepspeed_keys import AUTO


def look_up(config: dict, key: str, default: Any = None) -> Any:
    """The value of a dotted key. The default if there is none, or if one of its sections is no mapping."""
    for part in key.split("."):
        if not isinstance(config, dict) or part not in config:
            return default
        config = config[part]
    return config


class Resolution:
    """A DeepSpeed config that is being completed. Keys are dotted; lines say what was done."""

    def __init__(self, config: dict, source: str):
        self.config, self.source, self.lines = config, source, []

    def get(self, key: str, default: Any = None) -> Any:
        return look_up(self.config, key, default)

    def set(self, key: str, value: Any, why: str) -> None:
        *sections, last = key.split(".")
        node = self.config
        for part in sections:
            node = node.setdefault(part, {})
        node[last] = value
        self.lines.append(f"deepspeed.{key} = {json.dumps(value)} ({why})")

    def remove(self, key: str, why: str) -> None:
        *sections, last = key.split(".")
        (self.get(".".join(sections)) if sections else self.config).pop(last)
        self.lines.append(f"deepspeed.{key}: {why}")

    def drop(self, key: str, why: str) -> None:
        if self.get(key, self) is not self:
            self.remove(key, why)

    def settle(self, key: str, value: Any, recipe: str, add: bool = False) -> None:
        """Replaces "auto" by the recipe's value, and refuses other values.

        recipe: the place of the value, for the message. add: whether the value is added if there is none.
        """
        found = self.get(key)
        if found == AUTO:
            self.set(key, value, AUTO)
        elif found is None:
            if add:
                self.set(key, value, "from the recipe")
        elif found != value or isinstance(found, bool) != isinstance(value, bool):
            raise self.contradiction(key, recipe)

    def fill(self, key: str, value: Any) -> None:
        if self.get(key) == AUTO:
            self.set(key, value, AUTO)

    def contradiction(self, key: str, recipe: str) -> UserError:
        return UserError(
            f"recipe {recipe} contradicts {key}={json.dumps(self.get(key))} in {self.source}; "
            f"set the latter to auto or make them equal"
        )
