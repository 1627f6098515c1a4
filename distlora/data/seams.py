"""Where a prompt ends and its response begins in the tokens of the whole text.

A token may span the seam, as " 12" does between "Answer: " and "12". Three rules say what it belongs to:

whole text   it belongs to the response, and generation is given the tokens before it. Without white space at
             the seam nothing is added.
paper        `data.template: paper`. As many tokens belong to the prompt as it has when it is tokenised alone,
             which is how the authors of LoRA-SB (arXiv 2411.19557) mask their labels.
apart        runs of the formats 1 and 2, and chat templates. The prompt is tokenised alone. The response's
             tokens are those that follow the prompt's in the whole text; where that does not begin with the
             prompt's tokens, the response is tokenised alone as well. A space is put between the two unless
             there is white space.
"""

from abc import ABC, abstractmethod
from itertools import takewhile
from typing import Protocol

from distlora.data.templates import CHAT, PAPER, joined
from distlora.errors import UserError

#: The tokens of a prompt, with BOS, and of a response, without EOS.
Pair = tuple[list[int], list[int]]


class TemplateSection(Protocol):
    """What this file reads of a recipe's `data:` section."""

    template: str | None


def tokens_of(section: TemplateSection, tokenizer, whole_text: bool = True) -> "Tokens":
    """The tokenizer with the rule that a data section asks for. whole_text: False for the formats 1 and 2.

    Raises UserError if the tokenizer lacks what is needed.
    """
    if section.template == CHAT:
        return Chat(tokenizer)
    if not whole_text:
        return Apart(tokenizer)
    if section.template == PAPER:
        return Paper(tokenizer)
    return WholeText(tokenizer) if tokenizer.is_fast else WithoutOffsets(tokenizer)


class Tokens(ABC):
    """A tokenizer with the conventions of this project: how a text starts, where its response begins, and
    what ends it (`eos`).
    """

    def __init__(self, tokenizer):
        if tokenizer.eos_token_id is None:
            raise UserError(
                "model.path: the tokenizer has no token to end a response with, set its eos_token"
            )
        self.tokenizer, self.eos = tokenizer, tokenizer.eos_token_id
        self.start = _start_tokens(tokenizer)

    def render(self, prompt: str) -> str:
        """The text that generation starts from."""
        return prompt

    @abstractmethod
    def pairs(self, prompts: list[str], responses: list[str]) -> list[Pair]:
        """The tokens of each prompt and of the response that follows it."""

    def before_answer(self, prompt: str, response: str | None) -> list[int]:
        """The tokens that a prompt has before a response; with None, before whatever follows."""
        if response is None:
            return self.start + self.ids([self.render(prompt)])[0]
        return self.pairs([prompt], [response])[0][0]

    def before_options(self, prompt: str, responses: list[str]) -> tuple[list[int], list[list[int]]]:
        """The tokens that a prompt has before each of several responses, and those that follow for each."""
        pairs = self.pairs([prompt] * len(responses), responses)
        shown = _common([prompt_ids for prompt_ids, _ in pairs])
        return shown, [(prompt_ids + response_ids)[len(shown) :] for prompt_ids, response_ids in pairs]

    def ids(self, texts: list[str]) -> list[list[int]]:
        return self._tokenise(texts)["input_ids"]

    def _tokenise(self, texts: list[str], **options):
        # Without verbose=False, transformers would warn of texts beyond the model's length. They are cut
        # later.
        return self.tokenizer(
            texts, add_special_tokens=False, return_attention_mask=False, verbose=False, **options
        )


class WholeText(Tokens):
    """A token belongs to the prompt if the text that it stands for ends there."""

    def pairs(self, prompts: list[str], responses: list[str]) -> list[Pair]:
        if not prompts:
            return []
        texts = [prompt + response for prompt, response in zip(prompts, responses)]
        whole = self._tokenise(texts, return_offsets_mapping=True)
        found = []
        for prompt, ids, offsets in zip(prompts, whole["input_ids"], whole["offset_mapping"]):
            beyond = (position for position, (_, end) in enumerate(offsets) if end > len(prompt))
            seam = next(beyond, len(ids))
            found.append((self.start + ids[:seam], ids[seam:]))
        return found


class WithoutOffsets(Tokens):
    """For a tokenizer that does not tell where its tokens stand: those that the prompt alone has as well
    belong to it. Where the tokens before the seam depend on the response, the response has more of them.
    """

    def pairs(self, prompts: list[str], responses: list[str]) -> list[Pair]:
        if not prompts:
            return []
        whole = self.ids([prompt + response for prompt, response in zip(prompts, responses)])
        found = []
        for alone, ids in zip(self.ids(prompts), whole):
            seam = len(_common([alone, ids]))
            found.append((self.start + ids[:seam], ids[seam:]))
        return found


class Paper(Tokens):
    """As many tokens belong to the prompt as it has alone; a question is tokenised alone."""

    def before_answer(self, prompt: str, response: str | None) -> list[int]:
        return super().before_answer(prompt, None)

    def pairs(self, prompts: list[str], responses: list[str]) -> list[Pair]:
        if not prompts:
            return []
        whole = self.ids([prompt + response for prompt, response in zip(prompts, responses)])
        return [
            (self.start + ids[: len(alone)], ids[len(alone) :])
            for alone, ids in zip(self.ids(prompts), whole)
        ]


class Apart(Tokens):
    """The prompt is tokenised alone, and a space may be put before the response."""

    def pairs(self, prompts: list[str], responses: list[str]) -> list[Pair]:
        if not prompts:
            return []
        prompts = [self.render(prompt) for prompt in prompts]
        responses = [joined(prompt, response) for prompt, response in zip(prompts, responses)]
        whole = self.ids([prompt + response for prompt, response in zip(prompts, responses)])
        found = []
        for prompt, ids, response in zip(self.ids(prompts), whole, self.ids(responses)):
            follows = ids[: len(prompt)] == prompt
            found.append((self.start + prompt, ids[len(prompt) :] if follows else response))
        return found


class Chat(Apart):
    """The tokenizer's chat template, which writes BOS itself where the model wants it."""

    def __init__(self, tokenizer):
        super().__init__(tokenizer)
        if not tokenizer.chat_template:
            raise UserError(
                "data.template: the tokenizer has no chat template, "
                "write a template or leave data.template out"
            )
        self.start = []

    def render(self, prompt: str) -> str:
        message = [{"role": "user", "content": prompt}]
        return self.tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)


def _common(rows: list[list[int]]) -> list[int]:
    """The tokens with which all rows begin."""
    return [token for token, *_ in takewhile(lambda tokens: len(set(tokens)) == 1, zip(*rows))]


def _start_tokens(tokenizer) -> list[int]:
    """[BOS] if the tokenizer puts it before every text, else []."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and tokenizer("a")["input_ids"][:1] == [bos] else []
