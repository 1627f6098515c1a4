"""YAML as recipes, overrides and sweeps use it: the values of JSON, written with less punctuation.

A plain word is null (null, ~ or nothing), true, false, a number in decimal notation (7, .5, 1e-3, .inf) or a
text. What other versions of YAML also read into plain words is a text here: yes and no, dates, 010, 0x10,
1_000, 1:30. Keys are texts. Tags, anchors and aliases are refused, and so is what is deep, long or given
twice: a text of a few bytes cannot become more than it says.
"""

import math
import re
from collections.abc import Iterable
from typing import Any

import yaml

from distlora.errors import UserError
from distlora.files.confidential import is_secret_name
from distlora.sentences import first_line

#: Characters of a text, values within values (and dots of a key), and characters of a number.
LONGEST, DEEPEST, _LONGEST_NUMBER = 1 << 20, 32, 40
#: libyaml's parser where it was built, which is ten times as fast.
_PARSER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

_WORDS = {"": None, "~": None} | {
    spelling: value
    for word, value in (("null", None), ("true", True), ("false", False))
    for spelling in (word, word.capitalize(), word.upper())
}
_INT = re.compile(r"[-+]?(?:0|[1-9]\d*)", re.ASCII)
_FLOAT = re.compile(r"[-+]?(?:\.\d+|(?:0|[1-9]\d*)(?:\.\d*)?)(?:[eE][-+]?\d+)?", re.ASCII)
_NOT_FINITE = re.compile(r"(?P<sign>[-+]?)\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)")
#: What no file name, no terminal and no tokenizer takes: NUL, and half of a character.
_NO_TEXT = re.compile("[\0\ud800-\udfff]")

#: By words of libyaml's or PyYAML's parser, what usually helps.
_ADVICE = {
    "expected alphabetic or numeric": "put a text that begins with * or & in quotes",
    "expected ':'": "write a colon and a space behind a key",
    "mapping values are not allowed": "put a text that holds a colon and a space in quotes, or indent keys "
    "below their section",
    "hexdecimal|unknown escape": "put a text with backslashes in single quotes",
    "unexpected end of stream": "close the quotes that begin there",
    "expected ',' or": "close the brackets, or put a text with brackets or commas in quotes",
    "sequence entries are not allowed": "begin a list on a line of its own, or put a text that begins with - "
    "in quotes",
}
#: Where a new key or entry was expected: at the beginning of a line, and behind something.
_ELSEWHERE = "expected key|expected <block end>|expected '-' indicator"
_IN_A_COLUMN = "begin all keys and entries of a section in the same column"
_BEHIND = "put the whole text in quotes, and write a quote within single quotes twice"


def parse_yaml(text: str, name: str, secret: bool = False) -> Any:
    """The content of a YAML text, in JSON's types. Raises UserError, which calls the text `name`, for
    anything that is not such a text. secret: whether no message may repeat a part of it.
    """
    if len(text) > LONGEST:
        raise UserError(f"{name[:100]} has more than {LONGEST:,} characters; leave out what is not needed")
    try:
        return _content(yaml.parse(text, Loader=_PARSER), secret)
    except _Refused as refused:
        raise UserError(f"{name}: {refused}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{name} is not YAML: {_problem(error, text)}") from None


def _problem(error: Exception, text: str) -> str:
    """What the parser says of a text, and where."""
    if isinstance(error, UnicodeError):
        return "it holds half of a character"
    if isinstance(error, yaml.reader.ReaderError):
        code = error.character if isinstance(error.character, int) else ord(error.character)
        line = text.count(chr(10), 0, error.position) + 1
        return f"it holds the character U+{code:04X} at line {line}; remove it"
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    if not mark or not problem:
        return first_line(error)
    if re.search("expected ':'|end of stream", problem):  # found out behind the place that is wrong
        mark = error.context_mark or mark
    lines = text.splitlines()
    line = lines[mark.line] if mark.line < len(lines) else ""
    advice = _advice(problem, line[: mark.column], line[mark.column : mark.column + 1] or " ")
    return f"{problem} at {_place(mark)}{'; ' + advice if advice else ''}"


def _advice(problem: str, before: str, sign: str) -> str:
    """What to do about a problem; empty where the problem says it. before: what stands before its place in
    the line. sign: the character at its place.
    """
    if sign == "\t" and re.search(r"cannot start any token|\btab\b", problem):
        return "it is a tab: write spaces"
    if "cannot start any token" in problem:
        return f"put a text that begins with {sign} in quotes"
    if re.search(_ELSEWHERE, problem):
        return _BEHIND if before.strip() else _IN_A_COLUMN
    return next((advice for words, advice in _ADVICE.items() if re.search(words, problem)), "")


def _place(mark: yaml.Mark) -> str:
    return f"line {mark.line + 1}, column {mark.column + 1}"


class _Refused(Exception):
    """What is YAML and yet not read."""

    def __init__(self, problem: str, event: yaml.Event):
        super().__init__(f"{_place(event.start_mark)}: {problem}")


# ---------------------------------------------------------------------- content


def _content(events: Iterable[yaml.Event], secret: bool) -> Any:
    """The value of the only document. No function here calls itself, however deep the values lie. secret: as
    for `parse_yaml`.
    """
    root = _Open([])
    open_values = [root]
    for event in events:
        if isinstance(event, yaml.DocumentStartEvent) and root.value:
            raise _Refused("there is a second document; keep one", event)
        if isinstance(event, yaml.CollectionEndEvent):
            open_values.pop()
        elif isinstance(event, yaml.NodeEvent):
            try:
                value = _value(event)
            except _Refused:
                if secret or any(is_secret_name(outer.key or "") for outer in open_values):
                    raise _Refused("the value is no plain text; put it in quotes", event) from None
                raise
            open_values[-1].put(value, event)
            if isinstance(event, yaml.CollectionStartEvent):
                open_values.append(_Open(value))
                if len(open_values) > DEEPEST + 1:
                    raise _Refused(f"values lie in more than {DEEPEST} others", event)
    return root.value[0] if root.value else None


class _Open:
    """A list or a mapping that is being read. key: the one whose value comes next."""

    def __init__(self, value: list | dict):
        self.value, self.key = value, None

    def put(self, value: Any, event: yaml.NodeEvent) -> None:
        """Adds an entry, a key or the value of the last key."""
        if isinstance(self.value, list):
            self.value.append(value)
        elif self.key is None:
            self.key = _key(self.value, event)
        else:
            self.value[self.key], self.key = value, None


def _key(mapping: dict, event: yaml.NodeEvent) -> str:
    if not isinstance(event, yaml.ScalarEvent):
        raise _Refused("a list or a mapping is no key; keys are texts", event)
    if not event.value:
        raise _Refused("a key is empty", event)
    if event.value == "<<" and event.implicit[0]:
        raise _Refused("<< merges a mapping that is elsewhere, which is not read; write its keys out", event)
    if event.value in mapping:
        raise _Refused(f"key {event.value} is given twice", event)
    return event.value


def _value(event: yaml.NodeEvent) -> Any:
    """What an event begins or is."""
    if isinstance(event, yaml.AliasEvent):
        raise _Refused(
            f"*{event.anchor} stands for a value elsewhere, which is not read; write the value, "
            "or put a text that begins with * in quotes",
            event,
        )
    if event.anchor is not None:
        raise _Refused(
            f"&{event.anchor} names a value, which is not read; remove the name, "
            "or put a text that begins with & in quotes",
            event,
        )
    if event.tag is not None:
        tag = event.tag.replace("tag:yaml.org,2002:", "!!")
        raise _Refused(
            f"{tag} names a type, which is not read; remove it, or put a text that begins with ! in quotes",
            event,
        )
    if isinstance(event, yaml.MappingStartEvent):
        return {}
    if isinstance(event, yaml.SequenceStartEvent):
        return []
    if _NO_TEXT.search(event.value):
        raise _Refused("a text holds a NUL or half of a character; remove it", event)
    return _scalar(event.value, event) if event.implicit[0] else event.value


def _scalar(text: str, event: yaml.ScalarEvent) -> Any:
    """What a plain word is."""
    if text in _WORDS:
        return _WORDS[text]
    kind = int if _INT.fullmatch(text) else float if _FLOAT.fullmatch(text) else None
    if kind is not None and len(text) > _LONGEST_NUMBER:
        raise _Refused(f"a number has {len(text):,} characters, wanted at most {_LONGEST_NUMBER}", event)
    if kind is int and not -(2**63) <= int(text) < 2**63:
        raise _Refused(f"{text} is beyond the whole numbers of 64 bits", event)
    if kind is not None:
        return kind(text)
    special = _NOT_FINITE.fullmatch(text)
    if special is None:
        return text
    return math.nan if special["sign"] is None else float(f"{special['sign']}inf")


# ---------------------------------------------------------------------- writing


class _Dumper(yaml.SafeDumper):
    """A SafeDumper that quotes texts which would be read as numbers here, and writes every value out."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))


def dump_yaml(content: Any) -> str:
    """YAML text from which `parse_yaml` reads the same content. Keys keep their order."""
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
