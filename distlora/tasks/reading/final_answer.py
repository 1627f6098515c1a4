"""Where the final answer stands in a text."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from distlora.tasks.reading.plain_text import braced, first_line
from distlora.tasks.reading.quantities import names_number

#: Where the next prompt begins that a model has invented behind its answer.
_NEXT_PROMPT = re.compile(
    r"^[ \t]*(?:#{2,3} ?(?:Instruction|Input)\b|Below is an instruction\b)", re.MULTILINE
)
#: Characters of an answer that are looked at. A longer one is a text that has lost its way.
LONGEST = 1000
_DRESS = r"[\s*_`]*"
#: What a final answer stands behind.
_MARK = re.compile(
    rf"""(?P<box>\\(?:boxed|fbox)\s*(?=[{{\w]))
    | \#{{4,}}
    | \b(?:final\s+)?answer\b (?:,[^,.\n]{{1,30}},)? (?:\s+(?:to|for|of)\b[^.:\n]{{1,80}}?)? {_DRESS}
      (?:(?:is|was|would\s+be|will\s+be|must\s+be|should\s+be|equals|comes\s+to|to\s+be)(?![\w'’>]){_DRESS})+
      (?:[:=](?!>){_DRESS})? (?!{_DRESS}(?:(?:in)?correct|wrong)\b)
    | (?:^[^\w\n]*|[.!?]\s+|\b(?:final|the|correct|right|best|my)\s+)answer\b{_DRESS}[:=](?!>)
    | \bfinal\s+answer\b[*_`\#\ ]*\n
    | ^[^\w\n]*final\s+answer\b""",
    re.IGNORECASE | re.VERBOSE | re.MULTILINE,
)
_AS_FOLLOWS = re.compile(r"\W*(?:as follows|(?:given |shown )?below)\b\W*", re.IGNORECASE)
_NOT = re.compile(r"\W*not\b", re.IGNORECASE)
_INSTEAD = re.compile(r"\b(?:but(?: rather)?|rather|instead|it is|it's|it must be)\b", re.IGNORECASE)
#: Of a text that repeats its marks, so many of the last ones are read.
_MOST_MARKS = 6
#: What stands behind `####` where that begins a section, and behind `the answer is` where that explains.
_HEADING = re.compile(r"(?!Answer|Total|Negative|Minus|About|Approx)[A-Z][a-z]+\b")
_EXPLANATION = re.compile(
    r"(?:obtained|found|calculated|computed|derived|determined|reached)\b(?! to be)",
    re.IGNORECASE,
)
#: The end of a sentence: a full stop that is no decimal point.
_SENTENCE_END = re.compile(r"[.?][*_`$\"']*(?=\s+[A-Z]|\s*$)")


@dataclass(frozen=True)
class Marked:
    """A final answer. text: the content of the box, or the line behind the other marks. rest: what follows a
    box in its line.
    """

    text: str
    rest: str = ""


def own_turn(text: str) -> str:
    """The text up to the next prompt that a model has invented behind its answer."""
    following = _NEXT_PROMPT.search(text)
    return text[: following.start()] if following else text


def final_answer(text: str) -> Marked | None:
    """What stands behind the last mark (`The answer is`, `####`, `\\boxed{…}`, `Final answer`); None without
    one.

    A mark with nothing behind it, where a text was cut, does not count.
    """
    return next((found for _, found in _marked(text)), None)


def final_number(text: str) -> Marked | None:
    """As `final_answer`, where the answer is a number. A mark without any (`the answer is an integer`), a
    heading (`#### Step 2`) and an explanation (`the answer is obtained by …`) count only if no other does.
    """
    marked = list(islice(_marked(text), _MOST_MARKS))
    numbers = [each for each in marked if not each[1].text or names_number(each[1].text)]
    answers = [found for mark, found in numbers if not _is_aside(mark, found.text)]
    found = answers or [found for _, found in numbers or marked]
    return found[0] if found else None


def _marked(text: str) -> Iterator[tuple[str, Marked]]:
    """The marks and what stands behind them, from the last one on."""
    text = own_turn(text)
    for mark in reversed(list(_MARK.finditer(text))):
        found = _in_box(text, mark) if mark["box"] else _behind(text[mark.end() :])
        if found:
            yield mark[0], found


def _is_aside(mark: str, text: str) -> bool:
    if mark.startswith("#"):
        return bool(_HEADING.match(text)) and not names_number(text.split()[0])
    return bool(_EXPLANATION.match(text))


def reference(text: str) -> str:
    """The final answer of a reference, which may be a full response or the bare answer."""
    marked = final_answer(text)
    return marked.text if marked else text.strip()


def first_sentence(text: str) -> str:
    """The text up to the end of its first sentence, without the full stop."""
    return _SENTENCE_END.split(text, maxsplit=1)[0].strip()


def _in_box(text: str, mark: re.Match[str]) -> Marked | None:
    inside, end = braced(text, mark.end()) if text[mark.end()] == "{" else (text[mark.end()], mark.end() + 1)
    inside, rest = " ".join(inside.split())[:LONGEST], text[end : end + LONGEST].split("\n")[0]
    return Marked(inside, rest) if inside else None


def _behind(tail: str) -> Marked | None:
    follows = _AS_FOLLOWS.match(tail)
    tail = tail[follows.end() :] if follows else tail
    line = first_line(tail, with_a=r"\w")[:LONGEST]
    if _NOT.match(line):
        instead = _INSTEAD.search(line)
        return Marked(line[instead.end() :].strip() if instead else "")
    return Marked(line) if line else None
