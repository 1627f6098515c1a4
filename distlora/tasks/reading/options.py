"""Which option a text chooses, as a careful person reads it: `Answer1 is wrong, so it must be answer2`."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from distlora.tasks.reading.final_answer import own_turn
from distlora.tasks.reading.number_words import SMALL

#: The words of the labels in the LLM-Adapters data sets, each with a number behind it.
KINDS = ("answer", "solution", "ending", "option", "choice")
_TRUTH = {"true": "true", "yes": "true", "false": "false", "no": "false"}
#: Characters of a text that are looked at, and of those in front of a label.
_LONGEST, _NEAR = 20_000, 160

_DRESS = r"[\s\"'*_`(\[#]*"
_UNDRESS = r"[\s\"'*_`)\].]*"
_BE = r"(?:is|are|was|were|seems?|looks?|sounds?|(?:would|can|must|seems?\s+to)\s+be|being|makes?)"
_ADVERBS = (
    r"(?:\s+(?:also|clearly|obviously|both|all|therefore|definitely|probably|simply|just|most|more|the|an?"
    r"|only))*"
)
_TO_LABEL = rf"""
    [:,]?{_DRESS}(?:that\s+)?(?:it\s+(?:is|must\s+be)\s+|it's\s+)?(?:the\s+)?
    (?:therefore\s+|clearly\s+|definitely\s+|probably\s+|most\s+likely\s+|likely\s+)?
    (?:(?:correct|right|best)\s+)?[:,]?{_DRESS}$"""
_PLAUSIBLE = r"(?:appropriate|suitable|likely|plausible|logical|reasonable|sensible)"
#: Words in front of a label that name it as the answer.
_NAMED_BEFORE = re.compile(
    rf"""(?:
      \b(?:answer|option|choice|solution|ending|response|statement|(?:the|right|correct|best)\s+one|pick|best
      |most\s+{_PLAUSIBLE})s?\b
      [^.\n]{{0,40}}?\s*(?:is|was|:|=|would\s+be|must\s+be|should\s+be|has\s+to\s+be|will\s+be)
    | \b(?:choose|choosing|chose|pick|picked|select|selected|go(?:ing)?\s+with|opt\s+for|prefer|vote\s+for)
    | \#{{4}}
    ){_TO_LABEL}""",
    re.IGNORECASE | re.VERBOSE,
)
#: Words in front of a label that are for it, but may belong to an explanation.
_FOR_BEFORE = re.compile(
    rf"""\b(?:think|believe|conclude|guess|say|it\s+(?:is|must\s+be|has\s+to\s+be|should\s+be)|it's
    |therefore|thus|hence|so){_TO_LABEL}""",
    re.IGNORECASE | re.VERBOSE,
)
#: The same behind a label.
_NAMED_BEHIND = re.compile(
    rf"""{_UNDRESS}(?:{_BE}{_ADVERBS}\s+(?:correct|right|answer)\b
    | [:\-–—]\s*(?:right|correct|yes|true)(?:\s*[.,;!]|[ \t]*(?:\n|$)))""",
    re.IGNORECASE | re.VERBOSE,
)
_FOR_BEHIND = re.compile(
    rf"{_UNDRESS}{_BE}{_ADVERBS}\s+(?:best|true|option|choice|solution|ending|{_PLAUSIBLE})\b|\s+it\s+is\b",
    re.IGNORECASE,
)
#: What stands before and behind a label that is a sentence of its own.
_ALONE_BEFORE = re.compile(rf"[.;:!?\n]{_DRESS}$")
_ALONE_BEHIND = re.compile(r"[\"'*_`)\]]*(?:\s*$|\s*[.;!\n]|,?\s+(?:because|since)\b)", re.IGNORECASE)
#: Words that decide against a label, behind it and in front of it.
_AGAINST_BEHIND = re.compile(
    rf"""{_UNDRESS}(?:{_BE}{_ADVERBS}\s+(?:not(?!\s+only)|never|hardly|scarcely|far\s+from|no|least|worst|wrong
    |incorrect|false|impossible|unlikely|implausible|inappropriate|irrelevant|out)\b | {_BE}n't\b
    | (?:can't|cannot|couldn't)\b
    | [:\-–—]\s*(?:wrong|incorrect|no|false)(?:\s*[.,;!]|[ \t]*(?:\n|$)))""",
    re.IGNORECASE | re.VERBOSE,
)
#: Words that may stand between a negation and the label that it is about.
_NEGATED = r"""(?:(?:be|been|choose|choosing|pick|picking|select|selecting|go\s+with|opt\s+for|think|believe
    |say|said|saying|claim|claiming|want|to|for|of|that|if|whether|it|it's|this|is|was|would|the|an?|case
    |answer|option|choice|solution|ending|one|response|statement|correct|right|true|possible
    |evidence|proof|reason|way|likely|quite|really|exactly|necessarily|possibly|at\s+all)(?:\s+|$|(?=["'*_`(\[])))"""
_AGAINST_BEFORE = re.compile(
    rf"""(?:(?<!\bno\ )(?<!\bwithout\ )(?<!\bwithout\ a\ )
    \b(?:not(?!\s+only)|never|cannot|neither|nor|no(?=\s+(?:evidence|proof|reason|way))|hardly|scarcely|far\s+from
    |rather\s+than|instead\s+of|rul(?:e|es|ed|ing)\s+out|eliminat(?:e|es|ed|ing)|any(?:thing|one)\s+but
    |except(?:\s+for)?|other\s+than|doubt(?:s|ful)?|mistake|wrong|incorrect|unlikely|worst
    |least\s+{_PLAUSIBLE})\b|n't\b)
    \s*{_NEGATED}*?(?::\s*)?{_DRESS}$""",
    re.IGNORECASE | re.VERBOSE,
)
#: Two negations, which are for the label behind them.
_NOTHING_BUT = re.compile(
    r"(?:n't|\b(?:not|cannot|never))\b[^.,;\n]{0,30}\bany(?:thing|one)\s+(?:but|other\s+than|except(?:\s+for)?)\s*$"
    r"|\b(?:nothing|none)\s+(?:but|other\s+than|except(?:\s+for)?)\s*$",
    re.IGNORECASE,
)
_ASKED = re.compile(rf"{_UNDRESS}\?")
#: What joins labels: `answer1, answer2 and answer3`.
_JOIN = re.compile(
    rf"[\s\"'*_`)\]]*(?:,|/|&|\band\b|\bor\b|\bnor\b){_DRESS}(?:(?:and|or|nor)\b)?{_DRESS}", re.IGNORECASE
)
#: From here on a sentence gives reasons for what it has said, until it comes back to that.
_REASON = re.compile(
    r"\b(?:because|since|given that|although|(?:even )?though|whereas|even if)\b", re.IGNORECASE
)
_REASON_ENDS = re.compile(r"[.;\n]|\b(?:but|so|therefore|thus|hence)\b", re.IGNORECASE)


@dataclass
class _Mention:
    """One label in a text: its value, where it stands, and whether the text decides against it."""

    value: str
    start: int
    end: int
    rejected: bool = False


def chosen(text: str, kind: str) -> str | None:
    """The number (`"3"`), truth value (`"true"`) or letter (`"c"`) that a text chooses; None if it chooses
    none, or several.

    kind: one of KINDS, "truth", or "letter".
    """
    text = own_turn(text)[:_LONGEST]
    finders = _FINDERS.get(kind) or (_numbered(kind), _any_numbered, _ordinals, _bare_numbers)
    mentions = next((found for find in finders if (found := find(text))), [])
    return _decided(text, mentions, kind == "truth")


def label_of(text: str) -> tuple[str, str] | None:
    """The kind and the value of a text that is a label and nothing else: ("answer", "3") of `answer3`,
    ("truth", "true") of `true`, ("letter", "c") of `C`.
    """
    text = text.strip().rstrip(".").lower()
    if text in _TRUTH:
        return "truth", _TRUTH[text]
    found = re.fullmatch(rf"({'|'.join(KINDS)})\s?(\d{{1,9}})", text)
    if found:
        return found[1], str(int(found[2]))
    found = re.fullmatch(r"\(?([a-e])\)?", text)
    return ("letter", found[1]) if found else None


# ---------------------------------------------------------------------- which label the text decides for


def _decided(text: str, mentions: Sequence[_Mention], of_two: bool) -> str | None:
    """The last label that the text names as its answer; else the one that it begins with; else the last one
    that it is for in weaker words; else the only one.

    of_two: what is not true is false.
    """
    asked = [each for each in mentions if _ASKED.match(text, each.end)]
    mentions = [each for each in mentions if each not in asked] or mentions
    groups = _groups(text, mentions)
    _reject(text, groups)
    if of_two and len(mentions) == 1 and mentions[0].rejected:
        return "false" if mentions[0].value == "true" else "true"
    left = _without_reasons(
        text, [rest for group in groups if (rest := [each for each in group if not each.rejected])]
    )
    ends = [0, *(group[-1].end for group in groups)]
    starts = [max(end for end in ends if end <= group[0].start) for group in left]
    fronts = [text[start : group[0].start][-_NEAR:] for start, group in zip(starts, left)]
    for decides in (_is_named, _is_favoured):
        decided = [group for group, front in zip(left, fronts) if decides(text, front, group)]
        if decided:
            return _single(decided[-1])
        if left and not re.search(r"\w", text[: left[0][0].start]):
            return _single(left[0])
    return _single([mention for group in left for mention in group])


def _is_named(text: str, front: str, group: Sequence[_Mention]) -> bool:
    """Whether a text names these labels as its answer, in words or in a sentence that is nothing else.

    front: what stands before the labels.
    """
    if _NAMED_BEFORE.search(front) or _NAMED_BEHIND.match(text, group[-1].end):
        return True
    leads = group[0].start == len(front) and not re.search(r"\w", front)
    alone = leads or _ALONE_BEFORE.search(front)
    return bool(alone and _ALONE_BEHIND.match(text, group[-1].end))


def _is_favoured(text: str, front: str, group: Sequence[_Mention]) -> bool:
    """Whether a text is for these labels in words that an explanation may have as well."""
    return bool(_FOR_BEFORE.search(front) or _FOR_BEHIND.match(text, group[-1].end))


def _groups(text: str, mentions: Sequence[_Mention]) -> list[list[_Mention]]:
    """Labels that are joined belong together."""
    groups: list[list[_Mention]] = []
    for mention in mentions:
        if groups and _JOIN.fullmatch(text, groups[-1][-1].end, mention.start):
            groups[-1].append(mention)
        else:
            groups.append([mention])
    return groups


def _reject(text: str, groups: Sequence[Sequence[_Mention]]) -> None:
    """Marks the labels that the text decides against: all of `answer1 and answer2 are wrong`, both of `not
    answer1 or answer2`, but of `not answer1, answer2` only the first.
    """
    for group in groups:
        behind = bool(_AGAINST_BEHIND.match(text, group[-1].end))
        front = text[max(0, group[0].start - _NEAR) : group[0].start]
        before = bool(_AGAINST_BEFORE.search(front)) and not _NOTHING_BUT.search(front)
        for place, mention in enumerate(group):
            before &= not place or text[group[place - 1].end : mention.start].strip() != ","
            mention.rejected = before or behind


def _without_reasons(text: str, groups: list[list[_Mention]]) -> list[list[_Mention]]:
    """Without those behind a `because` that only explain the choice before it."""
    kept = groups[:1]
    for group in groups[1:]:
        between = text[kept[-1][-1].end : group[0].start]
        reason = _REASON.search(between)
        if not reason or _REASON_ENDS.search(between, reason.end()):
            kept.append(group)
    return kept


def _single(mentions: Sequence[_Mention]) -> str | None:
    values = {mention.value for mention in mentions}
    return values.pop() if len(values) == 1 else None


# ---------------------------------------------------------------------- the labels in a text

_Finder = Callable[[str], list[_Mention]]
_DIGIT_WORDS = "|".join(word for word, value in SMALL.items() if 0 < value <= 10)


def _numbered(kind: str) -> _Finder:
    label = re.compile(
        rf"(?<!\w){kind}\s*(?:number|no\.|#|-|_)?\s*[(\[]?(?:(\d{{1,9}})(?!\w|\.\d)|({_DIGIT_WORDS})\b)",
        re.IGNORECASE,
    )

    def find(text: str) -> list[_Mention]:
        return [
            _Mention(str(int(each[1])) if each[1] else str(SMALL[each[2].lower()]), *each.span())
            for each in label.finditer(text)
        ]

    return find


#: Labels of another kind than the expected one.
_any_numbered = _numbered(f"(?:{'|'.join(KINDS)})")


_ORDINALS = "first second third fourth fifth sixth seventh eighth ninth tenth".split()
_ORDINAL = re.compile(
    rf"\b(?:({'|'.join(_ORDINALS)})|(\d)(?:st|nd|rd|th))\s+(?:{'|'.join(KINDS)})\b", re.IGNORECASE
)


def _ordinals(text: str) -> list[_Mention]:
    """`The second answer`, `the 3rd option`."""
    return [
        _Mention(each[2] or str(_ORDINALS.index(each[1].lower()) + 1), *each.span())
        for each in _ORDINAL.finditer(text)
    ]


def _bare_numbers(text: str) -> list[_Mention]:
    """Numbers behind `the answer is` and its like, or at the start, with nothing behind them."""
    bare = re.compile(r"(?<![\w.])(\d{1,3})(?=[\"'*_`)\]]*[ \t]*(?:$|\n|[.,;:)](?!\d)))")
    return [
        _Mention(str(int(each[1])), *each.span())
        for each in bare.finditer(text)
        if _is_announced(text, each.start()) or not re.search(r"\w", text[: each.start()])
    ]


_TRUTH_WORD = re.compile(r"\b(true|false|untrue)\b(?:[^\w\n.]*\?\W*(yes|no)\b)?", re.IGNORECASE)


def _is_announced(text: str, start: int) -> bool:
    front = text[max(0, start - _NEAR) : start]
    return bool(_NAMED_BEFORE.search(front) or _FOR_BEFORE.search(front))


def _truths(text: str) -> list[_Mention]:
    """`true`, `false` and `untrue`, and the answer of `Is it true? No.`; not those of `true or false`."""
    text = re.sub(
        r"\b(true|false)(?: or |/)(true|false)\b", lambda both: " " * len(both[0]), text, flags=re.I
    )
    return [
        _Mention(_truth(word.lower(), (reply or "").lower()), each.start(2 if reply else 1), each.end())
        for each in _TRUTH_WORD.finditer(text)
        for word, reply in [each.groups()]
    ]


def _truth(word: str, reply: str) -> str:
    """The truth value that a word has, as the reply to a question with it says."""
    return "true" if (word == "true") != (reply == "no") else "false"


def _yes_or_no(text: str) -> list[_Mention]:
    found = re.match(r"\W*(yes|no)\b", text, re.IGNORECASE) or re.search(
        rf"\banswer\s*(?:is|:)+{_DRESS}(yes|no)\b", text, re.IGNORECASE
    )
    return [_Mention(_TRUTH[found[1].lower()], *found.span(1))] if found else []


def _letters(text: str) -> list[_Mention]:
    """Capital letters that stand alone; not the `A` of `A frog`."""
    return [
        _Mention(each[1].lower(), *each.span(1))
        for each in re.finditer(r"(?<![\w'’])([A-E])(?![\w'’])", text)
        if not (each[1] == "A" and re.match(r"\s+(?!because|since|as\b|is\b)[a-z]", text[each.end() :]))
    ]


def _small_letters(text: str) -> list[_Mention]:
    return [
        _Mention(each[1], *each.span(1))
        for each in re.finditer(r"(?<![\w'’])([a-e])(?=\s*$|[).:,])", text)
        if len(text.strip()) < 4 or _is_announced(text, each.start())
    ]


_FINDERS: dict[str, tuple[_Finder, ...]] = {
    "truth": (_truths, _yes_or_no),
    "letter": (_letters, _small_letters),
}
