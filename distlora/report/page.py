"""A page made of blocks, as Markdown and as HTML in one file."""

import base64
import html
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

#: Looks of the HTML page; it reads well in the dark, on paper and on a telephone.
STYLE = """
:root { color-scheme: light dark }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem }
h1, h2, h3 { line-height: 1.2; margin-top: 2em }
h1 { margin-top: 0 }
.table { overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: 1em 0 }
th, td { padding: .3em .8em; text-align: right }
td { white-space: nowrap }
th { border-bottom: 2px solid; vertical-align: bottom }
td { border-bottom: 1px solid #8885 }
th.text, td.text { text-align: left }
img { max-width: 100%; background: #fff }
pre { overflow-x: auto; padding: .8em; background: #8882 }
"""
#: What Markdown would take for something else than a character.
_SPECIAL = re.compile(r"([\\`*_\[\]<>|~$])")


@dataclass(frozen=True)
class Heading:
    text: str
    level: int = 2


@dataclass(frozen=True)
class Paragraph:
    text: str


@dataclass(frozen=True)
class Bullets:
    items: Sequence[str]


@dataclass(frozen=True)
class Commands:
    lines: Sequence[str]


@dataclass(frozen=True)
class Picture:
    """A PNG file. name: in the directory of the page. text: for those who cannot see it."""

    name: str
    text: str


@dataclass(frozen=True)
class Table:
    """rows: of texts. bold: places (row, column) that stand out. texts: the number of first columns that hold
    no numbers.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    bold: frozenset[tuple[int, int]] = frozenset()
    texts: int = 1


Block = Heading | Paragraph | Bullets | Commands | Picture | Table


# ---------------------------------------------------------------------- Markdown


def as_markdown(blocks: Sequence[Block]) -> str:
    return "\n\n".join(map(_markdown, blocks)) + "\n"


def _markdown(block: Block) -> str:
    match block:
        case Heading(text, level):
            return f"{'#' * level} {_plain(text)}"
        case Paragraph(text):
            return _plain(text)
        case Bullets(items):
            return "\n".join(f"- {_plain(item)}" for item in items)
        case Commands(lines):
            fence = "`" * max(3, 1 + max(map(len, re.findall("`+", "\n".join(lines))), default=0))
            return "\n".join([f"{fence}bash", *lines, fence])
        case Picture(name, text):
            return f"![{_plain(text)}]({name})"
        case Table():
            return _markdown_table(block)


def _markdown_table(table: Table) -> str:
    rule = [":--" if column < table.texts else "--:" for column in range(len(table.header))]
    body = [
        [
            f"**{_plain(cell)}**" if (row, column) in table.bold else _plain(cell)
            for column, cell in enumerate(cells)
        ]
        for row, cells in enumerate(table.rows)
    ]
    lines = [[_plain(cell) for cell in table.header], rule, *body]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _plain(text: str) -> str:
    """The text so that it is shown as it is, in one line."""
    return _SPECIAL.sub(r"\\\1", " ".join(text.split()))


# ---------------------------------------------------------------------- HTML


def as_html(blocks: Sequence[Block], folder: Path) -> str:
    """The page with everything in it. folder: with the pictures."""
    title = next((block.text for block in blocks if isinstance(block, Heading)), "")
    body = "\n".join(_html(block, folder) for block in blocks)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def _html(block: Block, folder: Path) -> str:
    match block:
        case Heading(text, level):
            return f"<h{level}>{html.escape(text)}</h{level}>"
        case Paragraph(text):
            return f"<p>{html.escape(text)}</p>"
        case Bullets(items):
            return "<ul>" + "".join(f"<li>{html.escape(item)}</li>" for item in items) + "</ul>"
        case Commands(lines):
            return f"<pre>{html.escape(chr(10).join(lines))}</pre>"
        case Picture(name, text):
            data = base64.b64encode((folder / name).read_bytes()).decode()
            return f'<p><img alt="{html.escape(text)}" src="data:image/png;base64,{data}"></p>'
        case Table():
            return _html_table(block)


def _html_table(table: Table) -> str:
    def cell(kind: str, column: int, text: str, bold: bool = False) -> str:
        align = ' class="text"' if column < table.texts else ""
        text = html.escape(text)
        return f"<{kind}{align}>{f'<strong>{text}</strong>' if bold else text}</{kind}>"

    header = "".join(cell("th", column, text) for column, text in enumerate(table.header))
    rows = [
        "".join(cell("td", column, text, (row, column) in table.bold) for column, text in enumerate(cells))
        for row, cells in enumerate(table.rows)
    ]
    body = "\n".join(f"<tr>{row}</tr>" for row in rows)
    head = f"<thead><tr>{header}</tr></thead>"
    return f'<div class="table"><table>\n{head}\n<tbody>\n{body}\n</tbody>\n</table></div>'
