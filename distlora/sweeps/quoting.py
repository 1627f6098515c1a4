"""Words that are quoted as in a shell. No shell sees them."""

import shlex

from distlora.errors import UserError


def words_of(text: str, name: str) -> list[str]:
    """The words of a text. name: of the text, for the sentence. Raises UserError for an open quotation."""
    try:
        return shlex.split(text)
    except ValueError as error:
        raise UserError(f"{name} is not quoted as in a shell: {str(error).lower()}") from None
