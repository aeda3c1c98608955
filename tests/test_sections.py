"""Sections of a page are replaced, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

from coterie.core.errors import DataError
from coterie.core.sections import section, update_sections

PAGE = """before
<!-- a: written by a command -->
old
<!-- end of a -->
between
<!-- b: written -->
<!-- end of b -->
after
"""


def test_only_what_is_between_the_markers_is_replaced(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(PAGE, encoding="utf-8")
    assert update_sections(page, {"a": "new \\1", "b": "| x |\n", "c": "nowhere"}) == ["a", "b"]
    made = page.read_text(encoding="utf-8")
    assert made == PAGE.replace("old", "new \\1").replace("written -->\n", "written -->\n| x |\n")
    assert section(made, "b") == "| x |" and section(made, "c") is None


def test_a_page_without_the_markers_is_refused(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(PAGE, encoding="utf-8")
    with pytest.raises(DataError, match=r"needs the lines <!-- c: ... --> and <!-- end of c -->"):
        update_sections(page, {"c": "text"})
    assert page.read_text(encoding="utf-8") == PAGE
