"""A command line in one word of letters, digits, `-` and `_`, which no shell changes."""

import base64
import json
from collections.abc import Sequence


def pack(directory: str, arguments: Sequence[str]) -> str:
    """The word for `distlora ARGUMENTS` in this directory."""
    text = json.dumps({"directory": directory, "arguments": list(arguments)})
    return base64.urlsafe_b64encode(text.encode()).decode().rstrip("=")


def unpack(word: str) -> tuple[str, list[str]]:
    """The directory and the arguments in a word that `pack` has made."""
    content = json.loads(base64.urlsafe_b64decode(word + "=" * (-len(word) % 4)))
    return content["directory"], content["arguments"]
