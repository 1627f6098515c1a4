"""Texts and bytes that were right once, and what hostile hands make of them."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from hypothesis import strategies as st

Content = TypeVar("Content", str, bytes)

#: What breaks parsers: numbers without end, half characters, depths, names of no file.
HOSTILE = (
    *("9" * 5000, "-" + "9" * 400, "1e999", "0x" + "f" * 3000, "1e-3", "NaN", "-Infinity", ".inf", "١٢", "²"),
    *("[" * 3000, "{" * 3000, '{"a":' * 2000, "- " * 500, "(" * 500, "\0", "\x1b[2J", "\u2028", "\ufeff"),
    *("\udcff", "\ud800", '"\\ud800"', '"\\u0000"', "~nobody/x", "a" * 300, "../" * 100, "/dev/null", "%s{}"),
    *("null", "true", "{}", "[]", '""', "''", "-", "=", ":", ",", " ", "\t", "\\", "#", "*", "\r", "\n"),
    *("&a ", "*a ", "!!int ", "<<", "? "),
)  # fmt: skip


@st.composite
def damaged_text(draw, rights: Sequence[str], words: Sequence[str] = (), most: int = 6) -> str:
    """One of `rights`, after up to `most` changes; words: are put in, beside HOSTILE ones."""
    return _changed(draw, draw(st.sampled_from(rights)), (*words, *HOSTILE), most)


@st.composite
def damaged(draw, rights: Sequence[bytes], words: Sequence[bytes] = (), most: int = 6) -> bytes:
    """The same for bytes."""
    hostile = [word.encode("utf-8", "surrogatepass") for word in HOSTILE]
    numbers = [number.to_bytes(8, "little") for number in (0, 1, 2**31 - 1, 2**32 - 1, 2**63, 2**64 - 1)]
    return _changed(draw, draw(st.sampled_from(rights)), (*words, *hostile, *numbers), most)


def _changed(draw, content: Content, words: Sequence[Content], most: int) -> Content:
    for _ in range(min(most, draw(st.sampled_from((0, 1, 1, 1, 2, 2, 3, most))))):
        start = draw(st.integers(0, len(content)))
        end = min(len(content), start + draw(st.one_of(st.integers(0, 8), st.integers(0, 400))))
        piece = draw(st.one_of(st.sampled_from(words), partial(_own, content)()))
        content = content[:start] + piece + content[end:]
    return content


def _own(content: Content) -> st.SearchStrategy:
    """Something short of any kind, or a piece of the content, perhaps several times."""
    short = st.binary(max_size=6) if isinstance(content, bytes) else st.text(max_size=6)
    places = st.tuples(st.integers(0, len(content)), st.integers(0, 60), st.sampled_from((1, 1, 2, 50)))
    return st.one_of(short, places.map(lambda at: content[at[0] : at[0] + at[1]] * at[2]))


def written(folder: Path, content: str | bytes, name: str = "file") -> Path:
    """A file with this content."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
    return path


def values(leaves: st.SearchStrategy[Any] | None = None) -> st.SearchStrategy[Any]:
    """JSON values of any kind, as a file may hold them where another kind is meant."""
    leaves = leaves or st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.sampled_from(HOSTILE),
        st.sampled_from((10**400, -1, 0, 2**63, 2**64)),
    )  # fmt: skip
    return st.recursive(
        leaves,
        lambda inner: st.one_of(
            st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=6), inner, max_size=4)
        ),
        max_leaves=6,
    )
