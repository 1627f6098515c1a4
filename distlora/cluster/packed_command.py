"""A command line in one word of letters, digits, `-` and `_`, which passes every shell untouched."""

import base64
import json
from collections.abc import Sequence


def pack(directory: str, arguments: Sequence[str]) -> str:
    """directory: where the program is to run. arguments: of `distlora`."""
    text = json.dumps({"directory": directory, "arguments": list(arguments)})
    return base64.urlsafe_b64encode(text.encode()).decode().rstrip("=")


def unpack(word: str) -> tuple[str, list[str]]:
    content = json.loads(base64.urlsafe_b64decode(word + "=" * (-len(word) % 4)))
    return content["directory"], content["arguments"]
