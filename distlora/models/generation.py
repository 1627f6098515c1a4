"""Greedy generation, in batches that shrink: a row that is done costs nothing any more."""

import inspect
from collections.abc import Callable, Sequence

import torch
from transformers import DynamicCache, PreTrainedModel

#: Under which names models take what they keep of the tokens so far: keys and values, or a state.
CACHES = ("past_key_values", "cache_params")

#: Whether any rank goes on, from whether this one does; a collective.
Agree = Callable[[bool], bool]


def end_tokens(model: PreTrainedModel, tokenizer) -> set[int]:
    """All tokens that end an answer: the tokenizer's, and those of the model's generation config.

    Instruction-tuned models often end a turn with another token than the tokenizer's `eos_token`.
    """
    own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    own = [own] if isinstance(own, int) else list(own or ())
    return {token for token in (tokenizer.eos_token_id, *own) if token is not None}


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    ends: set[int],
    pad_id: int,
    stopped: Callable[[list[int]], bool] | None = None,
    agree: Agree | None = None,
) -> list[list[int] | None]:
    """Greedy answers: one list of token ids for each prompt, without the end token; None where the largest
    logit of one of its tokens is infinite or not a number.

    prompts: token ids; none of them is empty. ends: the tokens that end an answer. stopped: whether the
    tokens of an answer so far hold a text that ends it; they are kept. agree: given where every token takes a
    collective (ZeRO-3 with its hooks on). Each rank then goes on until all are done, also one without
    prompts. The model is used as it is: nothing of its generation config but the ends that are given here
    (no temperature, no penalty for repetitions).
    """
    training = model.training
    model.eval()
    try:
        return _Greedy(model, prompts, max_new_tokens, ends, pad_id, stopped).run(agree)
    finally:
        model.train(training)


def cache_name(model: PreTrainedModel) -> str | None:
    """The parameter under which a model takes transformers' cache; None for one that has another or none."""
    takes = inspect.signature(model.forward).parameters
    if not model._supports_default_dynamic_cache():
        return None
    return next((name for name in CACHES if name in takes), None)


class _Greedy:
    """The rows that are not done yet, with their cache. A model that takes no cache sees all tokens again;
    some of these have a state into which padding would enter, so that only prompts of equal length go
    together.
    """

    def __init__(self, model, prompts, max_new_tokens, ends, pad_id, stopped):
        self.model, self.pad_id, self.ends = model, pad_id, ends
        self.limit, self.stopped = max_new_tokens, stopped or (lambda tokens: False)
        self.answers: list[list[int]] = [[] for _ in prompts]
        self.failed = set[int]()
        self.device = model.get_input_embeddings().weight.device
        self.takes = set(inspect.signature(model.forward).parameters)
        self.cache_name = cache_name(model)
        self.prompts, self.rows = prompts, list[int]()
        self.waiting = self._groups()
        self._begin()

    def _groups(self) -> list[list[int]]:
        """Numbers of the prompts that are answered together."""
        groups: dict[int, list[int]] = {}
        for row, prompt in enumerate(self.prompts):
            groups.setdefault(len(prompt) if self.cache_name is None else 0, []).append(row)
        return list(groups.values())

    def _begin(self) -> None:
        """Takes up the next group, if there is one."""
        if not self.waiting:
            return
        self.rows = self.waiting.pop()
        prompts = [self.prompts[row] for row in self.rows]
        longest = max(map(len, prompts))
        padding = [longest - len(prompt) for prompt in prompts]
        tokens = [[self.pad_id] * count + list(prompt) for count, prompt in zip(padding, prompts)]
        mask = [[0] * count + [1] * len(prompt) for count, prompt in zip(padding, prompts)]
        self.tokens = torch.tensor(tokens, device=self.device)
        self.mask = torch.tensor(mask, device=self.device)
        self.positions = (self.mask.cumsum(-1) - 1).clamp(min=0)
        self.padded = any(padding)
        self.cache = DynamicCache(config=self.model.config)

    def run(self, agree: Agree | None) -> list[list[int] | None]:
        while True:
            goes_on = bool(self.rows)
            if not (goes_on if agree is None else agree(goes_on)):
                return [None if row in self.failed else answer for row, answer in enumerate(self.answers)]
            if goes_on:
                self._advance(self._next_tokens())
            else:  # the other ranks need this one's part of the weights
                self.model(input_ids=torch.full((1, 1), self.pad_id, device=self.device), use_cache=False)

    def _next_tokens(self) -> list[int | None]:
        """One for each row; None where its logits are no numbers to choose by."""
        inputs = {"attention_mask": self.mask, "position_ids": self.positions, "logits_to_keep": 1}
        inputs["output_router_logits"] = False  # whose loss wants a mask of the new tokens alone
        taken = {name: value for name, value in inputs.items() if name in self.takes}
        if self.cache_name is None:
            outputs = self.model(input_ids=self.tokens, use_cache=False, **taken)
        else:
            taken[self.cache_name] = self.cache
            if self.cache_name == "cache_params" and self.tokens.shape[1] < self.mask.shape[1]:
                del taken["attention_mask"]  # a state has no padding
            outputs = self.model(input_ids=self.tokens, use_cache=True, **taken)
        logits = outputs.logits[:, -1]
        tokens = logits.argmax(-1, keepdim=True)  # for which NaN is the largest number
        usable = logits.gather(-1, tokens).isfinite()
        return [
            token if is_usable else None for (token,), (is_usable,) in zip(tokens.tolist(), usable.tolist())
        ]

    def _advance(self, following: list[int | None]) -> None:
        left = [
            place
            for place, (row, token) in enumerate(zip(self.rows, following))
            if self._continues(row, token)
        ]
        if len(left) < len(self.rows):
            self.rows = [self.rows[place] for place in left]
            if not left:
                self._begin()
                return
            kept = torch.tensor(left, device=self.device)
            self.mask, self.positions, self.tokens = self.mask[kept], self.positions[kept], self.tokens[kept]
            self.cache.reorder_cache(kept)  # which all kinds of caches can
        tokens = torch.tensor([[following[place]] for place in left], device=self.device)
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.rows), 1)], 1)
        if self.cache_name is None:
            self.tokens = torch.cat([self.tokens, tokens], 1)
            self.positions = torch.cat([self.positions, self.positions[:, -1:] + 1], 1)
        else:
            self.tokens, self.positions = tokens, self.positions[:, -1:] + 1

    def _continues(self, row: int, token: int | None) -> bool:
        """Notes a row's new token, and says whether there will be more."""
        if token is None:
            self.failed.add(row)
        if token is None or token in self.ends:
            return False
        answer = self.answers[row]
        answer.append(token)
        return len(answer) < self.limit and not self.stopped(answer)


def cache_bytes(model: PreTrainedModel) -> int:
    """Bytes of the keys and values of one token of one row."""
    config = model.config.get_text_config(decoder=True)
    heads = getattr(config, "num_attention_heads", 1)
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    kept = getattr(config, "num_key_value_heads", None) or heads
    return 2 * config.num_hidden_layers * kept * width * model.dtype.itemsize
