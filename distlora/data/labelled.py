"""Classification and regression: rows with a label and a text, or a pair of texts, made into samples and
batches. Of a regression the label is a score.

The tokenizer makes the tokens of a row by its own rules, as the encoder has seen them in pretraining:
`[CLS] text [SEP] pair [SEP]` for BERT, `<s> text </s></s> pair </s>` for RoBERTa.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from distlora.data import examples
from distlora.data.batches import pad_rows
from distlora.data.columns import cell_text, cells_of, columns_of, require_column, row_name
from distlora.data.conventions import NEWEST, Conventions
from distlora.data.encode import Encoded, chunks, of_row
from distlora.data.labelled_texts import LabelledTexts
from distlora.data.labels import LabelNames, is_unlabelled, number_in, shown, stored_names, whole_number
from distlora.data.sources import Row
from distlora.errors import UserError
from distlora.models.targets import IGNORE
from distlora.progress import each
from distlora.sentences import listed, nearest
from distlora.tasks import ScoreTask, TextTask, get_task

#: What a column can be used for. A data set may have no pairs.
ROLES = ("text", "pair", "label")

#: The output of a regression.
SCORE = ("score",)


class DataSection(examples.DataSection, Protocol):
    """What this file reads of a recipe's `data:` section, beside what all tasks have."""

    labels: list[str] | None


#: A text, the second one of a pair or None, and the number of the label, the score, or None.
LabelledRow = tuple[str, str | None, int | float | None]


@dataclass(frozen=True)
class LabelledSample:
    """One tokenised row.

    segments: for each token whether it belongs to the text (0) or the pair (1); None if the tokenizer does
    not tell them apart. label: its number; of a regression the score, a float.
    """

    input_ids: list[int]
    segments: list[int] | None
    label: int | float

    def identity(self) -> list:
        """What tells it from others, for JSON."""
        return [self.input_ids, self.label]


def label_names(section: DataSection) -> tuple[str, ...]:
    """The names of the labels that a section's task tells apart, in the order of their numbers; of a
    regression the name of its only output.

    Raises UserError if the section does not say them, or says them wrongly.
    """
    task, given = get_task(section.task), section.labels
    if isinstance(task, ScoreTask):
        if given is not None:
            raise UserError(f"data.labels: the task {section.task} predicts a score, remove the labels")
        return SCORE
    own = task.labels
    if own and given is not None:
        raise UserError(
            f"data.labels: the task {section.task} has its own labels ({', '.join(own)}), remove these"
        )
    if not own and not given:
        raise UserError(
            f"data.labels: the task {section.task} needs them, list the names, as in [negative, positive]"
        )
    if given and (len(given) < 2 or len({whole_number(name) or name for name in given}) < len(given)):
        raise UserError(
            f"data.labels: {', '.join(given)} are not at least two different names, correct the list"
        )
    return own or tuple(given)


class LabelledRows:
    """The rows of a split in order.

    To make one checks the section against the columns. roles: what a column can be used for. names_of: finds
    the names of the labels.
    """

    roles = ROLES
    names_of = staticmethod(label_names)

    def __init__(self, section: DataSection, split: str):
        self.labels = self.names_of(section)
        if section.template is not None:
            raise UserError(
                f"data.template: the task {section.task} shows {self.roles[0]}s as they are, "
                "remove the template"
            )
        self.rows = self.read(section, split)
        self.origin = examples.origin(section, split)
        self._task = get_task(section.task)
        self._columns = self._assign_columns(self._task, section.task, section.fields or {})
        self._names = self._find_names(section)

    def read(self, section: DataSection, split: str) -> Sequence[Row]:
        return examples.load_rows(section, split)

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[LabelledRow]:
        pair = self._columns.get("pair")
        for position, row in enumerate(self.rows):
            text = cell_text(row, self._columns["text"], position, self.origin)
            second = pair and cell_text(row, pair, position, self.origin)
            yield text, second, self._label(row, position)

    def _assign_columns(self, task: TextTask, name: str, fields: dict[str, str]) -> dict[str, str]:
        """The column of each role: the recipe's, else the first of the task's names that the data set has."""
        for role, column in fields.items():
            if role not in self.roles:
                hint = nearest(role, self.roles) or f", choose from {', '.join(self.roles)}"
                raise UserError(f"data.fields: unknown name {role!r}{hint}")
            require_column(self.rows, column, f"data.fields: {role}", self.origin)
        available, columns = columns_of(self.rows), dict(fields)
        for role, names in task.columns.items():
            if role not in fields:
                columns[role] = next((column for column in names if column in available), names[0])
                require_column(self.rows, columns[role], f"{role} of the task {name}", self.origin)
        for role in (self.roles[0], "label"):
            if role not in columns:
                raise UserError(
                    f"data.fields: no column for {role}, set it, as in {{text: sentence, label: label}}"
                )
        return columns

    def _find_names(self, section: DataSection) -> LabelNames:
        """What the cells of the label's column mean. Raises UserError where that cannot be told."""
        column, names = self._columns["label"], LabelNames(self.labels)
        stored = stored_names(self.rows, column)
        if stored and set(stored) == set(self.labels):
            return LabelNames(self.labels, stored)
        if isinstance(self._task, ScoreTask) or section.labels is None or names.are_numbers:
            return names
        if stored:
            raise UserError(
                f"data.labels: {listed(self.labels)} are not the names that column {column!r} of "
                f"{self.origin} has for its numbers ({listed(stored)}); list these names, in any order, or "
                "the numbers"
            )
        doubt = names.doubt(cells_of(self.rows, column))
        if doubt:
            raise UserError(
                f"data.labels: column {column!r} of {self.origin} holds {doubt}; list the labels as numbers"
            )
        return names

    def _label(self, row: Row, position: int) -> int | float | None:
        """The number of a row's label, which the row holds as a name or as a number; or its score.

        None for a row without one.
        """
        value = row.get(self._columns["label"])
        if isinstance(self._task, ScoreTask):
            return self._score(value, position)
        number = self._names.number(value)
        if number is None and not is_unlabelled(value):
            raise UserError(
                f"data: {row_name(position, self.origin)} has the label {shown(value)}, which is none of "
                f"{self._names.known()}{self._names.advice(value)}"
            )
        return number

    def _score(self, value: Any, position: int) -> float | None:
        lowest, highest = self._task.lowest, self._task.highest
        score = number_in(value)
        if score is not None and lowest <= score <= highest:
            return score
        if is_unlabelled(value):
            return None
        comma = isinstance(value, str) and number_in(value.replace(",", ".", 1)) is not None and score is None
        advice = f"write it as {value.strip().replace(',', '.', 1)}" if comma else "correct it"
        raise UserError(
            f"data: {row_name(position, self.origin)} has the score {shown(value)}, "
            f"which is no number from {lowest:g} to {highest:g}, {advice}"
        )


def load_labelled(section: DataSection, split: str, tokenizer, conventions: Conventions = NEWEST) -> Encoded:
    """Reads and tokenises a split expression of a recipe's data section.

    Rows longer than the maximum are cut and counted; of a pair, the longer text is cut first. Rows without a
    label are dropped. Raises UserError for everything that is wrong with the section, its files or its rows.
    """
    rows, number = LabelledRows(section, split), 0
    encoded = Encoded([], truncated=0, dropped=0, why_dropped="they have no label")
    texts = LabelledTexts(tokenizer, conventions.plain)
    for chunk in each(chunks(rows), "tokenising", "rows", len(rows), len):
        numbers = [number + place for place, row in enumerate(chunk) if row[2] is not None]
        number += len(chunk)
        encoded.dropped += len(chunk) - len(numbers)
        if numbers:
            with of_row(rows.origin, numbers):
                _encode(encoded, [row for row in chunk if row[2] is not None], section.max_length, texts)
    if not encoded.samples:
        raise UserError(f"data: no row of {rows.origin} has a label, choose another split")
    return encoded


def _encode(encoded: Encoded, chunk: list[LabelledRow], max_length: int, texts: LabelledTexts) -> None:
    """Appends the samples of a chunk whose rows all have a label."""
    first, second, labels = zip(*chunk)
    columns = [list(first)] if second[0] is None else [list(first), list(second)]
    rows, cut = texts.encode(columns, max_length)
    encoded.truncated += cut
    encoded.samples += [LabelledSample(*row, label) for row, label in zip(rows, labels)]


def collate_labelled(
    samples: Sequence[LabelledSample], pad_id: int, device: torch.device | str = "cpu"
) -> dict[str, Tensor]:
    """Right-padded `input_ids`, `attention_mask` and, if the samples have segments, `token_type_ids`, int64
    (batch, longest); and `labels`, int64 (batch,), of a regression float32.

    No samples give a 1 × 2 batch without a label, for a pass of weight zero.
    """
    if not samples:
        ids = torch.full((1, 2), pad_id, device=device)
        # The mask is 1 for the same reason as in `collate`.
        return {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "labels": torch.full((1,), IGNORE, device=device),
        }
    ids = [sample.input_ids for sample in samples]
    batch = {
        "input_ids": pad_rows(ids, pad_id, device),
        "attention_mask": pad_rows([[1] * len(row) for row in ids], 0, device),
        "labels": torch.tensor(
            [sample.label for sample in samples],
            dtype=torch.float32 if isinstance(samples[0].label, float) else torch.int64,
            device=device,
        ),
    }
    if samples[0].segments is not None:
        batch["token_type_ids"] = pad_rows([sample.segments for sample in samples], 0, device)
    return batch
