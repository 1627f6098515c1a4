"""Which runs can be compared, and what the settings are in which they differ."""

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from distlora.methods import TrainsWeight
from distlora.recipe.load import LOOKING_ON
from distlora.report.numbers import ABSENT
from distlora.report.runs import RunRecord

Value = TypeVar("Value", bound=Hashable)

METHOD, RANK = "method.name", "method.rank"
#: Keys of a recipe that change nothing that a report tells.
IGNORED = ("output_dir", "train.seed", "data.max_new_tokens", *(f"train.{key}" for key in LOOKING_ON))
#: Keys of the data section that say what is learned, and by which texts.
DATA = (
    "task", "path", "split", "eval_split", "fields", "labels", "template", "train_on", "special_tokens",
    "max_length",
)  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """Runs that differ in nothing but their seeds. values: text of every column of the group.

    label: what tells the setting apart from the others of its group, in a few words.
    """

    label: str
    values: tuple[str, ...]
    runs: tuple[RunRecord, ...]

    @property
    def method(self) -> str:
        return self.runs[0].recipe.method.name

    @property
    def seeds(self) -> str:
        return ", ".join(str(run.recipe.train.seed) for run in self.runs)


@dataclass(frozen=True)
class Group:
    """Runs that can be compared. facts: what they have in common and others have not, by name.

    columns: headers of the settings' values.
    """

    facts: Mapping[str, str]
    columns: tuple[str, ...]
    settings: tuple[Setting, ...]

    @property
    def runs(self) -> list[RunRecord]:
        return [run for setting in self.settings for run in setting.runs]


def comparable_groups(runs: Sequence[RunRecord]) -> list[Group]:
    """The runs in groups of the same base model, data, and budget, in the order in which they were given."""
    found: dict[tuple, list[RunRecord]] = {}
    for run in runs:
        found.setdefault(tuple(common_facts(run).items()), []).append(run)
    return [_group(dict(facts), members) for facts, members in found.items()]


def common_facts(run: RunRecord) -> dict[str, str]:
    """What two runs must have in common to be compared, by name, as text."""
    recipe, data = run.recipe, run.recipe.data
    facts = {"base model": recipe.model.path}
    facts |= {f"data.{key}": text_of(getattr(data, key)) for key in DATA}
    facts["format of the data"] = str(recipe.format)
    if run.steps:
        facts["budget"] = f"{run.steps * run.batch:,} samples"
    else:
        epochs = recipe.train.epochs
        facts["budget"] = f"{text_of(epochs)} {'epoch' if epochs == 1 else 'epochs'}"
    return facts


def different_facts(groups: Sequence[Group]) -> list[str]:
    """Names of the facts in which the groups differ."""
    return [name for name in groups[0].facts if len({group.facts[name] for group in groups}) > 1]


def flatten(content: Any, prefix: str = "") -> dict[str, str]:
    """The keys of a nested mapping, dotted, with their values as text."""
    found: dict[str, str] = {}
    for key, value in content.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            found |= flatten(value, f"{name}.")
        else:
            found[name] = text_of(value)
    return found


def text_of(value: Any) -> str:
    """A setting's value in a table."""
    if value is None:
        return ABSENT
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, (list, tuple)):
        return " ".join(map(text_of, value))
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {text_of(item)}" for key, item in value.items()) or ABSENT
    return str(value)


def differing_keys(settings: Sequence[Mapping[str, str]]) -> list[str]:
    """Keys with more than one value among the runs that have them; others have them not at all, because they
    run another method or no DeepSpeed.
    """
    keys = dict.fromkeys(key for flat in settings for key in flat)
    return [key for key in keys if len({flat[key] for flat in settings if key in flat}) > 1]


def _settings_of(run: RunRecord) -> dict[str, str]:
    flat = flatten(run.recipe.model_dump(mode="json"))
    if isinstance(run.recipe.method, TrainsWeight):
        flat[RANK] = ABSENT
    return {key: value for key, value in flat.items() if key not in IGNORED}


def _group(facts: Mapping[str, str], runs: Sequence[RunRecord]) -> Group:
    flats = [_settings_of(run) for run in runs]
    others = [key for key in differing_keys(flats) if key not in (METHOD, RANK)]
    keys = [METHOD, RANK, *others]
    members: dict[tuple[str, ...], list[RunRecord]] = {}
    for run, flat in zip(runs, flats):
        members.setdefault(tuple(flat.get(key, ABSENT) for key in keys), []).append(run)
    names = _short_names(keys)
    labels = _labels(list(members), names)
    settings = [Setting(label, values, tuple(members[values])) for label, values in zip(labels, members)]
    return Group(facts, tuple(names), tuple(sorted(settings, key=_order)))


def _order(setting: Setting) -> tuple:
    """By method and rank; what else differs keeps its order."""
    _, rank, *_ = setting.values
    return setting.method, int(rank) if rank.isdigit() else 0


def _short_names(keys: Sequence[str]) -> list[str]:
    """The last part of every key; the whole key where another one ends alike."""
    last = [key.rpartition(".")[2] for key in keys]
    names = [short if last.count(short) == 1 else key for key, short in zip(keys, last)]
    return ["method", "rank", *names[2:]]


def _labels(rows: Sequence[tuple[str, ...]], names: Sequence[str]) -> list[str]:
    """For every row, the method and whatever else is needed to tell it from rows with an equal one."""
    labels = []
    for row in rows:
        rivals = [other for other in rows if other is not row and other[0] == row[0]]
        needed = [
            place
            for place in range(1, len(row))
            if row[place] != ABSENT and any(other[place] != row[place] for other in rivals)
        ]
        labels.append(" ".join([row[0], *(f"{names[place]} {row[place]}" for place in needed)]))
    return labels


def unique(values: Iterable[Value]) -> list[Value]:
    """The values without repetition, in their order."""
    return list(dict.fromkeys(values))
