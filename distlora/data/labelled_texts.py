"""Texts and pairs of texts as an encoder reads them: with the special tokens that its tokenizer puts around
them, while those that are named in a text are text.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from distlora.data.special_tokens import TextEncoder, Unreadable, call


class EncodedText(NamedTuple):
    """segments: as `LabelledSample.segments`."""

    ids: list[int]
    segments: list[int] | None


class LabelledTexts:
    """A tokenizer of texts with labels. plain: as of `TextEncoder`."""

    def __init__(self, tokenizer, plain: bool = True):
        self._tokenizer, self._encoder = tokenizer, TextEncoder(tokenizer, plain)

    def encode(self, columns: Sequence[list[str]], max_length: int) -> tuple[list[EncodedText], int]:
        """The rows, cut to max_length tokens, and how many of them were cut. columns: the texts, and those of
        the pairs if there are any. Raises Unreadable.
        """
        rows = list(zip(*columns))
        naming = [number for number, row in enumerate(rows) if any(map(self._encoder.names_in, row))]
        others = [number for number in range(len(rows)) if number not in set(naming)]
        found, cut = self._batch(columns, others, max_length)
        for number in naming:
            found[number], is_cut = self._as_text(rows[number], number, max_length)
            cut += is_cut
        return [found[number] for number in range(len(rows))], cut

    def _batch(
        self, columns: Sequence[list[str]], chosen: list[int], max_length: int
    ) -> tuple[dict[int, EncodedText], int]:
        if not chosen:
            return {}, 0
        found = dict(zip(chosen, self._call(columns, chosen)))
        long = [number for number in chosen if len(found[number].ids) > max_length]
        if long:
            cut = self._call(columns, long, truncation=True, max_length=max_length)
            found |= dict(zip(long, cut))
        return found, len(long)

    def _call(self, columns: Sequence[list[str]], chosen: list[int], **more: Any) -> list[EncodedText]:
        # Without verbose=False, transformers would warn of texts beyond the model's length. They are cut.
        options = dict(return_attention_mask=False, verbose=False, **more)
        parts = [[column[number] for number in chosen] for column in columns]
        return _rows(call(self._tokenizer, parts, options, chosen))

    def _as_text(self, texts: tuple[str, ...], number: int, max_length: int) -> tuple[EncodedText, bool]:
        """A row that names special tokens."""
        around = self._tokenizer.num_special_tokens_to_add(pair=len(texts) > 1)
        for is_broken in (False, True):
            whole = self._one(texts, number, is_broken)
            if self._encoder.count_special(whole.ids) == around:
                is_long = len(whole.ids) > max_length
                options = dict(truncation=True, max_length=max_length)
                return (self._one(texts, number, is_broken, **options) if is_long else whole), is_long
        raise Unreadable(
            number,
            "names a special token in its text that the tokenizer does not read as text; "
            "remove it, or set data.special_tokens to true",
        )

    def _one(self, texts: tuple[str, ...], number: int, is_broken: bool, **more: Any) -> EncodedText:
        options = dict(return_attention_mask=False, verbose=False, **more)
        if not is_broken:
            columns = [[text] for text in texts]
            return _rows(call(self._tokenizer, columns, options | {"split_special_tokens": True}, [number]))[
                0
            ]
        columns = [[self._encoder.broken(text)] for text in texts]
        ids, segments = _rows(call(self._encoder.twin, columns, options, [number]))[0]
        left = [place for place, token in enumerate(ids) if token != self._encoder.break_id]
        return EncodedText([ids[i] for i in left], segments and [segments[i] for i in left])


def _rows(tokens) -> list[EncodedText]:
    segments = tokens.get("token_type_ids") or [None] * len(tokens["input_ids"])
    return [EncodedText(*row) for row in zip(tokens["input_ids"], segments)]
