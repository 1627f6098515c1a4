"""LaTeX and Markdown as plain characters, so that an answer reads alike in every dress."""

import re

_IN_BRACES = re.compile(
    r"\\(?:boxed|fbox|mbox|text[a-z]*|math(?:rm|bf|it|sf|tt|bb|cal)|emph|underline|bm|boldsymbol|operatorname\*?)\s*\{"
)
_REPEATING = re.compile(r"(?<![\d.,])(\d{1,9})\.(\d{0,9})\\(?:overline|bar)\s*\{\s*(\d{1,9})\s*\}", re.ASCII)
_FRACTION = re.compile(r"\\[dtc]?frac(?![a-z])\s*")
#: Characters between two braces.
_LONGEST_GROUP = 4000
_COMMANDS = {
    **dict.fromkeys(("times", "cdot", "ast"), "*"),
    **dict.fromkeys(("left", "right", "big", "Big", "displaystyle", "bf", "rm", "limits"), ""),
    **dict.fromkeys(("quad", "qquad", "ldots", "dots", "cdots"), " "),
    **dict.fromkeys(("implies", "Rightarrow", "rightarrow", "to", "Longrightarrow"), "⇒"),
    **dict.fromkeys(("approx", "simeq", "sim"), "≈"),
    **dict.fromkeys(("le", "leq", "leqslant"), "≤"),
    **dict.fromkeys(("ge", "geq", "geqslant"), "≥"),
    **dict.fromkeys(("ne", "neq"), "≠"),
    **dict.fromkeys(("emptyset", "varnothing"), "∅"),
    "lt": "<",
    "gt": ">",
    "infty": "∞",
    "cup": "∪",
    "cap": "∩",
    "div": "/",
    "pm": "±",
    "degree": " degrees ",
    "pounds": "£",
    "euro": "€",
}
_SIGNS = str.maketrans(
    {
        **dict.fromkeys("−﹣－‐‑⁻", "-"),
        **dict.fromkeys("×✕✖∗⋅·", "*"),
        **dict.fromkeys("÷∕⁄", "/"),
        **dict.fromkeys("\u00a0\u2002\u2003\u2007\u2008\u2009\u200a\u202f\u3000", " "),
        **dict.fromkeys("\u200b\u200c\u200d\u2060\ufeff`", None),
        **dict.fromkeys("≦⩽", "≤"),
        **dict.fromkeys("≧⩾", "≥"),
        **dict.fromkeys("→⟹⟶∴", "⇒"),
        **dict.fromkeys("‘’ʼ", "'"),
        "—": " . ",
        "＋": "+",
        "＝": "=",
        "％": "%",
        "＄": "$",
        "²": "^2",
        "³": "^3",
        "°": " degrees ",
    }
)
_VULGAR = {"½": "1/2", "⅓": "1/3", "⅔": "2/3", "¼": "1/4", "¾": "3/4", "⅕": "1/5", "⅖": "2/5", "⅗": "3/5"}
_VULGAR |= {"⅘": "4/5", "⅙": "1/6", "⅚": "5/6", "⅛": "1/8", "⅜": "3/8", "⅝": "5/8", "⅞": "7/8"}


def plain(text: str) -> str:
    """The text without LaTeX's commands and Markdown's emphasis, in lower case, in one line.

    A fraction becomes `((a)/(b))`, a group in braces one in parentheses; the braces of a set stay. A command
    without a plain form, such as `\\sqrt`, stays.
    """
    text = re.sub(r"<<[^<>]*>>|</?[a-zA-Z]{1,6}>", "", text)
    for sign, digits in _VULGAR.items():
        text = text.replace(sign, f" {digits} ")
    text = _without_markdown(text.translate(_SIGNS))
    text = re.sub(r"[-=]+>", "⇒", text).replace("<=", "≤").replace(">=", "≥")
    text = re.sub(r"\\[!]|\{,\}", lambda found: "," if found[0] == "{,}" else "", text)
    text = re.sub(r"\^\s*\{?\s*\\circ\s*\}?", " degrees ", text)
    text = _with_fractions(repeating_decimals(_unwrapped(text)))
    text = re.sub(r"\^\(?(?:th|st|nd|rd)\b\)?", "", text)
    text = re.sub(
        r"\\[(),;: \[\]]|[~\n\r\t]", lambda f: " " if f[0] in "\n\r\t~" or f[0][1] in ",;: " else "", text
    )
    text = re.sub(r"\\([$%#&])", r"\1", text)
    text = re.sub(r"(?<!\\)[{}]", lambda found: "(" if found[0] == "{" else ")", text)
    text = text.replace("\\{", "{").replace("\\}", "}")
    text = re.sub(r"\\([A-Za-z]+)", lambda found: _COMMANDS.get(found[1], found[0]), text)
    return re.sub(r"\s+", " ", text).strip().lower()


def repeating_decimals(text: str) -> str:
    """The text with each `0.1\\overline{6}` as the fraction that it is, `\\frac{15}{90}`."""
    return _REPEATING.sub(_as_fraction, text)


def first_line(text: str, with_a: str = r"\S") -> str:
    """The first line with a character of this pattern, without the spaces around it; "" without one."""
    return next((line.strip() for line in text.splitlines() if re.search(with_a, line)), "")


def braced(text: str, start: int) -> tuple[str, int]:
    """What stands between the brace at `start` and its partner, and the place behind that one; to the end of
    the text where the partner is missing, or further away than in any formula.
    """
    depth = 0
    for place in range(start, min(len(text), start + _LONGEST_GROUP)):
        if text[place - 1 : place] == "\\" and place > start:
            continue
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return text[start + 1 : place], place + 1
    return text[start + 1 :], len(text)


def _as_fraction(found: re.Match[str]) -> str:
    whole, once, again = found.groups()
    above = int(whole + once + again) - int(whole + once)
    return f" \\frac{{{above}}}{{{(10 ** len(again) - 1) * 10 ** len(once)}}} "


def _without_markdown(text: str) -> str:
    text = re.sub(r"\*\*(?=\s*[\d(])(?<=[\d)]\*\*)", "^", text)  # a power, as programs write it
    text = text.replace("**", "").replace("__", "")
    return re.sub(
        r"(?<![\w)\s*])\s*[*_](?=[^\s*_])|^[*_](?=\S)|(?<=\s)[*_](?=\S)|(?<=\S)[*_](?=\s*(?:$|[.,;:!?]))",
        "",
        text,
    )


def _unwrapped(text: str) -> str:
    """Without the commands that only change how their argument looks."""
    while found := _IN_BRACES.search(text):
        inside, end = braced(text, found.end() - 1)
        text = f"{text[: found.start()]} {inside} {text[end:]}"
    return text


def _with_fractions(text: str) -> str:
    while found := _FRACTION.search(text):
        above, place = _argument(text, found.end())
        below, place = _argument(text, place)
        whole = (
            re.search(r"\d\s*$", text[: found.start()])
            and above.strip().isdecimal()
            and below.strip().isdecimal()
        )
        fraction = f" {above.strip()}/{below.strip()} " if whole else f"(({above})/({below}))"
        text = f"{text[: found.start()]}{fraction}{text[place:]}"
    return text


def _argument(text: str, place: int) -> tuple[str, int]:
    """The argument of a command: a group in braces, a command without an argument, or one character."""
    while text[place : place + 1] == " ":
        place += 1
    if text[place : place + 1] == "{":
        return braced(text, place)
    found = re.compile(r"\\[A-Za-z]+|.?").match(text, place)
    assert found is not None, "nothing at all is a match, too"
    return found[0], found.end()
