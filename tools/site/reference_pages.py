"""Every page of the site that is made of the code."""

from __future__ import annotations

import api_pages
import part_pages
import verb_pages


def pages() -> dict[str, str]:
    """Path below ``docs`` -> text."""
    return {**verb_pages.pages(), **part_pages.pages(), **api_pages.pages()}
