"""What ``import coterie`` offers, without loading it before it is asked for."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

import pytest

import coterie


def declared_for_type_checkers() -> dict[str, str]:
    """Name -> module, as read from the imports under ``if TYPE_CHECKING``."""
    tree = ast.parse(Path(coterie.__file__).read_text(encoding="utf-8"))
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    return {
        alias.name: str(node.module).removeprefix("coterie.")
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }


def test_type_checkers_see_what_there_is() -> None:
    assert declared_for_type_checkers() == coterie._HOME


@pytest.mark.parametrize("name", sorted(coterie._HOME))
def test_a_name_is_the_object_of_its_module(name: str) -> None:
    module = importlib.import_module(f"coterie.{coterie._HOME[name]}")
    assert getattr(coterie, name) is getattr(module, name)
    assert name in dir(coterie)


def test_a_subpackage_is_imported_when_used() -> None:
    assert coterie.core.__name__ == "coterie.core"


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = coterie.nonsense
    assert not hasattr(coterie, "__nonsense__")
