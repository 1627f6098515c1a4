"""The sections of a recipe: the reference of all keys, except those of `method:`.

The keys of `method:` are the fields of the method's class.
"""

from datetime import date as Date
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    PrivateAttr,
    SerializeAsAny,
    field_validator,
    model_validator,
)

from distlora.adapter.experts import EXPERTS
from distlora.adapter.targets import ALL_LINEAR, Targets
from distlora.errors import UserError
from distlora.methods import Method, last_trained_factor, registry
from distlora.recipe.evaluation_sections import EvaluationSets
from distlora.recipe.every import Every
from distlora.recipe.improvement_sections import EarlyStoppingField, KeepBestField
from distlora.recipe.model_section import ModelSection
from distlora.recipe.optimizer_sections import SEARCH, OptimizerSection, RateSearchSection
from distlora.recipe.schedule_section import ScheduleField, ScheduleSection
from distlora.recipe.strict import Place, show
from distlora.recipe.values import (
    Count,
    NotNegative,
    OffOrCount,
    OffOrNumber,
    Positive,
    Section,
    Share,
    Text,
    ZeroOrCount,
)
from distlora.sentences import nearest

#: The newest format of a recipe. It grows when the same keys come to mean other numbers, such as other tokens
#: for the same rows. A run keeps the format that it was begun with. Format 1: a run from before the number
#: was written down. Formats 1 and 2: the prompt was tokenised apart, and a space put before the response; see
#: `distlora.data.seams`. Formats 1 to 3: special tokens named in the data were special, and a chat template
#: rendered the prompt alone; see `distlora.data.conventions`.
FORMAT = 4

#: The template, and the task, that asks for the tokenizer's chat template.
CHAT = "chat"

#: What messages call a DeepSpeed config that stands in the recipe itself.
INLINE = "the recipe's deepspeed section"


#: A name that is a whole number needs no quotes.
Label = Annotated[Text, BeforeValidator(lambda value: str(value) if type(value) is int else value)]


def _day(value: str) -> str:
    try:
        return Date.fromisoformat(value).isoformat()
    except ValueError:
        raise ValueError(f"found {value!r}, wanted a day, as in 2026-01-31") from None


def _text_of_day(value: Any) -> Any:
    """YAML makes a date of 2026-01-31."""
    return value.isoformat() if type(value) is Date else value


class DataSection(Section):
    task: Text = Field(description="how rows become prompts and answers, or inputs and labels")
    path: Text | None = Field(
        None, description="a hub data set, a local file or folder; null: the task's own"
    )
    split: Text = Field("train", description='as in the datasets library: "train", "train[:1000]"')
    eval_split: Text | None = Field(None, description="null: no evaluation, unless eval names sets")
    eval: EvaluationSets = Field(None, description="in place of eval_split: several sets, by name")
    fields: dict[str, Text] | None = Field(
        None, description="the task's field name -> the column of the data"
    )
    labels: list[Label] | None = Field(
        None, description="tasks classification and images: names in the order of their numbers, from 0 on"
    )
    template: Text | None = Field(
        None, description="prompt with {field} placeholders, chat, or paper; null: the task's own"
    )
    train_on: Literal["all", "last"] = Field(
        "all", description="task chat: the turns of the assistant that are learned"
    )
    special_tokens: bool = Field(
        False, description="whether names of special tokens in the data, such as </s>, mean these and no text"
    )
    chat_date: Annotated[Annotated[str, AfterValidator(_day)] | None, BeforeValidator(_text_of_day)] = Field(
        None, description="what a chat template sees as today; null: the day on which the run begins"
    )
    think_step_by_step: bool | None = Field(
        None, description='questions end in "Let\'s think step by step."; null: as the template does it'
    )
    max_length: int = Field(512, ge=2, description="tokens of a text; longer ones are truncated, and counted")
    packing: bool = Field(False, description="rows of max_length hold several whole samples, each by itself")
    group_by_length: bool = Field(False, description="a step's micro-batches have samples of like length")
    max_new_tokens: Count = Field(8, description="tokens generated for an exact-match answer")

    @model_validator(mode="after")
    def _saves_padding_in_one_way(self) -> Self:
        if self.packing and self.group_by_length:
            raise ValueError(
                "packing and group_by_length are both true, and packed rows have no padding to save; "
                "set one of them to false"
            )
        return self

    @property
    def evaluation_sections(self) -> dict[str, "DataSection"]:
        """By name, what each evaluation set reads as its `eval_split`; that of `eval_split` is called ""."""
        if self.eval is None:
            return {"": self} if self.eval_split else {}
        found = {}
        for name, own in self.eval.items():
            changes = {key: value for key, value in dict(own).items() if value is not None and key != "split"}
            if own.task is not None and own.task != self.task:  # whose rows have other columns
                changes = {"fields": None, "path": None} | changes
            found[name] = self.model_copy(update={"eval": None, "eval_split": own.split, **changes})
        return found

    @model_validator(mode="after")
    def _evaluates_once(self):
        if self.eval is not None and self.eval_split is not None:
            raise ValueError(
                "eval names the evaluation sets, and eval_split names another one; set eval_split to null, "
                "or add it to eval"
            )
        return self


class TrainSection(Section):
    epochs: OffOrNumber = 1.0
    steps: OffOrCount = Field(None, description="optimizer steps; wins over epochs")
    micro_batch_size: Count = Field(
        1, description="samples of one pass on one rank; packed rows, where data.packing is true"
    )
    global_batch_size: Count = Field(
        32, description="samples of one optimizer step, over all ranks and accumulation"
    )
    optimizer: OptimizerSection = OptimizerSection()
    lr: Positive | Literal["search"] = Field(
        1e-4, description="of the schedule's peak; or search, from the initialised state"
    )
    lr_search: RateSearchSection = RateSearchSection()
    schedule: ScheduleField = ScheduleSection()
    warmup_ratio: NotNegative = Field(0.02, lt=1, description="share of the steps")
    weight_decay: NotNegative = 0.0
    clip: OffOrNumber = Field(1.0, description="norm of the global gradient; 0 or null: no clipping")
    label_smoothing: Share = Field(
        0.0, lt=1, description="share of each target that is spread over all tokens or labels, in training"
    )
    neftune_alpha: OffOrNumber = Field(
        None, description="size of the noise on embeddings in training; 0 or null: none"
    )
    seed: int = Field(42, ge=0, lt=2**63)
    eval_every: Every = Field(
        200, description="steps, or a share of an epoch; 0 or null: only what the run does at its ends"
    )
    save_every: Every = Field(200, description="the same; 0 or null: only at the end")
    eval_samples: Count | None = Field(256, description="of the evaluation split; null: all")
    keep_checkpoints: Count = 2
    early_stopping: EarlyStoppingField = None
    keep_best: KeepBestField = None
    exact_match_samples: ZeroOrCount = Field(
        0, description="evaluation problems answered before and after training"
    )
    hang_timeout: OffOrNumber = Field(
        600.0, description="seconds that a rank may be silent before all end; 0 or null: no limit"
    )
    on_bad_step: Literal["stop", "skip", "rollback"] = Field(
        "stop", description="where loss or gradient is not finite: end, leave the batch out, or also go back"
    )
    bad_loss_factor: OffOrNumber = Field(
        None, description="a loss above this multiple of its running median is bad too; 0 or null: no limit"
    )
    bad_steps_limit: Count = Field(5, description="bad steps in a row that end a run which goes on after one")

    @property
    def searches_lr(self) -> bool:
        """Whether the learning rate is found before the first step."""
        return self.lr == SEARCH

    @field_validator("hang_timeout")
    @classmethod
    def _leaves_time_for_a_beat(cls, seconds: float | None) -> float | None:
        if seconds is not None and seconds < 1:
            raise ValueError(f"{seconds:g} seconds are too few: wanted at least 1, or 0 for no limit")
        return seconds

    @model_validator(mode="after")
    def _evaluates(self) -> Self:
        for key in ("early_stopping", "keep_best"):
            if getattr(self, key) is not None and self.eval_every is None:
                raise ValueError(f"{key} follows the evaluations, and eval_every is off; set it to a number")
        return self

    @model_validator(mode="after")
    def _has_a_length(self) -> Self:
        if self.epochs is None and self.steps is None:
            raise ValueError("epochs and steps are both off; set one of them to a number above 0")
        return self

    @model_validator(mode="after")
    def _decays_after_the_warm_up(self) -> Self:
        decay = self.schedule.decay_ratio
        if self.schedule.name == "warmup_stable_decay" and self.warmup_ratio + decay > 1:
            raise ValueError(
                f"warmup_ratio is {self.warmup_ratio:g} and schedule.decay_ratio {decay:g}, "
                "which is more than the whole run; lower one of them"
            )
        return self

    @model_validator(mode="after")
    def _factor_is_above_one(self) -> Self:
        if self.bad_loss_factor is not None and self.bad_loss_factor <= 1:
            raise ValueError(
                f"bad_loss_factor is {self.bad_loss_factor:g}, wanted a number above 1, or null for no limit"
            )
        return self


def method_class(section: Any, place: Place) -> type[Method]:
    """The class of the method that a section names. Raises UserError if it names none."""
    methods = registry()
    if not isinstance(section, dict):
        raise UserError(
            f"{place('method')}: found {show(section)}, wanted a mapping with a name, as in "
            f"method: {{name: {section if section in list(methods) else 'lora'}}} ({', '.join(methods)})"
        )
    if "name" not in section:
        raise UserError(f"{place('method.name')} is missing; methods: {', '.join(methods)}")
    name = section["name"]
    if not isinstance(name, str) or name not in methods:
        raise UserError(
            f"{place('method.name')}: no method is called {name}{nearest(str(name), methods)} "
            f"(methods: {', '.join(methods)})"
        )
    return methods[name]


def _method(value: Any) -> Any:
    """Makes a mapping into the method that its `name` says."""
    return method_class(value, str)(**value) if isinstance(value, dict) else value


def _names(targets: Any) -> Any:
    """One name stands for a list of it."""
    is_name = isinstance(targets, str) and targets not in ("", ALL_LINEAR, EXPERTS)
    return [targets] if is_name else targets


class Recipe(Section):
    """A whole run. `load_recipe` puts the content of the file in the place of a path in `deepspeed`."""

    model: ModelSection
    method: Annotated[SerializeAsAny[Method], BeforeValidator(_method)]
    targets: Annotated[
        Literal["all-linear", "experts"] | Annotated[list[Text], Field(min_length=1)] | Targets,
        BeforeValidator(_names),
    ] = "all-linear"
    data: DataSection
    train: TrainSection = TrainSection()
    deepspeed: Text | dict[str, Any] | None = None
    output_dir: Text

    _notes: tuple[str, ...] = PrivateAttr(())
    _deepspeed_source: str = PrivateAttr(INLINE)
    _format: int = PrivateAttr(FORMAT)

    @property
    def notes(self) -> tuple[str, ...]:
        """What loading did that the user should be told, one line each."""
        return self._notes

    @property
    def deepspeed_source(self) -> str:
        """Where the DeepSpeed config came from, as messages name it."""
        return self.deepspeed if isinstance(self.deepspeed, str) else self._deepspeed_source

    @property
    def format(self) -> int:
        """What the keys mean: see FORMAT. It is no key; users do not choose it."""
        return self._format

    @property
    def shows_chats(self) -> bool:
        """Whether the tokenizer's chat template shows the rows."""
        return self.data.task == CHAT or self.data.template == CHAT

    def in_format(self, number: int) -> "Recipe":
        """The same recipe in another format."""
        changed = self.model_copy()
        changed._format = number
        return changed

    def __eq__(self, other: object) -> bool:
        """Whether two recipes say the same, in the same format. Notes and file names do not count."""
        return (
            isinstance(other, Recipe)
            and self.format == other.format
            and self.model_dump() == other.model_dump()
        )

    @model_validator(mode="after")
    def _consistent(self):
        if self.data.packing and self.train.neftune_alpha:
            raise ValueError(
                "train.neftune_alpha has no noise for packed rows, which hold several texts; set "
                "data.packing to false, and data.group_by_length to true to save padding"
            )
        evaluates = bool(self.data.evaluation_sections)
        if self.train.exact_match_samples and not evaluates:
            asked = f"train.exact_match_samples={self.train.exact_match_samples}"
            raise ValueError(f"{asked} needs data.eval_split; name the split or set it to 0")
        for key in ("early_stopping", "keep_best"):
            if getattr(self.train, key) is not None and not evaluates:
                raise ValueError(f"train.{key} needs data.eval_split; name the split or set it to null")
        ratio = self.train.optimizer.lora_plus_ratio
        if ratio is not None and last_trained_factor(self.method) is None:
            raise ValueError(
                f"train.optimizer.lora_plus_ratio={ratio:g} is for methods that train B, "
                f"and {self.method.name} trains {', '.join(self.method.trains) or 'W'}; set it to null"
            )
        return self
