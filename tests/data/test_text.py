"""Tokens, windows, topics and the converters of the packaged texts."""

import gzip

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coterie.core.errors import DataError
from coterie.data import ByteTokenizer, build_source
from coterie.data.download.cache import open_array
from coterie.data.download.fetch import DOWNLOADS
from coterie.data.text.packaged import (
    Corpus,
    Document,
    TextSource,
    pack,
    pack_stream,
    stdlib_documents,
)
from coterie.data.text.topics import LEXICOGRAPHER_FILES, STDLIB_TOPICS, stdlib_topic

EOS = ByteTokenizer.EOS


@given(st.text())
def test_tokenizer_round_trip(text):
    tokenizer = ByteTokenizer()
    tokens = tokenizer.encode(text)
    assert all(0 <= token < 256 for token in tokens)
    assert tokenizer.decode([tokenizer.BOS, *tokens, tokenizer.EOS, tokenizer.PAD]) == text


def test_half_a_character_decodes_to_the_replacement():
    assert ByteTokenizer().decode("é".encode()[:1]) == "\ufffd"


def test_windows_stay_within_a_topic_and_drop_the_tail():
    documents = [
        Document("b", 1, b"bbbbb"),
        Document("a", 0, b"aaa"),
        Document("c", 1, b"cc"),
    ]
    corpus = pack_stream(documents, 3)
    assert corpus.regions.tolist() == [0, 4, 13, 13]
    assert corpus.tokens.tolist() == [*b"aaa", EOS, *b"bbbbb", EOS, *b"cc", EOS]
    source = TextSource("mine", corpus, 3, ("x", "y", "z"), "-")
    batch = source.get(np.arange(len(source)))
    assert batch.x.tolist() == [[*b"aaa"], [*b"bbb"], [*b"bb", EOS], [*b"cc", EOS]]
    assert batch.cond.label.tolist() == [0, 1, 1, 1]


def test_each_document_is_in_exactly_one_split():
    documents = [Document(f"d{i}", 0, bytes([i])) for i in range(200)]
    parts = [pack(documents, 1, split).tokens for split in ("train", "held_out")]
    seen = [set(part[part != EOS].tolist()) for part in parts]
    assert not seen[0] & seen[1] and seen[0] | seen[1] == set(range(200)) and seen[1]


def test_context_longer_than_the_text_is_refused():
    corpus = Corpus(np.zeros(10, np.uint16), np.array([0, 4, 10]))
    with pytest.raises(DataError, match=r"mine: context: 7 .* allowed: 2\.\.6"):
        TextSource("mine", corpus, 7, ("a", "b"), "-")


def test_help_pages_read_as_help_pages():
    source = build_source({"kind": "pydoc-topics", "context": 2000})
    text = "".join(source.tokenizer.decode(row) for row in source.get(range(5)).x)
    assert 'expression "' in text or "statement" in text


def test_stdlib_topics(tmp_path):
    assert stdlib_topic("email/header.py") == list(STDLIB_TOPICS).index("mail")
    assert stdlib_topic("threading.py") == list(STDLIB_TOPICS).index("concurrency")
    assert stdlib_topic("this.py") == 0
    for name in ("email/a.py", "email/test/b.py", "site-packages/c.py", "this.py", "notes.txt"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
    assert [item.key for item in stdlib_documents(tmp_path)] == ["email/a.py", "this.py"]
    with pytest.raises(DataError, match="no Python sources"):
        list(stdlib_documents(tmp_path / "email" / "none"))


def test_every_stdlib_topic_has_text():
    source = build_source("stdlib")
    labels = source.get(np.arange(0, len(source), 7)).cond.label
    assert set(labels.tolist()) == set(range(len(STDLIB_TOPICS)))


def test_wordnet_converter(tmp_path):
    lines = [
        "  1 This notice is skipped | even with a bar",
        '00001740 29 v 02 breathe 0 take_a_breath 0 001 * 00005041 | draw air; "he inhales"  ',
        "00002325 05 n 01 dog 1 000 | a | domestic animal",
    ]
    DOWNLOADS["wordnet"].convert([{"data.verb": "\n".join(lines).encode()}], tmp_path)
    text = "".join(
        ByteTokenizer().decode(open_array(tmp_path, f"{split}_tokens")) + "|"
        for split in ("train", "held_out")
    )
    assert 'breathe, take a breath: draw air; "he inhales"' in text
    assert "dog: a | domestic animal" in text and "notice" not in text
    regions = sum(np.diff(open_array(tmp_path, f"{s}_regions")) for s in ("train", "held_out"))
    assert LEXICOGRAPHER_FILES[29] == "verb.body" and LEXICOGRAPHER_FILES[5] == "noun.animal"
    assert np.flatnonzero(regions).tolist() == [5, 29] and len(regions) == 45


def test_gcide_converter_cuts_between_entries(tmp_path):
    text = b"".join(b"Word %06d\n   meaning of it\n\n" % i for i in range(20_000))
    DOWNLOADS["gcide"].convert([{"gcide.dict.dz": gzip.compress(text, 1)}], tmp_path)
    parts = [open_array(tmp_path, f"{split}_tokens") for split in ("train", "held_out")]
    assert sum(int((part != EOS).sum()) for part in parts) == len(text)
    for part in parts:
        ends = np.flatnonzero(part == EOS)
        assert len(ends) > 0
        for start in [0, *(ends[:-1] + 1)]:
            assert bytes(part[start : start + 5].astype(np.uint8)) == b"Word "
