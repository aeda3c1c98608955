"""Generated sections of a Markdown page, so that pages and results agree.

A section stands between two marker lines, ``<!-- NAME: how it is written -->`` and ``<!-- end of
NAME -->``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from coterie.core.errors import DataError
from coterie.core.folder import write_text


def section(text: str, name: str) -> str | None:
    """The text between the markers of ``name``; None if the page has no such markers."""
    found = _find(text, name)
    return found[1].strip() if found else None


def update_sections(page: str | Path, sections: Mapping[str, str]) -> list[str]:
    """Write the ``sections`` that a page has markers for; returns their names.

    DataError if it has none of them.
    """
    path = Path(page)
    text, known = path.read_text(encoding="utf-8"), []
    for name, body in sections.items():
        if found := _find(text, name):
            begin, end = found.span(1)
            text = f"{text[:begin]}{body.strip()}\n{text[end:]}"
            known.append(name)
    if not known:
        names = " or ".join(f"<!-- {name}: ... --> and <!-- end of {name} -->" for name in sections)
        raise DataError(f"{page}: needs the lines {names}")
    write_text(path, text)
    return known


def _find(text: str, name: str) -> re.Match[str] | None:
    """The section as a whole; its group 1 is what stands between the markers."""
    name = re.escape(name)
    return re.search(rf"<!-- {name}:[^\n]*-->\n(.*?)<!-- end of {name} -->", text, re.DOTALL)
