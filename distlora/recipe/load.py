"""Recipes from and to YAML: one file says everything about a run. Reading is strict; overrides are dotted."""

import copy
import functools
import os
from collections.abc import Sequence
from pathlib import Path

from distlora.errors import UserError
from distlora.files.confidential import is_secret_name, shown_word, without_secrets
from distlora.files.user_texts import read_user_text
from distlora.methods import Method, StartsFromAdapter, registry
from distlora.recipe.deepspeed_file import read_deepspeed, refuse_words
from distlora.recipe.misplaced import refuse_misplaced, refuse_other_files, refuse_variables
from distlora.recipe.sections import FORMAT, INLINE, Recipe, method_class
from distlora.recipe.shipped import file_or_shipped, shipped_recipes, shipped_root
from distlora.recipe.strict import (
    Place,
    check_keys,
    dotted,
    show,
    unknown_keys,
    validate,
    validate_values,
)
from distlora.recipe.yaml_text import DEEPEST, dump_yaml, parse_yaml
from distlora.sentences import nearest

#: The key of a resolved recipe that says its format. Not one of the recipe's keys.
_FORMAT_KEY = "format"
#: Sections that one value may stand for: their key for it.
_SHORT = {
    "targets": "include",
    "model.quantization": "kind",
    "train.schedule": "name",
    "train.keep_best": "metric",
}
#: Keys of the train section that change neither what is trained nor how fast.
LOOKING_ON = (
    "eval_every", "save_every", "keep_checkpoints", "keep_best", "eval_samples", "exact_match_samples",
    "hang_timeout",
)  # fmt: skip
#: Those that say what happens after a step that trains nothing: a run that was ended by one may go on
#: otherwise.
ON_BAD_STEPS = ("on_bad_step", "bad_loss_factor", "bad_steps_limit")
#: Those that say when a run ends before its last step: one that has ended may go on with more patience.
ON_THE_END = ("early_stopping",)


def load_recipe(path: str | os.PathLike, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in a YAML file, with overrides such as `train.lr=1e-3` (values are YAML), applied in order.

    path: of a file, or the name of a recipe that comes with distlora, see `shipped`. A path in `deepspeed` is
    looked up in the current folder, then in the recipe's and in those above it, then among the shipped ones.
    An override of `method.name` keeps the keys of the file's method section that the new method has, and
    drops the others: see `Recipe.notes`. A file that does not say its format has the newest one.
    Raises UserError for everything that is wrong with the file, its values or an override.
    """
    return _load(_Document(file_or_shipped(path)), overrides, default_format=FORMAT)


def recipe_of(content: dict, name: str, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in a mapping, with overrides as for `load_recipe`. name: what messages call it."""
    return _load(_Document(Path(name), copy.deepcopy(content)), overrides, default_format=FORMAT)


def load_run_recipe(path: str | os.PathLike) -> Recipe:
    """The recipe that a run has written into its directory. One that does not say its format has format 1."""
    return _load(_Document(Path(path)), (), default_format=1)


def _load(document: "_Document", overrides: Sequence[str], default_format: int) -> Recipe:
    for override in overrides:
        document.apply(override)
    document.fit_method()
    document.read_deepspeed()
    content, place = document.content, document.place
    refuse_other_files(content, document.name)
    refuse_misplaced(content, place)
    check_keys(Recipe, {key: None if key == "method" else value for key, value in content.items()}, "", place)
    if "method" in content:  # first, so that its errors are those of its own class
        cls = method_class(content["method"], place)
        _refuse_others_keys(cls, content["method"], place)
        validate(cls, content["method"], "method", place)
    recipe = validate_values(Recipe, content, "", place)
    if document.format is None:  # written by a person
        refuse_variables(recipe, place)
    recipe._notes = tuple(document.notes)
    recipe._deepspeed_source = document.deepspeed_source
    return recipe.in_format(document.format or default_format)


def _name_of(key: str, text: str) -> str:
    """What messages call an override, without a secret in it."""
    shown = shown_word(f"{key}={text}")
    return f"override {key}: {shown.removeprefix(f'{key}=')}"


def _refuse_others_keys(cls: type[Method], section: dict, place: Place) -> None:
    """Raises UserError for a key of the methods that start from an adapter, with another method."""
    own = StartsFromAdapter.model_fields.keys() - Method.model_fields.keys()
    for key in section:
        if key in own and key not in cls.model_fields:
            have = [name for name, other in registry().items() if getattr(other, "peft_form", None)]
            raise UserError(
                f"{place(f'method.{key}')}: method {section['name']} starts from no adapter; "
                f"leave it out, or set method.name to {' or '.join(have)}"
            )


class _Document:
    """The content of a recipe file, while the overrides are applied to it.

    format: the one that the file says, None if it says none.
    """

    def __init__(self, path: Path, content: dict | None = None):
        """content: in the place of that of the file."""
        self.path, self.name = path, str(path)
        self.content = self._read() if content is None else content
        if not isinstance(self.content, dict):
            raise UserError(
                f"{self.name} is no recipe: wanted a mapping with the keys {', '.join(Recipe.model_fields)}"
            )
        self.format = self._take_format()
        method = self.content.get("method")
        self.file_method = copy.deepcopy(method) if isinstance(method, dict) else {}
        self.given: list[str] = []  # dotted keys that an override set or made
        self.notes: list[str] = []
        self.deepspeed_source = INLINE

    def _read(self):
        if os.path.isdir(self.path):
            raise UserError(f"{self.name} is a directory; give a recipe's file, such as a run's recipe.yaml")
        remedy = "; give the path of a YAML file, or a name that `distlora recipes` lists"
        missing = f"{self.name}: no such recipe{nearest(self.name, shipped_recipes()) or remedy}"
        return parse_yaml(read_user_text(self.path, "a recipe", missing), self.name)

    def _take_format(self) -> int | None:
        """Removes the format from the content, so that no override reaches it."""
        if _FORMAT_KEY not in self.content:
            return None
        number = self.content.pop(_FORMAT_KEY)
        if not isinstance(number, int) or isinstance(number, bool) or number < 1:
            raise UserError(
                f"{self.name}: {_FORMAT_KEY}: found {show(number)}, "
                f"wanted a whole number from 1 to {FORMAT}; remove the line for the newest format"
            )
        if number > FORMAT:
            raise UserError(
                f"{self.name} was written by a newer distlora: its format is {number}, and this one knows "
                f"those up to {FORMAT}; install the newer distlora"
            )
        return number

    def overridden(self, key: str) -> bool:
        """Whether an override gave the key, or a section that holds it."""
        return any(key == given or key.startswith(f"{given}.") for given in self.given)

    def place(self, key: str) -> str:
        if self.overridden(key):
            return f"override {key}"
        return f"{self.name}: {key}" if key else self.name

    def apply(self, override: str) -> None:
        key, equals, text = override.partition("=")
        key = key.strip()
        if not equals or not all(key.split(".")):
            raise UserError(f"override {shown_word(override)}: wanted dotted.key=value, as in train.lr=1e-3")
        if key.count(".") > DEEPEST:
            raise UserError(f"override {key[:40]}…: no key has more than {DEEPEST} dots")
        value = parse_yaml(text, _name_of(key, text), secret=is_secret_name(key))
        if key.startswith("deepspeed."):
            self.read_deepspeed()
        *sections, last = key.split(".")
        node, path = self.content, ""
        for part in sections:
            path = dotted(path, part)
            if node.get(part) is None:
                node[part] = {}
                self.given.append(path)
            if path in _SHORT and isinstance(node[part], str | list):  # the short form of a mapping
                node[part] = {_SHORT[path]: node[part]}
            node = node[part]
            if not isinstance(node, dict):
                raise UserError(f"override {key}: {path} is {show(node, path)}, which has no keys")
        node[last] = value
        self.given.append(key)

    def fit_method(self) -> None:
        """If an override chose another method, drop the file's keys that this method does not have."""
        old, section = self.file_method.get("name"), self.content.get("method")
        if "method.name" not in self.given or "method" in self.given or section["name"] == old:
            return
        methods = registry()
        if isinstance(old, str) and old in methods:  # a mistyped key is a mistake, whatever method is run
            check_keys(methods[old], self.file_method, "method", lambda key: f"{self.name}: {key}")
        cls = method_class(section, self.place)
        notes = []
        for path in unknown_keys(cls, self.file_method):
            key = dotted("method", *path)
            for given in self.given:
                if given.startswith(f"{key}."):
                    raise UserError(f"override {given}: method {section['name']} has no {key}")
            if not self.overridden(key):
                *sections, last = path
                del functools.reduce(dict.__getitem__, sections, section)[last]
                notes.append(key)
        if notes:
            self.notes.append(
                f"method {section['name']} has no {', '.join(notes)}: dropped from what {self.name} says"
            )

    def read_deepspeed(self) -> None:
        """Put the file's content in the place of its path."""
        path = self.content.get("deepspeed")
        if isinstance(path, str):
            folders = [Path(), *self.path.absolute().parents, shipped_root()]
            self.content["deepspeed"], self.deepspeed_source = read_deepspeed(
                path, folders, self.place("deepspeed")
            )
        elif isinstance(path, dict):
            refuse_words(path, "deepspeed", self.place)
        elif path is not None:
            raise UserError(
                f"{self.place('deepspeed')}: found {show(path)}, wanted the path of a DeepSpeed config, "
                "such as configs/zero/zero3.json, its content, or null"
            )


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as YAML: its format, and every key with its value. The text is itself a recipe.

    The DeepSpeed config is written out, with its "auto" as it is, and without the keys of monitors' accounts:
    others may read a run directory.
    """
    content = {_FORMAT_KEY: recipe.format, **recipe.model_dump(mode="json")}
    if isinstance(recipe.deepspeed, str):
        content["deepspeed"] = read_deepspeed(recipe.deepspeed)[0]
    content["deepspeed"] = without_secrets(content["deepspeed"])
    return dump_yaml(content)


def run_identity(recipe: Recipe) -> dict:
    """What two recipes must have in common for one to resume the other's run: all that decides the trained
    numbers.

    Left out are where and how fast it runs (DeepSpeed, micro-batch, packing and grouping by length, which
    leave a step's samples and its loss as they are, checkpointing, attention, output directory), what changes
    no weight (evaluation and checkpoints), and the format and the day of chat templates, which a resumed run
    takes over from its directory.
    """
    content = recipe.model_dump(mode="json")
    for key in ("deepspeed", "output_dir"):
        del content[key]
    ignored = {
        "model": ("gradient_checkpointing", "attention"),
        "data": (
            "max_new_tokens", "eval_split", "eval", "think_step_by_step", "chat_date", "packing",
            "group_by_length",
        ),
        "train": ("micro_batch_size", *LOOKING_ON, *ON_BAD_STEPS, *ON_THE_END),
    }  # fmt: skip
    if not recipe.train.searches_lr:
        ignored["train"] += ("lr_search",)
    for section, keys in ignored.items():
        for key in keys:
            del content[section][key]
    return content
