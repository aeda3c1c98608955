"""A text as windows of tokens, by the model's own tokenizer or, said aloud, by raw bytes.

Legend: T tokens of the text, W windows, C tokens per window, B windows at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from coterie.core.errors import ConfigError, DataError, describe
from coterie.core.files import regular_file

if TYPE_CHECKING:
    from coterie.interop.transformers.moe_folder import ModelFolder

BYTES = 256
SPARE = 32
CHARACTERS = 8  # tried first for a token; more where tokens are longer


@dataclass(frozen=True, eq=False)
class Tokens:
    """``ids`` i64 [T]; ``prefix``: what the tokenizer puts before every text; ``raw``: bytes stood
    for tokens because the model came without a tokenizer."""

    ids: Tensor
    prefix: tuple[int, ...] = ()
    raw: bool = False


def read_tokens(folder: ModelFolder, path: Path, limit: int) -> Tokens:
    """The first ``limit`` tokens of a file; DataError if there is nothing to read."""
    regular_file(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from None
    if not data.strip():
        raise DataError(f"{path}: no text in it")
    tokenizer = folder.tokenizer()
    if tokenizer is None:
        tokens = _bytes(folder, data, limit)
    else:
        tokens = _tokens(tokenizer, path, data, limit)
    ids = tokens.ids[:limit]
    if len(ids) + len(tokens.prefix) < 2:
        raise DataError(f"{path}: {len(ids)} tokens; at least 2 are needed to predict one")
    if int(ids.max()) >= folder.vocabulary:
        hint = "the tokenizer is not the one of this model"
        raise DataError(describe("token", int(ids.max()), f"0..{folder.vocabulary - 1}", hint))
    return Tokens(ids, tokens.prefix, tokens.raw)


def _bytes(folder: ModelFolder, data: bytes, limit: int) -> Tokens:
    if folder.vocabulary < BYTES:
        raise ConfigError(
            f"{folder.path}: no tokenizer files, and its vocabulary of {folder.vocabulary} "
            f"has no place for {BYTES} bytes"
        )
    return Tokens(torch.tensor(list(data[:limit])), raw=True)


def _tokens(tokenizer: Any, path: Path, data: bytes, limit: int) -> Tokens:
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    size, ids = 0, list[int]()
    # A library is not read for a page; the last word may be cut, so some tokens more are wanted.
    while len(ids) <= limit + SPARE and size < len(text):
        size = max(4 * size, CHARACTERS * limit)
        ids = tokenizer(text[:size], add_special_tokens=False, verbose=False)["input_ids"]
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    before = next((i for i in range(len(whole)) if whole[i : i + len(plain)] == plain), 0)
    return Tokens(torch.tensor(ids, dtype=torch.int64), tuple(whole[:before]))


@dataclass(frozen=True, eq=False)
class Windows:
    """Windows of ``context`` tokens one after the other, each begun by the prefix.

    Without ``whole`` the last one may be shorter; it is then padded at its end and masked.
    """

    tokens: Tokens
    context: int
    whole: bool = False

    @property
    def step(self) -> int:
        """Tokens of the text per window."""
        return self.context - len(self.tokens.prefix)

    def __len__(self) -> int:
        full, rest = divmod(len(self.tokens.ids), self.step)
        # A rest of one token and no prefix has nothing to be predicted from.
        return full + (not self.whole and rest + len(self.tokens.prefix) > 1 and rest > 0)

    def row(self, index: int) -> Tensor:
        """i64 [<= C]."""
        part = self.tokens.ids[index * self.step : (index + 1) * self.step]
        return torch.cat([torch.tensor(self.tokens.prefix, dtype=torch.int64), part])

    def batches(self, size: int) -> Iterator[tuple[range, Tensor, Tensor]]:
        """(indices of the windows, ids i64 [B, C'], mask bool [B, C'])."""
        for first in range(0, len(self), size):
            chosen = range(first, min(first + size, len(self)))
            rows = [self.row(index) for index in chosen]
            ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
            lengths = torch.tensor([len(row) for row in rows])
            yield chosen, ids, torch.arange(ids.shape[1]) < lengths[:, None]
