"""Texts of known difficulty: modular arithmetic, and windows of easy, hard and natural lines.

Every window begins with EOS and holds whole lines, the last one cut. Problems are held out by a
hash of their text, so no held-out problem occurs in training. Both sources mark the positions of
answers (:meth:`ProblemSource.answer_mask`).
Legend: S windows, B batch, N = context, P problems, T terms.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import BeforeValidator, Field, model_validator
from torch import Tensor

from coterie.core.errors import ConfigError, DataError, describe
from coterie.core.numbers import Seed
from coterie.core.rng import numpy_generator
from coterie.data.source import SOURCES, SourceInfo, Split, is_held_out
from coterie.data.text.packaged import ByteTokenizer, Corpus, TextConfig, TextSource, pydoc_corpus

Operator = Literal["+", "-", "*"]
FEWEST_PROBLEMS = 200
"""Fewer different problems than this cannot be split by a hash."""
MOST_TOKENS = 500_000_000
LETTERS = "abcdefghijklmnopqrstuvwxyz"
ANSWER = re.compile(rb"(?<=\n)\d+(?:[-+*]\d+)+=(\d+\n)")
_CHUNK = 4096
_ASCII_END = 10  # specials read as the end of a line


class ProblemSource(TextSource):
    """Windows of lines, some of which are problems with an answer."""

    def answer_mask(self, ids: Tensor) -> Tensor:
        """bool [B, N]: the answers in ``ids`` i64 [B, N], each with the end of its line.

        The end belongs to the answer: without it 1 could be the start of 13. Answers whose
        problem or end lies outside the window are left out.
        """
        plain = np.where(ids.numpy() < 256, ids.numpy(), _ASCII_END).astype(np.uint8)
        mask = np.zeros(plain.shape, dtype=bool)
        for row, line in zip(mask, plain):
            for found in ANSWER.finditer(line.tobytes()):
                row[found.start(1) : found.end(1)] = True
        return torch.from_numpy(mask)


def _as_tuple(value: Any) -> Any:
    return (value,) if isinstance(value, int) else value


class _ProblemConfig(TextConfig):
    """Problems are numbers 0..``largest`` (None: modulus - 1) joined by ``operators``; the answer
    is their value, * before + and -, modulo ``modulus``."""

    modulus: int = Field(default=17, ge=2, le=1_000_000)  # answers are modulo this number
    largest: int | None = Field(default=None, ge=1, le=1_000_000)
    """numbers are 0..largest; null: modulus - 1"""
    operators: tuple[Operator, ...] = Field(default=("+", "-", "*"), min_length=1)
    """that join the numbers; * binds first"""
    count: int = Field(
        default=8192, ge=8, lt=2**63
    )  # training windows; an eighth as many are held out
    seed: Seed = 0  # of the problems

    @model_validator(mode="after")
    def _enough(self) -> _ProblemConfig:
        if self.count * self.context > MOST_TOKENS:
            allowed = f"up to {MOST_TOKENS // self.context:,} windows of {self.context} tokens"
            raise ConfigError(describe("count", self.count, allowed))
        if len(set(self.operators)) < len(self.operators):
            raise ConfigError(describe("operators", self.operators, "different operators"))
        for terms in self._terms():
            known = len(self.operators) ** (terms - 1) * (self.highest + 1) ** terms
            if known < FEWEST_PROBLEMS:
                hint = f"raise terms or largest: at least {FEWEST_PROBLEMS} are needed"
                raise ConfigError(describe("terms", terms, f"more than {known} problems", hint))
        return self

    def _terms(self) -> tuple[int, ...]:
        raise NotImplementedError

    @property
    def highest(self) -> int:
        return self.modulus - 1 if self.largest is None else self.largest

    def _windows(self, split: Split) -> int:
        return self.count if split == "train" else self.count // 8

    def _rng(self, split: Split, name: str) -> np.random.Generator:
        return numpy_generator(self.seed, self.kind, split, name)

    def _built(self, windows: Sequence[np.ndarray], names: Sequence[str]) -> ProblemSource:
        """``windows``: u16 [S, N] of each class, in the order of ``names``."""
        sizes = np.cumsum([0, *(part.size for part in windows)])
        corpus = Corpus(np.concatenate([part.ravel() for part in windows]), sizes)
        names = names if len(names) > 1 else ()
        return ProblemSource(self.kind, corpus, self.context, names, self.info.licence)


@SOURCES.register
class ArithmeticConfig(_ProblemConfig):
    """Lines like ``12+5*7=13``. Several numbers of ``terms``: classes, one in each window."""

    kind: Literal["arithmetic"] = "arithmetic"
    terms: Annotated[
        tuple[Annotated[int, Field(ge=2, le=16)], ...],
        BeforeValidator(_as_tuple),
        Field(min_length=1),
    ] = (3,)
    """Numbers per problem; several values are classes, one in each window."""
    info: ClassVar[SourceInfo] = SourceInfo(
        summary="Modular arithmetic, one problem a line",
        modality="text",
        shape="context",
        count="as configured",
        licence="none needed: computed",
    )

    def _terms(self) -> tuple[int, ...]:
        return self.terms

    def build(self, split: Split = "train") -> ProblemSource:
        names = [f"{terms} terms" for terms in self.terms]
        return self._built(_arithmetic(self, split), names)


KINDS = ("easy", "hard", "text")


@SOURCES.register
class MixedDifficultyConfig(_ProblemConfig):
    """Windows of one kind: ``easy`` (a repeated word, or counting), ``hard`` (arithmetic) or
    ``text`` (Python's help pages)."""

    kind: Literal["mixed-difficulty"] = "mixed-difficulty"
    terms: int = Field(default=3, ge=2, le=16)  # numbers per arithmetic problem
    shares: tuple[float, float, float] = (1.0, 1.0, 1.0)  # proportions of the three kinds
    info: ClassVar[SourceInfo] = SourceInfo(
        summary="Easy lines, hard lines and text, one kind a window",
        modality="text",
        shape="context",
        count="as configured",
        licence="PSF-2.0 (the text); the rest is computed",
    )

    @model_validator(mode="after")
    def _some(self) -> MixedDifficultyConfig:
        if min(self.shares) < 0 or sum(self.shares) == 0:
            raise ConfigError(describe("shares", self.shares, "numbers >= 0, not all 0"))
        return self

    def _terms(self) -> tuple[int, ...]:
        return (self.terms,)

    def build(self, split: Split = "train") -> ProblemSource:
        return self._built(_mixed(self, split), KINDS)


@lru_cache(maxsize=4)
def _arithmetic(config: ArithmeticConfig, split: Split) -> list[np.ndarray]:
    sizes = _divide(config._windows(split), (1.0,) * len(config.terms))
    return [
        fill(problems(config, terms, split), size, config.context)
        for terms, size in zip(config.terms, sizes)
    ]


@lru_cache(maxsize=4)
def _mixed(config: MixedDifficultyConfig, split: Split) -> list[np.ndarray]:
    num_easy, num_hard, num_text = _divide(config._windows(split), config.shares)
    text = text_windows(pydoc_corpus(split).tokens, num_text, config.context)
    easy = fill(easy_lines(config._rng(split, "easy"), split), num_easy, config.context)
    return [easy, fill(problems(config, config.terms, split), num_hard, config.context), text]


def _divide(count: int, shares: Sequence[float]) -> list[int]:
    """Whole numbers in the proportion of ``shares`` that add up to ``count``."""
    edges = np.round(np.cumsum(shares) / sum(shares) * count).astype(int)
    return [int(n) for n in np.diff([0, *edges])]


def fill(lines: Iterator[str], count: int, context: int) -> np.ndarray:
    """u16 [count, context]: EOS, then lines until the window is full."""
    out = np.full((count, context), ByteTokenizer.EOS, dtype=np.uint16)
    for window in out:
        text = bytearray()
        while len(text) < context - 1:
            text += next(lines).encode() + b"\n"
        window[1:] = text[: context - 1]
    return out


def text_windows(tokens: np.ndarray, count: int, context: int) -> np.ndarray:
    """u16 [count, context]: EOS, then a stretch of ``tokens``; the starts are evenly spaced."""
    if len(tokens) < context:
        raise DataError(describe("mixed-difficulty: context", context, f"2..{len(tokens)}"))
    starts = np.linspace(0, len(tokens) - context + 1, count).astype(int)
    out = np.full((count, context), ByteTokenizer.EOS, dtype=np.uint16)
    out[:, 1:] = tokens[starts[:, None] + np.arange(context - 1)]
    return out


def problems(config: _ProblemConfig, terms: int, split: Split) -> Iterator[str]:
    """Problems with their answers, without end; those of the other split are passed over."""
    rng = config._rng(split, f"{terms} terms")
    signs = np.array(config.operators)
    while True:
        numbers = rng.integers(config.highest + 1, size=(_CHUNK, terms))
        operators = signs[rng.integers(len(signs), size=(_CHUNK, terms - 1))]
        values = evaluate(numbers, operators, config.modulus)
        for row, ops, value in zip(numbers.tolist(), operators.tolist(), values.tolist()):
            rest = "".join(f"{op}{number}" for op, number in zip(ops, row[1:]))
            problem = f"{row[0]}{rest}"
            if is_held_out(f"arithmetic/{problem}") == (split == "held_out"):
                yield f"{problem}={value}"


def evaluate(numbers: np.ndarray, operators: np.ndarray, modulus: int) -> np.ndarray:
    """i64 [P]: values modulo ``modulus`` of ``numbers`` [P, T] joined by ``operators`` [P, T-1]."""
    total = np.zeros(len(numbers), dtype=np.int64)
    product = numbers[:, 0] % modulus  # with its sign; added once a + or - ends it
    for place in range(operators.shape[1]):
        operator, number = operators[:, place], numbers[:, place + 1] % modulus
        times = operator == "*"
        total = np.where(times, total, total + product)
        signed = np.where(operator == "-", -number, number)
        product = np.where(times, product * number % modulus, signed)
    return (total + product) % modulus


def easy_lines(rng: np.random.Generator, split: Split) -> Iterator[str]:
    """``qzx qzx qzx qzx`` and ``417 418 419 420``, in equal parts, without end."""
    while True:
        words = rng.integers(len(LETTERS), size=(_CHUNK, 3))
        starts = rng.integers(900, size=_CHUNK)
        for word, start, counts in zip(words.tolist(), starts.tolist(), rng.random(_CHUNK) < 0.5):
            text = str(start) if counts else "".join(LETTERS[letter] for letter in word)
            if is_held_out(f"easy/{text}") != (split == "held_out"):
                continue
            items = range(start, start + 4) if counts else [text] * 4
            yield " ".join(map(str, items))
