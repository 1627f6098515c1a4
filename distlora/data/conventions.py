"""What a run's format and its recipe say about how rows become tokens."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Conventions:
    """The defaults are those of the newest format.

    whole_text: prompt and response are tokenised as one text (from format 3 on). whole_chat: a chat template
    renders the whole conversation, and no text begins with two BOS (from format 4 on). plain: special tokens
    that are written in the data are text (from format 4 on, unless `data.special_tokens`). date: what a chat
    template sees as today, YYYY-MM-DD; None: the clock.
    """

    whole_text: bool = True
    whole_chat: bool = True
    plain: bool = True
    date: str | None = None

    @classmethod
    def of_format(cls, number: int, special_tokens: bool = False, date: str | None = None) -> "Conventions":
        """special_tokens, date: `data.special_tokens` and `data.chat_date` of the recipe."""
        return cls(number >= 3, number >= 4, number >= 4 and not special_tokens, date)


NEWEST = Conventions()
