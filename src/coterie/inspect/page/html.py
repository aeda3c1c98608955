"""HTML from data: every string of a user is escaped, nothing is fetched, no script runs."""

from __future__ import annotations

import base64
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from coterie.inspect.page.findings import Finding
from coterie.inspect.page.theme import CSS
from coterie.inspect.plots.style import Picture

NARROW = 620
"""A picture is never shown narrower than this, in CSS pixels; small screens scroll it."""


@dataclass(frozen=True)
class Cell:
    """Text of a table cell and how to show it: "", "bad", "faint" or "words"."""

    text: str
    style: str = ""


@dataclass(frozen=True)
class Section:
    """``anchor`` is its address in the page; ``body`` is finished HTML."""

    anchor: str
    title: str
    body: str


def page(title: str, header: str, sections: Sequence[Section], footer: str) -> str:
    links = "".join(f'<li><a href="#{s.anchor}">{escape(s.title)}</a></li>' for s in sections)
    body = "".join(
        f'<section id="{s.anchor}" aria-labelledby="{s.anchor}-title">'
        f'<h2 id="{s.anchor}-title">{escape(s.title)}</h2>{s.body}</section>\n'
        for s in sections
    )
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(title)}</title>\n<style>{CSS}</style>\n</head>\n<body>\n"
        f'<header class="top">{header}<nav aria-label="Sections"><ul>{links}</ul></nav></header>\n'
        f"<main>\n{body}</main>\n<footer>{footer}</footer>\n</body>\n</html>\n"
    )


def facts(pairs: Iterable[tuple[str, str]]) -> str:
    items = "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in pairs)
    return f'<dl class="facts">{items}</dl>' if items else ""


def paragraph(text: str, style: str = "") -> str:
    return f'<p class="{style}">{escape(text)}</p>' if style else f"<p>{escape(text)}</p>"


def says(lines: Sequence[str]) -> str:
    return f'<ul class="says">{"".join(f"<li>{escape(line)}</li>" for line in lines)}</ul>'


def finding_list(found: Sequence[Finding]) -> str:
    """The level is also written out: colour is never the only sign."""
    words = {"alarm": "Alarm", "note": "Note", "good": "Checked"}
    items = "".join(
        f'<li class="{f.level}"><b>{words[f.level]}</b>{escape(f.text)}</li>' for f in found
    )
    return f'<ul class="findings">{items}</ul>' if items else ""


def table(caption: str, head: Sequence[str], rows: Sequence[Sequence[str | Cell]]) -> str:
    """The first cell of a row is its heading; wide tables scroll inside the page."""
    columns = "".join(f'<th scope="col">{escape(name)}</th>' for name in head)
    lines = "".join(
        f'<tr><th scope="row">{escape(_text(row[0]))}</th>{"".join(map(_cell, row[1:]))}</tr>'
        for row in rows
    )
    # The caption stays outside what scrolls, so that it wraps on a narrow screen.
    name = f"t{zlib.crc32((caption + lines).encode()):08x}"
    return (
        f'<p class="caption" id="{name}">{escape(caption)}</p>'
        f'<div class="scroll tall" role="region" tabindex="0" aria-labelledby="{name}">'
        f'<table aria-labelledby="{name}"><thead><tr>{columns}</tr></thead>'
        f"<tbody>{lines}</tbody></table></div>"
    )


def _text(cell: str | Cell) -> str:
    return cell.text if isinstance(cell, Cell) else cell


def _cell(cell: str | Cell) -> str:
    style = cell.style if isinstance(cell, Cell) else ""
    return f'<td class="{style}">{escape(_text(cell))}</td>' if style else _plain_cell(cell)


def _plain_cell(cell: str | Cell) -> str:
    return f"<td>{escape(_text(cell))}</td>"


def card(body: str) -> str:
    return f'<div class="card">{body}</div>'


def picture(item: Picture, extra: str = "") -> str:
    """The image follows the reader's light or dark preference; caption above, data below."""
    plot = item.plot
    narrow = min(item.width, NARROW)
    return (
        f'<figure class="card" id="{plot.name}"><h3>{escape(plot.title)}</h3>'
        f"<figcaption>{escape(plot.caption)}</figcaption>"
        f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(plot.title)}">'
        f'<picture><source media="(prefers-color-scheme: dark)" srcset="{_embed(item.dark)}">'
        f'<img src="{_embed(item.light)}" alt="{escape(plot.alt)}" width="{item.width}" '
        f'style="min-width:{narrow}px"></picture></div>{extra}</figure>\n'
    )


def _embed(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


def details(summary: str, body: str) -> str:
    return f"<details><summary>{escape(summary)}</summary>{body}</details>"


def preformatted(text: str, wrap: bool = False) -> str:
    style = ' class="text"' if wrap else ""
    return f"<pre{style}>{escape(text)}</pre>"


def omitted(reasons: Mapping[str, str]) -> str:
    """What is not on the page, and why."""
    if not reasons:
        return ""
    items = "; ".join(f"{name}: {why}" for name, why in reasons.items())
    return paragraph(f"Not shown. {items}.", "omitted")
