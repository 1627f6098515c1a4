"""Continued pretraining: rows with a text, made into pieces of documents.

    document   BOS, if the tokenizer adds one | tokens of the text | EOS
    pieces     its first `max_length` tokens; then so many at a time, each piece after the token that comes
               before it

That token is what the piece's own first token is predicted from, and has no loss. So every token of a
document, but for the very first, which nothing predicts, is learned exactly once.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from distlora.data import examples
from distlora.data.columns import cell_text, require_column
from distlora.data.conventions import NEWEST, Conventions
from distlora.data.encode import Encoded, Sample, Shared, chunks, of_row
from distlora.data.seams import tokens_of
from distlora.errors import UserError
from distlora.models.targets import IGNORE
from distlora.progress import each
from distlora.sentences import nearest
from distlora.tasks import get_task


class DataSection(examples.DataSection, Protocol):
    """What this file reads of a recipe's `data:` section."""


@dataclass(frozen=True)
class Piece(Sample):
    """A piece of a document; it has no prompt, and no answer."""

    def identity(self) -> list:
        """What tells it from others, for JSON."""
        return self.input_ids


@dataclass
class EncodedDocuments(Encoded):
    """The pieces of a split, in its order. documents: how many they are of; cut: how many of these are
    longer than the maximal length."""

    documents: int = 0
    cut: int = 0


class CompletionRows:
    """The texts of a split in order. To make one checks the section against the columns."""

    def __init__(self, section: DataSection, split: str):
        columns = get_task(section.task).columns
        if section.template is not None:
            raise UserError(
                f"data.template: the task {section.task} learns texts as they are, remove the template"
            )
        for role in section.fields or {}:
            if role not in columns:
                hint = nearest(role, columns) or f", wanted {', '.join(columns)}"
                raise UserError(f"data.fields: unknown name {role!r}{hint}")
        self.rows = examples.load_rows(section, split)
        self.origin = examples.origin(section, split)
        self._column = {**columns, **(section.fields or {})}["text"]
        where = "data.fields: text" if section.fields else f"text of the task {section.task}"
        require_column(self.rows, self._column, where, self.origin)

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[str]:
        for position, row in enumerate(self.rows):
            yield cell_text(row, self._column, position, self.origin)


def load_completion(
    section: DataSection, split: str, tokenizer, conventions: Conventions = NEWEST
) -> EncodedDocuments:
    """Reads and tokenises a split expression of a recipe's data section.

    Texts without a character are left out and counted. Raises UserError for everything that is wrong with the
    section, its files or its rows, and if there is no other text.
    """
    rows, tokens = CompletionRows(section, split), tokens_of(section, tokenizer, conventions)
    encoded = EncodedDocuments([], truncated=None, dropped=0, why_dropped="they are empty")
    shared = Shared()
    for chunk in each(chunks(enumerate(rows)), "tokenising", "texts", len(rows), len):
        kept = [(number, text) for number, text in chunk if text.strip()]
        encoded.dropped += len(chunk) - len(kept)
        with of_row(rows.origin, [number for number, _ in kept]):
            documents = tokens.ids([text for _, text in kept])
        for ids in documents:
            pieces = pieces_of(shared([*tokens.started(ids), tokens.eos]), section.max_length)
            encoded.documents += 1
            encoded.cut += len(pieces) > 1
            encoded.samples += [Piece(piece, [IGNORE, *piece[1:]], []) for piece in pieces]
    if not encoded.samples:
        raise UserError(f"data: no row of {rows.origin} has a text, choose another split")
    return encoded


def pieces_of(document: Sequence[int], length: int) -> list[list[int]]:
    """A document in pieces of at most `length` ≥ 2 tokens, each of which begins with the last token of the
    one before. One of less than two tokens has none, because nothing in it is predicted.
    """
    starts = range(0, len(document) - 1, length - 1)
    return [list(document[start : start + length]) for start in starts]
