"""Whether the tokens of a tokenizer fit a model."""

from collections.abc import Iterable, Sequence
from itertools import chain

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from distlora.errors import UserError


def embedding_rows(model: PreTrainedModel) -> int:
    """How many tokens a model has an embedding for."""
    return model.get_input_embeddings().weight.shape[0]


def refuse_unknown_ids(
    texts: Iterable[Sequence[int]], tokenizer: PreTrainedTokenizerBase, rows: int, path: str
) -> None:
    """Raises UserError for a token that the model has no embedding for.

    texts: token ids. rows: of the embedding. path: the model's, for the sentence.
    """
    largest = max(chain.from_iterable(texts), default=0)
    if largest >= rows:
        token = tokenizer.convert_ids_to_tokens(largest)
        raise UserError(
            f"model.path={path}: the tokenizer makes the token {token!r} with the id {largest}, and the "
            f"model's embedding has {rows} rows; give the model that belongs to this tokenizer, or one whose "
            "embedding has been resized for the added tokens"
        )
