"""Docstrings name code as ``:class:`~a.b.C```; on the site it is a link where ``C`` has a page."""

from __future__ import annotations

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:class|func|meth|mod|data):`(~?)([\w.]+)`")


def linked(found: re.Match[str]) -> str:
    """A reference that becomes plain code where the site has nothing of that name."""
    name = found[2].rpartition(".")[2] if found[1] else found[2]
    return f'<autoref identifier="{found[2]}" optional><code>{name}</code></autoref>'


class DocstringRoles(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring:
            obj.docstring.value = ROLE.sub(linked, obj.docstring.value)
