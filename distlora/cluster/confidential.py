"""What must not be shown: which names are called as if they held a secret, and logins within addresses."""

import re

_SECRETS = ("TOKEN", "KEY", "SECRET", "PASSW", "CREDENTIAL", "JWT", "AUTH", "_PAT", "_PWD")
#: Parts of names that the words above would take for secrets, and that are none. (InfiniBand's partitions
#: have a PKEY.)
_HARMLESS = ("TOKENIZERS_", "_PATH", "_PKEY", "_IMPLICIT_TOKEN")
#: A user and a password in an address.
_LOGIN = re.compile(r"(?<=//)[^/@\s]+@")


def is_secret_name(name: str) -> bool:
    """Whether a variable or a key of a config is called as if it held a secret."""
    name = name.upper()
    for word in _HARMLESS:
        name = name.replace(word, "")
    return any(word in name for word in _SECRETS)


def without_login(text: str) -> str:
    return _LOGIN.sub("***@", text)


def holds_secret(name: str, value: str) -> bool:
    """Whether a variable must not be shown with its value: by its name, or for an address with a password."""
    return is_secret_name(name) or ("://" in value and without_login(value) != value)
