"""What objectives of texts have in common: the model must have a row for each token and each position."""

from collections.abc import Sequence
from functools import cached_property

from torch import nn

from distlora.data import Questions
from distlora.errors import UserError
from distlora.models.dry_run import end_of_text, needs_end, position_limit
from distlora.models.vocabulary import embedding_rows, refuse_unknown_ids
from distlora.training.objective_base import Objective


class Texts(Objective):
    """An objective whose samples have `input_ids`, and what it asks of its model without weights."""

    def check_length(self) -> None:
        """Raises UserError if the recipe's texts may be longer than the model's table of positions."""
        self._refuse_long(self.recipe.data.max_length)

    def check_samples(self, samples: Sequence, tokenizer) -> None:
        self._refuse_unknown_ids([sample.input_ids for sample in samples], tokenizer)
        self._refuse_long(max((len(sample.input_ids) for sample in samples), default=0))
        if self._end is not None:
            self._refuse_padding_with_ends(tokenizer)
            self._refuse_uneven_ends(samples, tokenizer)

    def check_questions(self, questions: Questions, tokenizer, max_new_tokens: int | None) -> None:
        """Raises UserError for tokens that the model does not know, and for answers that could run over the
        end of its table of positions. max_new_tokens: of an answer; None where the options are read.
        """
        prompts = [question.prompt_ids for question in questions.items]
        options = [option for question in questions.items for option in question.options]
        self._refuse_unknown_ids([*prompts, *options], tokenizer)
        if self._positions is None:
            return
        if max_new_tokens is None:
            self._refuse_long_options(questions, self._positions)
        elif (longest := max(map(len, prompts))) + max_new_tokens > self._positions:
            raise UserError(
                f"data.max_new_tokens={max_new_tokens}: with a prompt of {longest} tokens that is beyond the "
                f"{self._positions} positions of {self.recipe.model.path}; lower it, or data.max_length"
            )

    def _refuse_long_options(self, questions: Questions, limit: int) -> None:
        for question in questions.items:
            prompt, option = len(question.prompt_ids), max(map(len, question.options), default=0)
            if prompt + option > limit:
                raise UserError(
                    f"data: a prompt of {prompt} tokens and its option of {option} are beyond the {limit} "
                    f"positions of {self.recipe.model.path}; lower data.max_length"
                )

    def _refuse_long(self, longest: int) -> None:
        limit, data = self._positions, self.recipe.data
        if limit is not None and longest > limit:
            path = self.recipe.model.path
            raise UserError(
                f"data.max_length={data.max_length} is beyond the {limit} positions of {path}; lower it"
            )

    def _refuse_unknown_ids(self, texts: Sequence[Sequence[int]], tokenizer) -> None:
        refuse_unknown_ids(texts, tokenizer, embedding_rows(self._model), self.recipe.model.path)

    def _refuse_padding_with_ends(self, tokenizer) -> None:
        """Of a model that would take padding for ends of texts."""
        if tokenizer.pad_token_id == self._end:
            raise UserError(
                f"model.path={self.recipe.model.path}: the tokenizer pads with {tokenizer.pad_token}, and "
                f"{type(self._model).__name__} looks for this token to find the end of a text; give the "
                "tokenizer a pad token of its own"
            )

    def _refuse_uneven_ends(self, samples: Sequence, tokenizer) -> None:
        """Of a model that looks for the end tokens of all texts of a batch at once."""
        counts = [sample.input_ids.count(self._end) for sample in samples]
        usual = max(set(counts), key=counts.count)
        odd = next((number for number, count in enumerate(counts) if count != usual or not count), None)
        if odd is not None:
            end = tokenizer.convert_ids_to_tokens(self._end)
            text = tokenizer.decode(samples[odd].input_ids)
            raise UserError(
                f"data: the text {text[:60]!r} has {counts[odd]} end tokens ({end}), and "
                f"{type(self._model).__name__} wants the same number in every text, at least one (most have "
                f"{usual}); remove {end} from the text, or use a tokenizer that ends texts with it"
            )

    # ------------------------------------------------------------------ the model, without weights

    @cached_property
    def _model(self) -> nn.Module:
        return self.bare_model()

    @cached_property
    def _positions(self) -> int | None:
        return position_limit(self._model)

    @cached_property
    def _end(self) -> int | None:
        """The token that every text needs; None for a model that needs none."""
        return end_of_text(self._model.config) if self.labels and needs_end(self._model) else None
