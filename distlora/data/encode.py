"""From texts to tokens: the samples that are trained and evaluated.

    prompt tokens (BOS first, if the tokenizer adds one) | response tokens | EOS

The loss is taken on the response and EOS only. The prompt is tokenised alone, exactly as generation will
present it. The response's tokens are those that follow the prompt's tokens in the tokenised whole text; so
every kind of tokenizer treats white space between the two as it is used to. If the whole text does not begin
with the prompt's tokens, because one token spans the border, the response is tokenised alone as well.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

from distlora.data.examples import CHAT, DataSection, Example, Examples
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
    many more were left out, and why_dropped.
    """

    samples: list
    truncated: int | None
    dropped: int
    why_dropped: str = "no response was left"


def load_split(section: DataSection, split: str, tokenizer) -> Encoded:
    """Reads, formats and tokenises a split expression (`train`, `test[:100]`) of a recipe's data section.

    Raises UserError for everything that is wrong with the section, its files or its rows, and if no sample is
    left.
    """
    examples = Examples(section, split)
    prompts = _Prompts(tokenizer, chat=section.template == CHAT)
    encoded = encode(examples, prompts, section.max_length)
    if not encoded.samples:
        raise UserError(
            f"data.max_length: none of the {len(examples)} samples of {examples.origin} has a response token "
            f"within {section.max_length} tokens, raise it"
        )
    return encoded


class _Prompts:
    """A tokenizer with the conventions of this file: how a prompt starts, and how a response ends."""

    def __init__(self, tokenizer, chat: bool):
        if tokenizer.eos_token_id is None:
            raise UserError(
                "model.path: the tokenizer has no token to end a response with, set its eos_token"
            )
        if chat and not tokenizer.chat_template:
            raise UserError(
                "data.template: the tokenizer has no chat template, "
                "write a template or leave data.template out"
            )
        self.tokenizer, self.chat = tokenizer, chat
        self.eos = tokenizer.eos_token_id
        # A chat template writes BOS itself where the model wants it.
        self.start = [] if chat else _start_tokens(tokenizer)

    def render(self, prompt: str) -> str:
        """The text that generation starts from."""
        if not self.chat:
            return prompt
        message = [{"role": "user", "content": prompt}]
        return self.tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)

    def tokens(self, texts: list[str]) -> list[list[int]]:
        # Without verbose=False, transformers would warn of texts beyond the model's length. They are cut
        # later.
        encoded = self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
        return encoded["input_ids"]


def _start_tokens(tokenizer) -> list[int]:
    """[BOS] if the tokenizer puts it before every text, else []."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and tokenizer("a")["input_ids"][:1] == [bos] else []


def encode(examples: Iterable[Example], prompts: _Prompts, max_length: int) -> Encoded:
    """Tokenises examples, cuts them to max_length tokens, and drops those without a response token then."""
    encoded = Encoded([], truncated=0, dropped=0)
    shared: dict[int, int] = {}
    for prompt_ids, response_ids, answer in _tokenised(examples, prompts):
        # The tokenizer makes a new int object for each token. Sharing equal ones halves the memory of a large
        # data set.
        ids = [shared.setdefault(token, token) for token in prompt_ids + response_ids]
        start = max(len(prompt_ids), 1)
        if start >= min(len(ids), max_length):
            encoded.dropped += 1
            continue
        encoded.truncated += len(ids) > max_length
        ids = ids[:max_length]
        encoded.samples.append(Sample(ids, [IGNORE] * start + ids[start:], ids[: len(prompt_ids)], answer))
    return encoded


def _tokenised(
    examples: Iterable[Example], prompts: _Prompts
) -> Iterator[tuple[list[int], list[int], str | None]]:
    """For each example: the tokens of its prompt, those of its response with EOS, and its answer."""
    stream = iter(examples)
    while chunk := list(islice(stream, CHUNK)):
        prompt_texts = [prompts.render(example.prompt) for example in chunk]
        responses = [
            _separator(prompt, example.response) + example.response
            for prompt, example in zip(prompt_texts, chunk)
        ]
        prompt_ids = prompts.tokens(prompt_texts)
        whole_ids = prompts.tokens([prompt + response for prompt, response in zip(prompt_texts, responses)])
        response_ids = prompts.tokens(responses)
        for example, prompt, whole, response in zip(chunk, prompt_ids, whole_ids, response_ids):
            if whole[: len(prompt)] == prompt:
                response = whole[len(prompt) :]
            yield prompts.start + prompt, response + [prompts.eos], example.answer


def _separator(prompt: str, response: str) -> str:
    """A space between prompt and response, unless there is white space. It belongs to the response."""
    return " " if prompt and response and not prompt[-1].isspace() and not response[0].isspace() else ""
