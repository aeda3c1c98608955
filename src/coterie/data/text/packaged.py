"""Text: i64 token ids [B, context], one byte per token, topic in ``cond.label`` where there is one.

Documents end with EOS and are packed topic by topic into one stream; a sample is a window of the
stream that does not cross topics. Whole documents are held out, by a hash of their names.
Legend: T tokens, L topics, S samples, B batch, N = context.
"""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field

from coterie.core.batch import Batch
from coterie.core.errors import DataError, describe
from coterie.core.prediction import Condition
from coterie.data.download.fetch import load
from coterie.data.source import (
    SOURCES,
    SourceConfig,
    SourceInfo,
    Split,
    as_rows,
    is_held_out,
)
from coterie.data.text.topics import LEXICOGRAPHER_FILES, STDLIB_TOPICS, stdlib_topic


class ByteTokenizer:
    """UTF-8 bytes as tokens 0..255, then PAD, BOS, EOS and MASK."""

    PAD, BOS, EOS, MASK = 256, 257, 258, 259
    vocab_size = 260

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8"))

    def decode(self, tokens: Iterable[int]) -> str:
        """Special tokens vanish; bytes that are not UTF-8 become U+FFFD."""
        kept = bytes(token for token in map(int, tokens) if 0 <= token < 256)
        return kept.decode("utf-8", errors="replace")


class Document(NamedTuple):
    key: str  # decides the split
    topic: int
    content: bytes


@dataclass(frozen=True, eq=False)
class Corpus:
    """``tokens`` u16 [T]; topic l occupies ``tokens[regions[l] : regions[l + 1]]``."""

    tokens: np.ndarray
    regions: np.ndarray  # i64 [L + 1]


def pack(documents: Iterable[Document], num_topics: int, split: Split) -> Corpus:
    """The documents of ``split``, as :func:`pack_stream` lays them out."""
    wanted = split == "held_out"
    return pack_stream((item for item in documents if is_held_out(item.key) == wanted), num_topics)


def pack_stream(documents: Iterable[Document], num_topics: int) -> Corpus:
    """Lay documents out topic by topic, each ended by EOS."""
    piles: list[list[np.ndarray]] = [[] for _ in range(num_topics)]
    end = np.array([ByteTokenizer.EOS], dtype=np.uint16)
    for document in documents:
        piles[document.topic] += [np.frombuffer(document.content, dtype=np.uint8), end]
    sizes = [sum(map(len, pile)) for pile in piles]
    pieces = [piece.astype(np.uint16) for pile in piles for piece in pile]
    tokens = np.concatenate(pieces) if pieces else np.zeros(0, dtype=np.uint16)
    return Corpus(tokens, np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64))


class TextSource:
    """Windows of ``context`` tokens of a corpus, side by side."""

    tokenizer = ByteTokenizer()
    vocab_size = ByteTokenizer.vocab_size

    def __init__(
        self, name: str, corpus: Corpus, context: int, class_names: Sequence[str], licence: str
    ) -> None:
        self.name, self.modality, self.licence = name, "text", licence
        self.shape: tuple[int, ...] = (context,)
        self.class_names = tuple(class_names)
        self.num_classes = len(self.class_names)
        self._tokens = corpus.tokens
        self.fingerprint = hashlib.sha256(np.ascontiguousarray(corpus.tokens).data).hexdigest()
        counts = np.diff(corpus.regions) // context
        if counts.sum() == 0:
            longest = int(np.diff(corpus.regions).max(initial=0))
            raise DataError(describe(f"{name}: context", context, f"2..{longest}"))
        starts = [begin + context * np.arange(n) for begin, n in zip(corpus.regions, counts)]
        self._starts = np.concatenate(starts)
        self._labels = np.repeat(np.arange(len(counts)), counts)

    def __len__(self) -> int:
        return len(self._starts)

    def get(self, indices: Any) -> Batch:
        rows = as_rows(indices, len(self), self.name)
        where = self._starts[rows][:, None] + np.arange(self.shape[0])
        x = torch.from_numpy(self._tokens[where].astype(np.int64))
        label = torch.from_numpy(self._labels[rows]) if self.num_classes else None
        return Batch(x=x, cond=Condition(label=label), ids=torch.from_numpy(rows))


class TextConfig(SourceConfig):
    """Options of every text source."""

    context: int = Field(default=128, ge=2, le=1_048_576)  # tokens per sample

    def _source(self, corpus: Corpus, topics: Sequence[str] = ()) -> TextSource:
        return TextSource(self.kind, corpus, self.context, topics, self.info.licence)

    def _cached(self, split: Split) -> Corpus:
        return Corpus(*load(self.kind, f"{split}_tokens", f"{split}_regions"))


@SOURCES.register
class StdlibConfig(TextConfig):
    """The sources of the running Python's standard library, tests left out."""

    kind: Literal["stdlib"] = "stdlib"
    info: ClassVar[SourceInfo] = SourceInfo(
        summary=f"Python's standard library as text, {len(STDLIB_TOPICS)} topics",
        modality="text",
        shape="context",
        count="about 10 MB",
        licence="PSF-2.0",
    )

    def build(self, split: Split = "train") -> TextSource:
        corpus = pack(stdlib_documents(), len(STDLIB_TOPICS), split)
        return self._source(corpus, tuple(STDLIB_TOPICS))


def stdlib_documents(root: Path | None = None) -> Iterator[Document]:
    """Every module of the standard library, in the order of its path."""
    root = root or Path(sysconfig.get_paths()["stdlib"])
    skip = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    found = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in skip]
        found += [Path(folder, name) for name in files if name.endswith(".py")]
    if not found:
        raise DataError(f"stdlib: no Python sources under {root}; this Python ships none")
    for path in sorted(found):
        key = path.relative_to(root).as_posix()
        yield Document(key, stdlib_topic(key), path.read_bytes())


@SOURCES.register
class PydocTopicsConfig(TextConfig):
    """The help topics of Python, small and always there."""

    kind: Literal["pydoc-topics"] = "pydoc-topics"
    info: ClassVar[SourceInfo] = SourceInfo(
        summary="Python's own help pages",
        modality="text",
        shape="context",
        count="about 0.5 MB",
        licence="PSF-2.0",
    )

    def build(self, split: Split = "train") -> TextSource:
        return self._source(pydoc_corpus(split))


def pydoc_corpus(split: Split) -> Corpus:
    """One split of Python's help topics, as one region."""
    from pydoc_data.topics import topics

    documents = [Document(key, 0, topics[key].encode()) for key in sorted(topics)]
    return pack(documents, 1, split)


@SOURCES.register
class GcideConfig(TextConfig):
    kind: Literal["gcide"] = "gcide"
    info: ClassVar[SourceInfo] = SourceInfo(
        summary="Collaborative International Dictionary of English (Webster 1913 and additions)",
        modality="text",
        shape="context",
        count="40 MB",
        licence="GPL-2.0-or-later",
    )

    def build(self, split: Split = "train") -> TextSource:
        return self._source(self._cached(split))


@SOURCES.register
class WordnetConfig(TextConfig):
    kind: Literal["wordnet"] = "wordnet"
    info: ClassVar[SourceInfo] = SourceInfo(
        summary="WordNet 3.0 words and glosses, 45 topics",
        modality="text",
        shape="context",
        count="117659 glosses",
        licence="WordNet 3.0 licence (permissive, Princeton University)",
    )

    def build(self, split: Split = "train") -> TextSource:
        return self._source(self._cached(split), LEXICOGRAPHER_FILES)
