"""What must not be shown: values whose names sound like secrets, logins within addresses, and tokens.

Every text that leaves the program goes through `hidden`: the terminal, logs, a run's status, model cards.
Configs that are written down go through `redacted` or `without_secrets`, words of a command line through
`shown_word`.
"""

import os
import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any

from distlora.errors import UserError

#: In the place of what is not shown.
HIDDEN = "***"

# ---------------------------------------------------------------------- names

#: Parts of words that mean a secret wherever they stand.
_PARTS = ("secret", "passw", "passphrase", "passcode", "credential", "cookie", "signature", "authorization")
#: Words that mean one by themselves.
_WORDS = {"jwt", "bearer", "sas", "sig", "pat", "cred", "creds"}
#: Words that mean one unless another word stands before or behind them. They are split off the ends of
#: longer words, as in APITOKEN.
_STEMS = ("token", "key", "pass", "auth", "pwd")
_NOT_BEHIND = {
    "token": {
        *("pad", "bos", "eos", "unk", "sep", "cls", "mask", "special", "image", "video", "audio", "text"),
        *("sub", "new", "next", "first", "last", "per", "each", "think", "start", "end", "stop", "begin"),
        *("prompt", "implicit", "extra", "added", "additional", "forced", "decoder", "in", "out", "input"),
        *("output", "max", "min", "num", "vision", "class", "prefix", "suffix", "middle"),
    },
    "key": {
        *("public", "primary", "foreign", "sort", "group", "cache", "dict", "unknown", "known", "missing"),
        *("p", "dotted", "mon", "tur", "don", "hot", "hoc", "joc", "whis", "data", "layer", "label"),
    },
    "pass": {
        *("forward", "backward", "single", "multi", "one", "two", "first", "second", "last", "next", "per"),
        *("by", "com", "encom", "sur", "tres", "over", "under", "full", "low", "high", "band", "num", "each"),
    },
    "auth": set(),
    "pwd": {"old"},
}  # fmt: skip
_NOT_BEFORE = {
    "token": {
        *("id", "ids", "type", "index", "idx", "count", "length", "len", "budget", "lr", "embedding"),
        *("mask", "embeddings", "classification", "limit", "level", "per", "position", "dim", "size", "loss"),
        "weight",
    },
    "key": {
        *("value", "values", "padding", "proj", "projection", "query", "state", "states", "cache", "layer"),
        *("dim", "dims", "head", "heads", "length", "norm", "bias", "mask", "mapping", "error", "word"),
        "words",
    },
    "pass": {"rate", "at", "count", "through", "over", "on"},
    "auth": {"type", "method", "mode", "sock", "url", "scheme"},
    "pwd": set(),
}  # fmt: skip
#: Several tokens are numbers of them, and several keys are names, unless one of these words stands before.
_HOLDERS = {
    *("api", "access", "auth", "refresh", "bearer", "secret", "private", "session", "personal", "signing"),
    *("hf", "hub", "github", "gitlab", "ssh", "encryption"),
}  # fmt: skip
_PIECE = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")


@lru_cache(maxsize=4096)
def is_secret_name(name: str) -> bool:
    """Whether the name of a variable, of a config's key or of a part of an address sounds as if it held a
    secret. Of a dotted key every part counts.
    """
    return any(_is_secret(_words_of(part)) for part in name.split("."))


def _is_secret(words: list[str]) -> bool:
    for i, word in enumerate(words):
        before, behind = words[i - 1] if i else "", words[i + 1] if i + 1 < len(words) else ""
        if word in _WORDS or any(part in word for part in _PARTS):
            return True
        if word in _STEMS and before not in _NOT_BEHIND[word] and behind not in _NOT_BEFORE[word]:
            return True
        if word in ("tokens", "keys") and before in _HOLDERS:
            return True
    return False


def _words_of(name: str) -> list[str]:
    """max_new_tokens, maxNewTokens and MAX-NEW-TOKENS: max, new, tokens."""
    words: list[str] = []
    for piece in _PIECE.findall(name):
        word = piece.lower()
        stem = next((stem for stem in _STEMS if word.endswith(stem)), "")
        words += filter(None, (word.removesuffix(stem), stem))
    return words


def holds_secret(name: str, value: str) -> bool:
    """Whether the value of a variable must not be shown: because of its name, or of what is in it."""
    return is_secret_name(name) or _without_logins(value) != value


# ---------------------------------------------------------------------- texts

#: User and password in an address, whose slashes a path may have lost. A password may hold @ and /, and then
#: reaches to the last @; a port is none.
_LOGIN = re.compile(
    r"(?<!/)(?P<start>:/+|//+)(?:[^\s/:@\[]*:(?!\d{1,5}/)(?:(?!://)[^\s\0])*|[^\s\0/]*)@", re.ASCII
)
#: A value in quotes, in brackets, or up to the next space. (A command line may hold zero bytes.)
_VALUE = r"\"(?:[^\"\\\n]|\\.)*\"|'[^'\n]*'|\[[^\]\n]*\]?|\{[^}\n]*\}?"
_ASSIGNED = re.compile(rf"(?<![\w.-])(?P<name>[A-Za-z_][\w.-]*)(?P<sign>=)(?:{_VALUE}|[^\s\0&]+)")
#: In JSON, and in Python's and YAML's mappings.
_IN_MAPPING = re.compile(
    rf"(?P<quote>[\"'])(?P<name>[\w.-]+)(?P<sign>(?P=quote)\s*:\s*)(?:{_VALUE}|[^\s\0,}}\]]+)"
    rf"|(?<=[{{,])(?P<bare>\s*[A-Za-z_][\w.-]*)(?P<colon>\s*:\s*)(?:{_VALUE}|[^\s\0,}}\]]+)"
)
_HEADER = re.compile(r"\b((?:Proxy-)?Authorization|(?:Set-)?Cookie)(\s*[:=]\s*)[^\n\"']+", re.IGNORECASE)
#: An address's part that is called "key" alone. Elsewhere the word means too much.
_QUERY_KEY = re.compile(r"(?<=[?&])(key=)[^\s\0&]+", re.IGNORECASE)
#: Tokens that can be told by their beginnings.
_TOKEN = re.compile(
    r"\b(?:hf_(?:[A-Za-z0-9]{16,}|(?=[a-z0-9]*[A-Z])[A-Za-z0-9]{8,})"
    r"|gh[pousr]_\w{16,}|github_pat_\w{16,}|gl[a-z]{2,4}-[\w-]{16,}|sk-[\w-]{20,}|xox[a-z]-[\w-]{10,}"
    r"|(?:AKIA|ASIA)[0-9A-Z]{16}|AIza[\w-]{30,}|npm_\w{30,}|wandb_v\d_\w{16,}"
    r"|eyJ[\w-]{8,}\.[\w-]{8,}(?:\.[\w-]+)?)|(?<=\bBearer )[\w.~+/=-]{8,}",
    re.ASCII,
)
#: Characters of a variable's value from which on it is looked for in texts.
_SHORTEST = 8


def hidden(text: str) -> str:
    """The text with *** in place of what must not be shown: logins in addresses, values given to names that
    sound like secrets, tokens, and the values of this process's own secret variables.
    """
    for secret in _own_secrets():
        text = text.replace(secret, HIDDEN)
    return _without_values(_IN_MAPPING, _without_values(_ASSIGNED, _without_logins(text)))


def _without_logins(text: str) -> str:
    text = _LOGIN.sub(rf"\g<start>{HIDDEN}@", text)
    text = _QUERY_KEY.sub(rf"\1{HIDDEN}", text)
    return _TOKEN.sub(HIDDEN, _HEADER.sub(rf"\1\2{HIDDEN}", text))


def _own_secrets() -> list[str]:
    """Longest first. A path is no secret, whatever its variable is called."""
    found = {
        value
        for name, value in os.environ.items()
        if len(value) >= _SHORTEST and not value.startswith("/") and is_secret_name(name)
    }
    return sorted(found, key=len, reverse=True)


def _without_values(pattern: re.Pattern[str], text: str) -> str:
    """The text without the values that the pattern finds behind names of secrets. Others are looked through:
    they may be mappings.
    """
    parts, place = [], 0
    while found := pattern.search(text, place):
        name, sign = ("name", "sign") if found["name"] else ("bare", "colon")
        last = found[name].strip().rpartition(".")[2]
        secret = last.lower() != "key" and is_secret_name(last)  # "wanted dotted.key=value"
        secret = secret and text[found.end(sign) : found.end()].strip(",;.") not in _NOTHING
        parts += (text[place : found.end(sign)], HIDDEN if secret else "")
        place = found.end() if secret else found.end(sign)
    return "".join([*parts, text[place:]])


# ---------------------------------------------------------------------- configs and command lines

#: Values that are no secret, whatever has them.
_NOTHING = ("", "~", "null", "true", "false")
#: What stands before and behind a key within YAML or JSON.
_KEY_WITHIN = re.compile(r"(?:^|(?<=[\s{\[,?\"'-]))(?P<name>[\w.-]+)[\"']?\s*[:=]")


def redacted(value: Any, name: str = "") -> Any:
    """A config with *** in place of its secrets, at every depth. name: of the key that has the value."""
    if value is None or isinstance(value, bool):
        return value
    if name and is_secret_name(name):
        return HIDDEN
    if isinstance(value, Mapping):
        return {key: redacted(item, str(key)) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [redacted(item) for item in value]
    return hidden(value) if isinstance(value, str) else value


def without_secrets(content: Any) -> Any:
    """A config without its secrets, at every depth: keys with a secret's name are left out, and logins in
    addresses are hidden.
    """
    if isinstance(content, Mapping):
        return {
            key: without_secrets(value)
            for key, value in content.items()
            if value is None or isinstance(value, bool) or not is_secret_name(str(key))
        }
    if isinstance(content, list | tuple):
        return [without_secrets(value) for value in content]
    return hidden(content) if isinstance(content, str) else content


def shown_word(word: str) -> str:
    """A word of the command line without its secrets. Of a value with a secret somewhere in it, what follows
    is hidden to the end.
    """
    key, equals, value = word.partition("=")
    if equals and is_secret_name(key):
        return word if value in _NOTHING else f"{key}={HIDDEN}"
    inner = _secret_within(value if equals else word)
    if inner is not None:
        return f"{word[: len(word) - len(inner.string) + inner.end()]} {HIDDEN}"
    return hidden(word)


def refuse_secrets(words: Iterable[str]) -> None:
    """Raises UserError for a word with a secret in it, where the words become command lines of other
    processes.
    """
    for word in words:
        found = _secret_in(word)
        if found is not None:
            raise UserError(
                f"{found}: all users of a host can read command lines; leave it out, and set it in the "
                "environment of every host (COMET_API_KEY, WANDB_API_KEY) or in the recipe's file"
            )


def _secret_in(word: str) -> str | None:
    """What is secret in a word of the command line, in a few words; None if nothing is."""
    key, equals, value = word.partition("=")
    if equals and is_secret_name(key):
        return None if value in _NOTHING else key
    inner = _secret_within(value if equals else word)
    if inner is not None:
        return f"{inner['name']} in {key}" if equals else inner["name"]
    if _without_logins(word) != word:
        return f"a login or a token in {key}" if equals else "a login or a token"
    return None


def _secret_within(value: str) -> re.Match[str] | None:
    """The first key with a secret's name within YAML or JSON."""
    return next((found for found in _KEY_WITHIN.finditer(value) if is_secret_name(found["name"])), None)
