"""From texts to tokens: the samples that are trained and evaluated.

    prompt tokens (BOS first, if the tokenizer adds one) | response tokens | EOS

The loss is taken on the response and EOS only. What is trained are the tokens of the whole text as it is
written; `distlora.data.seams` says which of them belong to the prompt, and `distlora.data.chat` which of a
conversation's are the assistant's.
"""

import logging
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice

from distlora.data.chat import Chat
from distlora.data.chat_template import Conversation
from distlora.data.chat_tokens import ChatTokens
from distlora.data.columns import row_name
from distlora.data.conventions import NEWEST, Conventions
from distlora.data.conversations import ChatExamples
from distlora.data.examples import DataSection, Example, Examples
from distlora.data.seams import Tokens, tokens_of
from distlora.data.special_tokens import Unreadable
from distlora.data.templates import CHAT
from distlora.errors import UserError
from distlora.models.targets import IGNORE
from distlora.progress import each
from distlora.tasks import ChatTask, get_task

log = logging.getLogger(__name__)

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


def examples_of(section: DataSection, split: str, scoring: bool = False) -> Examples | ChatExamples:
    """The rows of a split in the form of the section's task. scoring: as for `Examples`."""
    if isinstance(get_task(section.task), ChatTask):
        return ChatExamples(section, split)
    return Examples(section, split, scoring)


def chat_of(section: DataSection, tokenizer, conventions: Conventions) -> Chat | None:
    """The chat template of a section whose rows are shown as conversations."""
    if isinstance(get_task(section.task), ChatTask) or (section.template == CHAT and conventions.whole_chat):
        return Chat(tokenizer, conventions)
    return None


def load_split(section: DataSection, split: str, tokenizer, conventions: Conventions = NEWEST) -> Encoded:
    """Reads, formats and tokenises a split expression (`train`, `test[:100]`) of a recipe's data section.

    Raises UserError for everything that is wrong with the section, its files or its rows, and if no sample is
    left.
    """
    examples = examples_of(section, split)
    chat = chat_of(section, tokenizer, conventions)
    if chat is None:
        encoded = encode(examples, tokens_of(section, tokenizer, conventions), section.max_length)
    else:
        encoded = encode_chats(examples, chat, section)
    if encoded.unanswered == len(examples):
        raise UserError(f"data: no row of {examples.origin} has an answer, choose another split")
    if not encoded.samples:
        raise UserError(
            f"data.max_length: none of the {len(examples)} samples of {examples.origin} has a response token "
            f"within {section.max_length} tokens, raise it"
        )
    return encoded


def encode(examples: Examples, tokens: Tokens, max_length: int) -> Encoded:
    """Tokenises examples, cuts them to max_length tokens, and drops those without a response token then."""
    encoded, shared = Encoded([], truncated=0, dropped=0), Shared()
    for numbers, answered in answered_chunks(examples, encoded):
        prompts, responses = [each.shown for each in answered], [each.response for each in answered]
        with of_row(examples.origin, numbers):
            pairs = tokens.pairs(prompts, responses)
        for example, (prompt_ids, response_ids) in zip(answered, pairs):
            ids = shared([*prompt_ids, *response_ids, tokens.eos])
            start = max(len(prompt_ids), 1)
            if start >= min(len(ids), max_length):
                encoded.dropped += 1
                continue
            encoded.truncated += len(ids) > max_length
            ids = ids[:max_length]
            labels = [IGNORE] * start + ids[start:]
            encoded.samples.append(Sample(ids, labels, ids[: len(prompt_ids)], example.answer))
    return encoded


def encode_chats(examples: Examples | ChatExamples, chat: Chat, section: DataSection) -> Encoded:
    """Tokenises conversations. Of a conversation of the task `chat` that is longer than `data.max_length` the
    longest part is kept that ends with a turn of the assistant; another text is cut as every text is.
    """
    whole_turns = isinstance(get_task(section.task), ChatTask)
    last_only = whole_turns and section.train_on == "last"
    encoded, shared = Encoded([], truncated=0, dropped=0), Shared()
    thoughts_left_out = 0
    encoded.why_dropped = "no turn that is trained was left" if whole_turns else encoded.why_dropped
    for numbers, answered in answered_chunks(examples, encoded):
        conversations = [conversation_of(example) for example in answered]
        if last_only:
            conversations = [each.with_loss_on_last() for each in conversations]
        with of_row(examples.origin, numbers):
            found = chat.encode(conversations)
            if whole_turns:
                kept = [_whole_turns(chat, *each, section.max_length) for each in zip(conversations, found)]
            else:
                kept = list(zip(conversations, found))
        for example, whole, (conversation, turns) in zip(answered, found, kept):
            sample = turns and _chat_sample(example, conversation, turns, section.max_length, shared)
            if sample is None:
                encoded.dropped += 1
                continue
            thoughts_left_out += not turns.keeps_thoughts
            encoded.truncated += turns is not whole or len(whole.ids) > section.max_length
            encoded.samples.append(sample)
    if thoughts_left_out:
        log.warning(
            "data: the chat template leaves out the thoughts of the last answer of %d samples of %s; "
            "they are not learned",
            thoughts_left_out, examples.origin,
        )  # fmt: skip
    return encoded


def conversation_of(example: Example) -> Conversation:
    return example.conversation or Conversation.of_texts(example.prompt, example.response)


def _whole_turns(
    chat: Chat, conversation: Conversation, found: ChatTokens, max_length: int
) -> tuple[Conversation, ChatTokens | None]:
    """The longest part of a conversation that fits and ends with a turn of the assistant, None if there is
    none that is trained.
    """
    if found.turns[-1].stop <= max_length:
        return conversation, found
    messages = conversation.messages
    ends = [number for number, message in enumerate(messages) if message["role"] == "assistant"][:-1]
    parts: dict[int, ChatTokens] = {}

    def fits(number: int) -> bool:
        if number not in parts:
            (parts[number],) = chat.encode([conversation.up_to(number)])
        return parts[number].turns[-1].stop <= max_length

    # A part nearly always has the tokens of the whole: two parts are enough to know.
    short = [turn.message for turn in found.turns if turn.stop <= max_length]
    count = ends.index(short[-1]) + 1 if short else 0
    if (count and not fits(ends[count - 1])) or (count < len(ends) and fits(ends[count])):
        count = bisect_left(ends, True, key=lambda number: not fits(number))
    if not count or not conversation.up_to(ends[count - 1]).learned():
        return conversation, None
    return conversation.up_to(ends[count - 1]), parts[ends[count - 1]]


def _chat_sample(
    example: Example, conversation: Conversation, found: ChatTokens, max_length: int, shared: "Shared"
) -> Sample | None:
    """None if no token is left that there is a loss on."""
    ids = shared(found.ids[:max_length])
    labels = [IGNORE] * len(ids)
    for turn in found.turns:
        if conversation.trained[turn.message]:
            for first, stop in turn.ranges:
                labels[max(first, 1) : stop] = ids[max(first, 1) : stop]
    if all(label == IGNORE for label in labels):
        return None
    return Sample(ids, labels, ids[: found.turns[-1].start], example.answer)


class Shared:
    """Makes equal tokens one object: the tokenizer makes a new int for each. This halves the memory of a
    large data set.
    """

    def __init__(self):
        self._known: dict[int, int] = {}

    def __call__(self, ids: list[int]) -> list[int]:
        return [self._known.setdefault(token, token) for token in ids]


def answered_chunks(
    examples: Iterable[Example], encoded: Encoded
) -> Iterator[tuple[list[int], list[Example]]]:
    """The examples with a response, in lists with their numbers; the others are counted as dropped."""
    number = 0
    for chunk in each(chunks(examples), "tokenising", "rows", len(examples), len):
        answered = [(number + i, each) for i, each in enumerate(chunk) if each.response is not None]
        number += len(chunk)
        encoded.unanswered += len(chunk) - len(answered)
        if answered:
            yield [place for place, _ in answered], [example for _, example in answered]
    if encoded.unanswered:
        encoded.dropped += encoded.unanswered
        encoded.why_dropped = f"they have no answer, or {encoded.why_dropped}"


@contextmanager
def of_row(origin: str, numbers: Sequence[int]) -> Iterator[None]:
    """Makes Unreadable a UserError that names the row. numbers: of the rows that are handed over."""
    try:
        yield
    except Unreadable as unreadable:
        row = row_name(numbers[unreadable.index], origin)
        raise UserError(f"data: {row} {unreadable.reason}") from None


def chunks(rows: Iterable) -> Iterator[list]:
    """The rows in lists of CHUNK; the last may be shorter."""
    stream = iter(rows)
    while chunk := list(islice(stream, CHUNK)):
        yield chunk
