"""What is evaluated, and on what, as recipes: a run's with the changes that an evaluation may make, one for a
model that this program has not trained, and the data section of every task.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distlora.data.examples import is_same_data
from distlora.data.local_files import place_of
from distlora.data.sources import parse_split
from distlora.data.templates import CHAT, parse_template
from distlora.errors import UserError
from distlora.exports.peft_files import PeftFiles, read_peft
from distlora.exports.starting import without_start
from distlora.files.problems import dangling_link
from distlora.recipe.deepspeed_config import given_deepspeed
from distlora.recipe.load import load_recipe, load_run_recipe, recipe_of
from distlora.recipe.sections import DataSection, Recipe
from distlora.tasks import SUITES, ChatTask, ResponseTask, get_task, scored_tasks
from distlora.training.run_directory import RECIPE, first_difference, why_no_run

#: What an evaluation may change of a run: where the questions come from, and how fast they are answered.
CHANGEABLE = (
    "data", "deepspeed", "model.attention", "output_dir", "train.micro_batch_size", "train.eval_samples",
    "train.exact_match_samples", "train.hang_timeout",
)  # fmt: skip
#: Sections and keys of a DeepSpeed config that only training needs. DeepSpeed's monitors are among them.
TRAINING_ONLY = (
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping",
    "optimizer", "scheduler", "tensorboard", "wandb", "csv_monitor", "comet",
)  # fmt: skip
#: Tokens of an answer, for tasks that the recipe says nothing of.
ANSWER_TOKENS = 256
#: Tokens of a prompt at most, for models that have no recipe.
PROMPT_TOKENS = 2048
#: Rows of a classifier's batch, for models that have no recipe.
ROWS = 8


@dataclass(frozen=True)
class Asked:
    """tasks: names of tasks and suites; none for the recipe's own evaluation split. data: paths by task or
    suite. limit: the first so many questions of a task. batch_size: rows at most. by: "generation" or
    "likelihood"; None where nobody says it, which means the first. fold: adapters into the weights. fresh:
    whether earlier predictions are removed. out: where files go; None for the directory of the run, and for
    no files where there is no run.
    """

    tasks: tuple[str, ...] = ()
    data: tuple[tuple[str, str], ...] = ()
    limit: int | None = None
    batch_size: int | None = None
    by: str | None = None
    fold: bool = False
    fresh: bool = False
    out: Path | None = None

    @property
    def way(self) -> str:
        return self.by or "generation"


@dataclass(frozen=True)
class Subject:
    """recipe: of what is evaluated. own: the data section that it was trained with; None where nobody knows.
    given: keys of `data` that the command line sets. adapter: PEFT's files; None for a run, or a model alone.
    run: whether the recipe is of a run.
    """

    recipe: Recipe
    own: DataSection | None
    given: frozenset[str]
    adapter: PeftFiles | None
    run: bool

    @property
    def name(self) -> str:
        return self.recipe.output_dir if self.run else self.recipe.model.path


def subject_of_run(run_dir: Path, overrides: Sequence[str]) -> Subject:
    """Raises UserError for what is no run, and for overrides that would make another run of it."""
    path = run_dir / RECIPE
    if not path.exists():
        raise UserError(dangling_link(path) or f"{run_dir} holds no run: {why_no_run(run_dir)}")
    own = load_run_recipe(path)
    name = str(run_dir).replace("'", "''")  # quoted, so that YAML reads it as a text
    recipe = load_recipe(path, [*overrides, f"output_dir='{name}'"]).in_format(own.format)
    difference = first_difference(_what_it_is(own), _what_it_is(recipe))
    if difference:
        may = ", ".join(f"{key}.…" if key == "data" else key for key in CHANGEABLE if key != "output_dir")
        raise UserError(
            f"{run_dir} is another run than the overrides say ({difference}); an evaluation may change {may}"
        )
    recipe = recipe.model_copy(update={"method": without_start(recipe.method)})
    return Subject(recipe, own.data, _given(overrides), None, run=True)


def subject_of_model(model: str, adapter: Path | None, task: str, overrides: Sequence[str]) -> Subject:
    """A model in transformers' format, perhaps with an adapter of PEFT's. task: one that it is asked."""
    files = None if adapter is None else read_peft(adapter)
    method = "dora" if files and files.magnitudes else "lora"
    content = {
        # A pair of rank 1 that stays zero: engines are made for models with something to train.
        "model": {"path": model, "gradient_checkpointing": False}, "method": {"name": method, "rank": 1},
        "data": {"task": task, "max_new_tokens": ANSWER_TOKENS},
        "train": {"micro_batch_size": ROWS}, "output_dir": "none",
    }  # fmt: skip
    if isinstance(get_task(task), ResponseTask):
        content["data"]["max_length"] = PROMPT_TOKENS
    if files:
        content["targets"] = list(files.layers)
    recipe = recipe_of(content, "the command line", overrides)
    may = ("data", "model", "deepspeed", "train.micro_batch_size", "train.hang_timeout")
    for override in overrides:
        key = override.partition("=")[0].strip()
        if not any(key == allowed or key.startswith(f"{allowed}.") for allowed in may) or key == "model.path":
            raise UserError(f"override {key}: an evaluation of --model may change {', '.join(may)}")
    return Subject(recipe, None, _given(overrides), files, run=False)


def _given(overrides: Sequence[str]) -> frozenset[str]:
    keys = [override.partition("=")[0].strip() for override in overrides]
    return frozenset(key.split(".")[1] for key in keys if key.startswith("data."))


def _what_it_is(recipe: Recipe) -> dict[str, Any]:
    content = recipe.model_dump(mode="json")
    for key in CHANGEABLE:
        *sections, last = key.split(".")
        (content[sections[0]] if sections else content).pop(last)
    return content


def fitted_to_ranks(recipe: Recipe, world_size: int) -> Recipe:
    """The recipe with batches for any number of ranks, and a DeepSpeed config without what only training
    needs. Raises UserError where the config cannot be read."""
    train = recipe.train.model_copy(update={"global_batch_size": recipe.train.micro_batch_size * world_size})
    deepspeed = recipe.deepspeed
    if deepspeed is not None:
        given, _ = given_deepspeed(recipe)
        deepspeed = {key: value for key, value in given.items() if key not in TRAINING_ONLY}
    return recipe.model_copy(update={"train": train, "deepspeed": deepspeed})


def sections_of(subject: Subject, asked: Asked) -> dict[str, DataSection]:
    """By task, the data section to read, its split in `eval_split`.

    Raises UserError for unknown tasks, for --data of a task that was not asked for, for tasks that cannot be
    asked together or in this way, and for a split that the run was trained on.
    """
    names = scored_tasks(asked.tasks)
    _check_together(asked, names)
    paths = _paths(asked, names)
    if "path" in subject.given:
        raise UserError("override data.path: with --tasks a path is given as --data TASK=PATH")
    sections = {name: _section(subject, name, paths.get(name)) for name in names}
    for section in sections.values():
        _refuse_training_rows(subject, section)
    return sections


def _check_together(asked: Asked, names: Sequence[str]) -> None:
    """Raises UserError for a suite whose tasks no single model predicts, and for options of answers where
    labels are predicted."""
    for suite in SUITES.keys() & set(asked.tasks):
        labels = {getattr(get_task(name), "labels", ()) for name in SUITES[suite]}
        if len(labels) > 1:
            raise UserError(
                f"--tasks {suite}: its tasks have different labels, so each is a run of its own; name one of "
                f"{', '.join(SUITES[suite])}"
            )
    for name in names:
        if not isinstance(get_task(name), ResponseTask):
            for option, is_set in (("--by", asked.by), ("--merge", asked.fold)):
                if is_set:
                    what = "labels" if hasattr(get_task(name), "metrics") else "only texts"
                    raise UserError(f"{option} is for tasks with answers, and {name} has {what}; omit it")


def _paths(asked: Asked, names: Sequence[str]) -> dict[str, str]:
    """The paths of tasks. A task's own is taken before its suite's."""
    own: dict[str, str] = {}
    of_suites: dict[str, str] = {}
    given: set[str] = set()
    for name, path in asked.data:
        members = scored_tasks([name])
        if not set(members) <= set(names):
            raise UserError(f"--data {name}={path}: {name} is not among --tasks; add it, or leave it out")
        if name in given:
            raise UserError(f"--data {name}={path}: another path of {name} was given before; leave one out")
        given.add(name)
        (of_suites if name in SUITES else own).update(dict.fromkeys(members, path))
    return of_suites | own


def _section(subject: Subject, name: str, path: str | None) -> DataSection:
    here, own, task = subject.recipe.data, subject.own, get_task(name)
    if own is not None and own.task == name:
        begun = own.model_copy(update={} if path is None else {"path": path})
    elif isinstance(task, ResponseTask):
        begun = DataSection(
            task=name, path=path, max_length=here.max_length,
            max_new_tokens=max(here.max_new_tokens, ANSWER_TOKENS),
            template=None if own is None or isinstance(task, ChatTask) else _portable(own),
            think_step_by_step=None if own is None else own.think_step_by_step,
            special_tokens=own is not None and own.special_tokens,
            chat_date=None if own is None else own.chat_date,
        )  # fmt: skip
    else:
        named = own is None or bool(getattr(task, "labels", ()))
        labels = None if named else own.labels
        begun = DataSection(task=name, path=path, max_length=here.max_length, labels=labels)
    is_file = begun.path is not None and place_of(begun.path)[0].is_file()
    split = "train" if is_file else task.eval_split  # a file has no other split
    if own is not None and own.task == name and path is None:
        split = own.eval_split or split
    changes = {key: getattr(here, key) for key in subject.given - {"task", "path", "split"}}
    return begun.model_copy(update={"eval_split": split, **changes})


def _refuse_training_rows(subject: Subject, section: DataSection) -> None:
    """Raises UserError where nobody has asked to score a run on rows that it was trained on.

    The run's own evaluation split may be another slice of its training split; one that nobody has named may
    not be of the same split.
    """
    own, split = subject.own, section.eval_split
    if own is None or "eval_split" in subject.given or not is_same_data(own, section):
        return
    trained, scored = ({part.name for part in parse_split(text)} for text in (own.split, split))
    is_named = own.task == section.task and split == own.eval_split
    if split == own.split or (trained & scored and not is_named):
        raise UserError(
            f"{subject.name} was trained on data.split={own.split}, and {section.task} would be scored on "
            f"{split} of the same data; name a split, as in data.eval_split={next(iter(scored))}[-10%:]"
        )


def _portable(own: DataSection) -> str | None:
    """The template with which a model was trained, if it means the same for rows of another task."""
    template = CHAT if isinstance(get_task(own.task), ChatTask) else own.template
    if template is None or template == CHAT or set(parse_template(template).names) <= {"prompt", "input"}:
        return template
    return None
