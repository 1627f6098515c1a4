"""What must not be shown: values whose names sound like secrets, and logins within addresses."""

import re
from typing import Any

_SECRETS = ("TOKEN", "KEY", "SECRET", "PASSW", "CREDENTIAL", "JWT", "AUTH", "_PAT", "_PWD")
#: Parts of names that contain a word from above and are not secret. (InfiniBand's partitions have a PKEY.)
_HARMLESS = ("TOKENIZERS_", "_PATH", "_PKEY", "_IMPLICIT_TOKEN")
#: The user and the password in an address.
_LOGIN = re.compile(r"(?<=//)[^/@\s]+@")


def is_secret_name(name: str) -> bool:
    """Whether the name of a variable or of a config's key sounds as if it held a secret."""
    name = name.upper()
    for word in _HARMLESS:
        name = name.replace(word, "")
    return any(word in name for word in _SECRETS)


def without_login(text: str) -> str:
    """The text with *** in place of user and password in addresses."""
    return _LOGIN.sub("***@", text)


def holds_secret(name: str, value: str) -> bool:
    """Whether the value of a variable must not be shown: because of its name, or a password in an address."""
    return is_secret_name(name) or ("://" in value and without_login(value) != value)


def without_secrets(content: Any) -> Any:
    """A config without the texts under keys with a secret's name, at every depth."""
    if isinstance(content, dict):
        return {
            key: without_secrets(value)
            for key, value in content.items()
            if not (isinstance(value, str) and is_secret_name(str(key)))
        }
    return [without_secrets(value) for value in content] if isinstance(content, list) else content
