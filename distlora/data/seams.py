"""Where a prompt ends and its response begins in the tokens of the whole text.

A token may span the seam, as " 12" does between "Answer: " and "12". Three rules say what it belongs to:

whole text   it belongs to the response, and generation is given the tokens before it. Without white space at
             the seam nothing is added.
paper        `data.template: paper`. As many tokens belong to the prompt as it has when it is tokenised alone,
             which is how the authors of LoRA-SB (arXiv 2411.19557) mask their labels.
apart        runs of the formats 1 and 2, and chat templates in those of format 3. The prompt is tokenised
             alone. The response's tokens are those that follow the prompt's in the whole text; where that
             does not begin with the prompt's tokens, the response is tokenised alone as well. A space is put
             between the two unless there is white space.

Chat templates have a rule of their own, see `distlora.data.chat`.
"""

from abc import ABC, abstractmethod
from itertools import takewhile
from typing import Protocol

from distlora.data.conventions import NEWEST, Conventions
from distlora.data.special_tokens import TextEncoder, Tokenised, Unreadable
from distlora.data.templates import CHAT, PAPER, Prompt, joined
from distlora.errors import UserError
from distlora.sentences import first_line

#: The tokens of a prompt, with BOS, and of a response, without EOS.
Pair = tuple[list[int], list[int]]


class TemplateSection(Protocol):
    """What this file reads of a recipe's `data:` section."""

    template: str | None


def tokens_of(section: TemplateSection, tokenizer, conventions: Conventions = NEWEST) -> "Tokens":
    """The tokenizer with the rule that a data section asks for.

    Raises UserError if the tokenizer lacks what is needed.
    """
    if section.template == CHAT:
        return ChatApart(tokenizer, conventions)
    if not conventions.whole_text:
        return Apart(tokenizer, conventions)
    if section.template == PAPER:
        return Paper(tokenizer, conventions)
    return (WholeText if tokenizer.is_fast else WithoutOffsets)(tokenizer, conventions)


def end_of_text(tokenizer) -> int:
    """The token that ends a text. Raises UserError if the tokenizer has none."""
    if tokenizer.eos_token_id is None:
        raise UserError("model.path: the tokenizer has no token to end a response with; set its eos_token")
    return tokenizer.eos_token_id


def require_chat_template(tokenizer) -> None:
    """Raises UserError if the tokenizer has no chat template."""
    if not getattr(tokenizer, "chat_template", None):
        raise UserError(
            "data.template: the tokenizer has no chat template; write a template or leave data.template out"
        )


class Tokens(ABC):
    """A tokenizer with the conventions of this project: how a text starts, where its response begins, and
    what ends it (`eos`). The methods raise Unreadable for a text that cannot be tokenised.
    """

    def __init__(self, tokenizer, conventions: Conventions = NEWEST):
        self.eos = end_of_text(tokenizer)
        self.tokenizer, self.conventions = tokenizer, conventions
        self.encoder = TextEncoder(tokenizer, conventions.plain)
        self.start = _start_tokens(tokenizer)

    def render(self, prompt: str, index: int = 0) -> str:
        """The text that generation starts from. index: of the prompt, for errors."""
        return prompt

    @abstractmethod
    def pairs(self, prompts: list[Prompt], responses: list[str]) -> list[Pair]:
        """The tokens of each prompt and of the response that follows it."""

    def before_answer(self, prompt: Prompt, response: str | None) -> list[int]:
        """The tokens that a prompt has before a response; with None, before whatever follows."""
        if response is None:
            return self.started(self.ids([self.render(prompt.text)], [prompt.own])[0])
        return self.pairs([prompt], [response])[0][0]

    def before_options(self, prompt: Prompt, responses: list[str]) -> tuple[list[int], list[list[int]]]:
        """The tokens that a prompt has before each of several responses, and those that follow for each."""
        pairs = self.pairs([prompt] * len(responses), responses)
        shown = common([prompt_ids for prompt_ids, _ in pairs])
        return shown, [(prompt_ids + response_ids)[len(shown) :] for prompt_ids, response_ids in pairs]

    def started(self, ids: list[int]) -> list[int]:
        """The tokens behind BOS, where the tokenizer puts it before a text and the template has not."""
        if self.conventions.whole_chat and self.start and ids[:1] == self.start:
            return ids
        return self.start + ids

    def ids(self, texts: list[str], own: list | None = None) -> list[list[int]]:
        """own: of each text the places of its template, see `TextEncoder`."""
        return [tokens.ids for tokens in self.encoder.encode(texts, own)]

    def _whole(self, prompts: list[Prompt], responses: list[str], places: bool = False) -> list[Tokenised]:
        texts = [prompt.text + response for prompt, response in zip(prompts, responses)]
        return self.encoder.encode(texts, [prompt.own for prompt in prompts], places)

    def _alone(self, prompts: list[Prompt]) -> list[list[int]]:
        return self.ids([prompt.text for prompt in prompts], [prompt.own for prompt in prompts])

    def _pair(self, ids: list[int], seam: int) -> Pair:
        whole = self.started(ids)
        seam += len(whole) - len(ids)
        return whole[:seam], whole[seam:]


class WholeText(Tokens):
    """A token belongs to the prompt if the text that it stands for ends there."""

    def pairs(self, prompts: list[Prompt], responses: list[str]) -> list[Pair]:
        found = []
        for prompt, (ids, places) in zip(prompts, self._whole(prompts, responses, places=True)):
            beyond = (position for position, (_, end) in enumerate(places) if end > len(prompt.text))
            found.append(self._pair(ids, next(beyond, len(ids))))
        return found


class WithoutOffsets(Tokens):
    """For a tokenizer that does not tell where its tokens stand: those that the prompt alone has as well
    belong to it. Where the tokens before the seam depend on the response, the response has more of them.
    """

    def pairs(self, prompts: list[Prompt], responses: list[str]) -> list[Pair]:
        whole = self._whole(prompts, responses)
        return [
            self._pair(ids, len(common([alone, ids]))) for alone, (ids, _) in zip(self._alone(prompts), whole)
        ]


class Paper(Tokens):
    """As many tokens belong to the prompt as it has alone; a question is tokenised alone."""

    def before_answer(self, prompt: Prompt, response: str | None) -> list[int]:
        return super().before_answer(prompt, None)

    def pairs(self, prompts: list[Prompt], responses: list[str]) -> list[Pair]:
        whole = self._whole(prompts, responses)
        return [self._pair(ids, len(alone)) for alone, (ids, _) in zip(self._alone(prompts), whole)]


class Apart(Tokens):
    """The prompt is tokenised alone, and a space may be put before the response."""

    def pairs(self, prompts: list[Prompt], responses: list[str]) -> list[Pair]:
        texts = [self.render(prompt.text, index) for index, prompt in enumerate(prompts)]
        responses = [joined(text, response) for text, response in zip(texts, responses)]
        whole = self.ids([text + response for text, response in zip(texts, responses)])
        found = []
        for prompt, ids, response in zip(self.ids(texts), whole, self.ids(responses)):
            follows = ids[: len(prompt)] == prompt
            found.append((self.start + prompt, ids[len(prompt) :] if follows else response))
        return found


class ChatApart(Apart):
    """The tokenizer's chat template, which writes BOS itself where the model wants it, in formats 1 to 3."""

    def __init__(self, tokenizer, conventions: Conventions = NEWEST):
        super().__init__(tokenizer, conventions)
        require_chat_template(tokenizer)
        self.start = []

    def render(self, prompt: str, index: int = 0) -> str:
        message = [{"role": "user", "content": prompt}]
        try:
            return self.tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # a template is a program of somebody else
            reason = f"does not fit the chat template, which fails ({first_line(error)})"
            raise Unreadable(index, reason) from None


def common(rows: list[list[int]]) -> list[int]:
    """The tokens with which all rows begin."""
    return [token for token, *_ in takewhile(lambda tokens: len(set(tokens)) == 1, zip(*rows))]


def _start_tokens(tokenizer) -> list[int]:
    """[BOS] if the tokenizer puts it before every text, else []."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and tokenizer("a")["input_ids"][:1] == [bos] else []
