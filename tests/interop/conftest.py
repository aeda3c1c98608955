"""Tiny models of the seven classes, made once, and a text; skipped without transformers."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def book(tmp_path: Path) -> Path:
    """A text of 540 bytes."""
    from tiny_hf_models import TEXT

    path = tmp_path / "book.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Kind -> the folder of a saved tiny model, without tokenizer files."""
    pytest.importorskip("transformers")
    from tiny_hf_models import make_model

    made: dict[str, Path] = {}

    def folder(kind: str) -> Path:
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp(kind)
            make_model(kind, std=0.2).save_pretrained(made[kind])
        return made[kind]

    return folder


@pytest.fixture(scope="session")
def model_of() -> Callable[[str], Any]:
    """Kind -> a tiny random model, the same object each time: undo what you do to it."""
    pytest.importorskip("transformers")
    from tiny_hf_models import make_model

    return cache(make_model)
