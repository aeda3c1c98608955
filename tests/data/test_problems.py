"""Arithmetic and mixed-difficulty windows: answers, splits, kinds, marks, refusals."""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from coterie.core.errors import ConfigError, DataError
from coterie.data import ByteTokenizer, build_source
from coterie.data.text.problems import ArithmeticConfig, ProblemSource, evaluate, text_windows

SMALL = {"count": 256, "context": 96}
SPLITS = ("train", "held_out")
EOS = ByteTokenizer.EOS


def source(kind: str = "arithmetic", split: str = "train", **changes: object) -> ProblemSource:
    built = build_source({"kind": kind, **SMALL, **changes}, split)
    assert isinstance(built, ProblemSource)
    return built


def everything(built: ProblemSource) -> torch.Tensor:
    return built.get(np.arange(len(built))).x


def whole_lines(built: ProblemSource) -> Iterator[str]:
    """Lines that are not cut by the end of their window."""
    for row in everything(built):
        yield from built.tokenizer.decode(row).split("\n")[:-1]


@pytest.mark.parametrize(
    "changes",
    [{}, {"terms": (2, 4)}, {"modulus": 97, "largest": 9, "terms": 5}, {"operators": ("*",)}],
)
def test_every_answer_is_the_value_modulo_the_modulus(changes: dict[str, object]) -> None:
    modulus = changes.get("modulus", 17)
    lines = list(whole_lines(source(**changes)))
    assert len(lines) > 256
    for line in lines:
        problem, _, answer = line.partition("=")
        assert re.fullmatch(r"\d+([-+*]\d+)+", problem)
        assert int(answer) == eval(problem) % modulus
    numbers = {int(number) for line in lines for number in re.findall(r"\d+", line.split("=")[0])}
    assert numbers == set(range(int(changes.get("largest", 16)) + 1))


def test_products_of_many_large_numbers_do_not_overflow() -> None:
    rng = np.random.default_rng(0)
    numbers = rng.integers(1_000_000, size=(50, 16))
    operators = rng.choice(np.array(["*", "*", "-", "+"]), size=(50, 15))
    found = evaluate(numbers, operators, 999_983)
    for row, ops, value in zip(numbers.tolist(), operators.tolist(), found.tolist()):
        text = "".join(f"{n}{op}" for n, op in zip(row, [*ops, ""]))
        assert value == eval(text) % 999_983


@pytest.mark.parametrize("kind", ["arithmetic", "mixed-difficulty"])
def test_held_out_lines_do_not_occur_in_training(kind: str) -> None:
    train, held_out = (source(kind, split, count=2048) for split in SPLITS)
    assert len(train) == 2048 and len(held_out) == 256
    seen, kept = set(whole_lines(train)), set(whole_lines(held_out))
    if kind == "mixed-difficulty":  # natural text repeats a line here and there
        made = re.compile(r"(\d+[-+*].*=\d+|(\w{3}) \2 \2 \2|\d+ \d+ \d+ \d+)")
        seen, kept = ({line for line in lines if made.fullmatch(line)} for lines in (seen, kept))
        assert {line[0].isdigit() for line in kept if "=" not in line} == {True, False}
    assert len(kept) > 500 and not seen & kept


@pytest.mark.parametrize("kind", ["arithmetic", "mixed-difficulty"])
def test_a_source_is_a_function_of_its_seed(kind: str) -> None:
    from coterie.data.text import problems

    first = everything(source(kind))
    problems._arithmetic.cache_clear()
    problems._mixed.cache_clear()
    assert torch.equal(everything(source(kind)), first)
    assert not torch.equal(everything(source(kind, seed=1)), first)
    assert not torch.equal(everything(source(kind, split="held_out")), first[:32])


def test_windows_begin_with_the_token_that_generation_begins_with() -> None:
    for kind in ("arithmetic", "mixed-difficulty"):
        ids = everything(source(kind))
        assert ids.shape == (256, 96) and (ids[:, 0] == EOS).all()
        generated = ids[:170, 1:] if kind == "mixed-difficulty" else ids[:, 1:]
        assert generated.max() < 128  # help pages hold EOS between documents


def test_numbers_of_terms_are_classes_and_one_alone_is_none() -> None:
    assert source().num_classes == 0 and source().get([0]).cond.label is None
    built = source(terms=(2, 4))
    assert built.class_names == ("2 terms", "4 terms")
    batch = built.get(np.arange(len(built)))
    for row, label in zip(batch.x, batch.cond.label.tolist()):
        first = built.tokenizer.decode(row).split("\n")[0]
        assert len(re.findall(r"[-+*]", first)) + 1 == (2, 4)[label]


def test_each_mixed_window_is_of_the_kind_its_label_tells() -> None:
    built = source("mixed-difficulty", count=300)
    assert built.class_names == ("easy", "hard", "text")
    labels = built.get(np.arange(300)).cond.label
    assert torch.bincount(labels).tolist() == [100, 100, 100]
    easy, hard, text = (everything(built)[labels == kind] for kind in range(3))
    for row in easy:
        for line in built.tokenizer.decode(row).split("\n")[:-1]:
            a, b, c, d = line.split(" ")
            counted = line[0].isdigit() and np.diff([int(a), int(b), int(c), int(d)]).tolist()
            assert a == b == c == d or counted == [1, 1, 1]
    assert all("=" in built.tokenizer.decode(row).split("\n")[0] for row in hard)
    from pydoc_data.topics import topics

    pages = "".join(topics[key] for key in sorted(topics)).encode()
    found = [bytes(row[1:].tolist()) for row in text if (row == EOS).sum() == 1]
    assert len(found) > 50 and all(piece in pages for piece in found)


def test_shares_divide_the_windows_and_a_kind_may_be_left_out() -> None:
    built = source("mixed-difficulty", shares=(1, 0, 3), count=100)
    labels = built.get(np.arange(100)).cond.label
    assert torch.bincount(labels, minlength=3).tolist() == [25, 0, 75]


def test_text_windows_cover_the_stream_evenly() -> None:
    found = text_windows(np.arange(100, dtype=np.uint16), 5, 21)
    assert (found[:, 0] == EOS).all() and found[:, 1].tolist() == [0, 20, 40, 60, 80]
    assert found[-1, -1] == 99


def test_answers_are_marked_with_their_line_end_and_only_where_whole() -> None:
    built = source()
    lines = ["3+4=7", "16*2-1=14", "no=12", "=5", "1+2+", "8-9=16"]
    ids = torch.tensor([[EOS, *"\n".join(lines).encode()]])
    marked = built.answer_mask(ids)[0]
    text = built.tokenizer.decode(ids[0])
    shown = "".join(c if m else "." for c, m in zip(text, marked[1:].tolist()))
    assert shown.replace("\n", "|") == "....7|.......14|".ljust(len(text), ".")
    # Without the start of its line a problem is not known.
    assert not built.answer_mask(ids[:, 2:6]).any()
    windows = everything(built)
    ends = (windows == ord("\n")).sum()
    marks = built.answer_mask(windows)
    assert (marks & (windows == ord("\n"))).sum() == ends
    digits = [windows[marks] == ord(c) for c in "0123456789\n"]
    assert torch.stack(digits).any(0).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"modulus": 2, "terms": 2}, "terms: 2 is not allowed; allowed: more than 12 problems"),
        ({"operators": ("+", "+")}, "operators: .* different operators"),
        ({"operators": ("/",)}, "operators"),
        ({"terms": ()}, "terms"),
        ({"terms": 1}, "terms"),
        ({"count": 10**9}, "count: 1000000000 is not allowed; allowed: up to"),
        ({"kind": "mixed-difficulty", "shares": (0, 0, 0)}, "shares: .* not all 0"),
        ({"kind": "mixed-difficulty", "shares": (1, -1, 1)}, "shares"),
    ],
)
def test_what_cannot_be_made_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_source({"kind": "arithmetic", **SMALL, **changes})


def test_a_window_longer_than_the_text_is_refused() -> None:
    with pytest.raises(DataError, match=r"mixed-difficulty: context: 600000 .* allowed: 2\.\."):
        build_source({"kind": "mixed-difficulty", "context": 600_000, "count": 8}, "held_out")


def test_a_flag_may_give_one_number_of_terms_or_several() -> None:
    assert ArithmeticConfig(terms=4).terms == (4,)
    assert ArithmeticConfig.from_dict({"terms": [2, 3]}).terms == (2, 3)
