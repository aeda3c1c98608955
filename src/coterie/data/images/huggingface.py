"""Data sets of the Hugging Face hub, or in its formats on disk (library ``datasets``)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from coterie.core.batch import Source
from coterie.core.errors import DataError, unknown
from coterie.data.images.packaged import ImageConfig
from coterie.data.images.pictures import Pictures
from coterie.data.source import SOURCES, ArraySource, SourceConfig, SourceInfo, Split, split_rows
from coterie.data.text.packaged import Document, TextSource, pack_stream


@SOURCES.register
class HuggingFaceConfig(SourceConfig):
    """``column`` holds pictures or texts. Without ``held_out_split`` a fifth of ``train_split`` is
    held out, chosen by the data set's name."""

    kind: Literal["huggingface"] = "huggingface"
    path: str = Field(min_length=1)  # name on the hub, or a format such as "imagefolder"
    subset: str | None = None  # configuration of the data set; null: its default
    data_dir: str | None = None  # folder of the files, for formats on disk
    modality: Literal["image", "text"] = "image"  # what ``column`` holds
    column: str = "image"  # name of the column with pictures or texts
    label_column: str | None = None  # name of the column with classes; null: none
    train_split: str = "train"  # name of the training split
    held_out_split: str | None = None  # name of the held-out split; null: a fifth of train_split
    size: int = Field(default=64, ge=1, le=4096)  # of pictures
    channels: Literal[1, 3] = 3  # of pictures: grey or colour
    context: int = Field(default=128, ge=2, le=1_048_576)  # tokens per text sample
    info: ClassVar[SourceInfo] = SourceInfo(
        summary="pictures or texts through the datasets library",
        modality="image or text",
        shape="CxHxW or context",
        count="any",
        licence="see the data set's card",
    )

    def build(self, split: Split = "train") -> Source:
        table = self._load(split)
        if self.held_out_split is None:
            table = table.select(split_rows(self.path, len(table), split))
        for column in (self.column, self.label_column):
            if column is not None and column not in table.column_names:
                raise DataError(unknown(f"{self._title()}: column", column, table.column_names))
        names, labels = self._labels(table)
        if self.modality == "text":
            return self._texts(table, names, labels)
        return self._pictures(table, names, labels)

    def _title(self) -> str:
        return f"huggingface {self.path}"

    def _load(self, split: Split) -> Any:
        try:
            import datasets
        except ImportError:
            raise DataError(
                f"{self._title()}: needs the datasets library; pip install 'coterie[hf]'"
            ) from None
        name = self.train_split if split == "train" else self.held_out_split or self.train_split
        try:
            return datasets.load_dataset(self.path, self.subset, data_dir=self.data_dir, split=name)
        except Exception as error:  # the library raises many kinds, some of its dependencies'
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise DataError(f"{self._title()}: split {name!r}: {reason[0]}") from error

    def _labels(self, table: Any) -> tuple[Sequence[str], np.ndarray | None]:
        """Class names and i64 class ids. Values that are not class ids are numbered in order."""
        if self.label_column is None:
            return (), None
        values = table[self.label_column]
        names = getattr(table.features[self.label_column], "names", None)
        if names is not None:
            return names, np.asarray(values)
        known, ids = np.unique(np.asarray(values).astype(str), return_inverse=True)
        return known.tolist(), ids.astype(np.int64)

    def _pictures(self, table: Any, names: Sequence[str], labels: np.ndarray | None) -> ArraySource:
        title = self._title()
        table = _undecoded(table, self.column)
        return ArraySource(
            title,
            "image",
            Pictures(
                len(table),
                lambda row: _content(table[row][self.column]),
                lambda row: f"{title}: row {row}",
                self.channels,
                self.size,
            ),
            shape=(self.channels, self.size, self.size),
            licence=self.info.licence,
            labels=labels,
            class_names=names,
            transform=ImageConfig.scale,
        )

    def _texts(self, table: Any, names: Sequence[str], labels: np.ndarray | None) -> TextSource:
        topics = np.zeros(len(table), dtype=np.int64) if labels is None else labels
        documents = []
        for row, (topic, text) in enumerate(zip(topics, table[self.column])):
            if not isinstance(text, str):
                raise DataError(f"{self._title()}: row {row}: holds {text!r}, not text")
            documents.append(Document(str(row), int(topic), text.encode()))
        corpus = pack_stream(documents, max(1, len(names)))
        return TextSource(self._title(), corpus, self.context, names, self.info.licence)


def _undecoded(table: Any, column: str) -> Any:
    """The pictures of ``column`` as they are stored, so that our reader opens them: the library
    would let any decoder of Pillow at them."""
    feature = table.features.get(column) if hasattr(table.features, "get") else None
    if not getattr(feature, "decode", False):
        return table
    stored: Any = type(feature)
    return table.cast_column(column, stored(decode=False))


def _content(cell: Any) -> Any:
    """Bytes or path of a stored picture; anything else as it is."""
    if isinstance(cell, dict) and cell.get("bytes") is not None:
        return cell["bytes"]
    if isinstance(cell, dict) and isinstance(cell.get("path"), str):
        return Path(cell["path"])
    return cell
