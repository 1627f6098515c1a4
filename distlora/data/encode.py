"""From texts to tokens: the samples that are trained and evaluated.

    prompt tokens (BOS first, if the tokenizer adds one) | response tokens | EOS

The loss is taken on the response and EOS only. What is trained are the tokens of the whole text as it is
written; `distlora.data.seams` says which of them belong to the prompt.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

from distlora.data.examples import DataSection, Example, Examples
from distlora.data.seams import Tokens, tokens_of
from distlora.errors import UserError
from distlora.models.targets import IGNORE

#: Texts that the tokenizer gets at once: enough for its threads, and few enough to take little memory.
CHUNK = 1000


@dataclass(frozen=True)
class Sample:
    """One tokenised example.

    input_ids: prompt, response and EOS. labels: as long, not shifted; IGNORE on the prompt and on the very
    first token, which nothing predicts. prompt_ids: the prompt alone, for generation. answer: the expected
    final answer, if there is one.
    """

    input_ids: list[int]
    labels: list[int]
    prompt_ids: list[int]
    answer: str | None = None


@dataclass
class Encoded:
    """The samples of a split, in its order.

    truncated: how many of them were cut to the maximal length; None where nothing is cut. dropped: how
    many more were left out, and why_dropped. unanswered: how many of these have no answer in the data.
    """

    samples: list
    truncated: int | None
    dropped: int
    why_dropped: str = "no response was left"
    unanswered: int = 0


def load_split(section: DataSection, split: str, tokenizer, whole_text: bool = True) -> Encoded:
    """Reads, formats and tokenises a split expression (`train`, `test[:100]`) of a recipe's data section.

    whole_text: False for a run of the formats 1 and 2, see `distlora.data.seams`. Raises UserError for
    everything that is wrong with the section, its files or its rows, and if no sample is left.
    """
    examples = Examples(section, split)
    encoded = encode(examples, tokens_of(section, tokenizer, whole_text), section.max_length)
    if encoded.unanswered == len(examples):
        raise UserError(f"data: no row of {examples.origin} has an answer, choose another split")
    if not encoded.samples:
        raise UserError(
            f"data.max_length: none of the {len(examples)} samples of {examples.origin} has a response token "
            f"within {section.max_length} tokens, raise it"
        )
    return encoded


def encode(examples: Iterable[Example], tokens: Tokens, max_length: int) -> Encoded:
    """Tokenises examples, cuts them to max_length tokens, and drops those without a response token then."""
    encoded = Encoded([], truncated=0, dropped=0)
    shared: dict[int, int] = {}
    for chunk in chunks(examples):
        answered = [example for example in chunk if example.response is not None]
        encoded.unanswered += len(chunk) - len(answered)
        pairs = tokens.pairs([example.prompt for example in answered], [each.response for each in answered])
        for example, (prompt_ids, response_ids) in zip(answered, pairs):
            # The tokenizer makes a new int object for each token. Sharing equal ones halves the memory of a
            # large data set.
            ids = [shared.setdefault(token, token) for token in (*prompt_ids, *response_ids, tokens.eos)]
            start = max(len(prompt_ids), 1)
            if start >= min(len(ids), max_length):
                encoded.dropped += 1
                continue
            encoded.truncated += len(ids) > max_length
            ids = ids[:max_length]
            labels = [IGNORE] * start + ids[start:]
            encoded.samples.append(Sample(ids, labels, ids[: len(prompt_ids)], example.answer))
    if encoded.unanswered:
        encoded.dropped += encoded.unanswered
        encoded.why_dropped = "they have no answer, or no response was left"
    return encoded


def chunks(rows: Iterable) -> Iterator[list]:
    """The rows in lists of CHUNK; the last may be shorter."""
    stream = iter(rows)
    while chunk := list(islice(stream, CHUNK)):
        yield chunk
