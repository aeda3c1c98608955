"""Flags that are paths into the configuration."""

from __future__ import annotations

import click
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coterie.cli.overrides import split

WORD = st.text("abc_0", min_size=1, max_size=4)
PATH = st.lists(WORD, min_size=1, max_size=3).map(".".join)
VALUE = st.text("a1=-. é", min_size=1, max_size=8).filter(lambda text: not text.startswith("--"))


@settings(max_examples=50)
@given(st.dictionaries(PATH, VALUE, max_size=4), st.lists(WORD, max_size=2))
def test_both_spellings_of_a_flag_mean_the_same(paths: dict[str, str], words: list[str]) -> None:
    joined = [f"--{path}={value}" for path, value in paths.items()]
    apart = [text for path, value in paths.items() for text in (f"--{path}", value)]
    assert split([*words, *joined]) == (words, paths)
    assert split([*apart, *words]) == (words, paths)


@pytest.mark.parametrize(
    ("arguments", "paths"),
    [
        (["--a.b", "-1e-4"], {"a.b": "-1e-4"}),
        (["--a.b="], {"a.b": ""}),
        (["--a.b=x=y"], {"a.b": "x=y"}),
        (["--a.b=1", "--a.b=2"], {"a.b": "2"}),
        (["--batch-size=4"], {"batch_size": "4"}),
    ],
)
def test_values_are_taken_as_written(arguments: list[str], paths: dict[str, str]) -> None:
    assert split(arguments) == ([], paths)


@pytest.mark.parametrize("arguments", [["--a.b"], ["--a.b", "--c=1"], ["--a.b", "--c", "1"]])
def test_a_flag_without_a_value_is_refused(arguments: list[str]) -> None:
    with pytest.raises(click.UsageError, match=r"--a\.b needs a value"):
        split(arguments)


def test_an_unknown_short_option_is_refused() -> None:
    with pytest.raises(click.NoSuchOption, match="-z"):
        split(["dit-moe", "-z"])
