"""Emoji of two vendors: the same concepts drawn in two styles, with captions and categories.

The class is the category, the task is the vendor. All drawings of one concept (both vendors, every
skin tone) fall into the same split.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from coterie.core.errors import DataError
from coterie.core.json_reader import parse_json, read_json
from coterie.data.download.cache import save_array
from coterie.data.download.clients import Package, members
from coterie.data.download.fetch import Download, Files, fetch, load, register_download
from coterie.data.images.packaged import ImageConfig
from coterie.data.images.pictures import read_picture
from coterie.data.source import SOURCES, ArraySource, SourceInfo, Split, is_held_out

Vendor = Literal["google", "twitter"]
VENDORS: tuple[Vendor, ...] = ("google", "twitter")
CATEGORIES = (
    *("Activities", "Animals & Nature", "Component", "Flags", "Food & Drink", "Objects"),
    *("People & Body", "Smileys & Emotion", "Symbols", "Travel & Places"),
)
TONES = {
    "1F3FB": "light",
    "1F3FC": "medium-light",
    "1F3FD": "medium",
    "1F3FE": "medium-dark",
    "1F3FF": "dark",
}


@SOURCES.register
class EmojiConfig(ImageConfig):
    kind: Literal["emoji"] = "emoji"
    vendors: Annotated[tuple[Vendor, ...], Field(min_length=1)] = VENDORS
    """the styles that are used"""
    skin_tones: bool = True  # also the variants of people and hands
    native: ClassVar[tuple[int, int]] = (3, 64)
    background: ClassVar[float] = 1.0
    info: ClassVar[SourceInfo] = SourceInfo(
        summary="emoji of two vendors with captions; class = category, task = vendor",
        modality="image",
        shape="3x64x64",
        count="6630 + 942",
        licence="MIT (package); Noto Emoji, Apache-2.0; Twemoji, CC BY 4.0 (name its authors)",
    )

    def build(self, split: Split = "train") -> ArraySource:
        """``captions`` holds one caption per sample, in lower case."""
        names = ("images", "labels", "vendors", "held_out", "toned")
        images, labels, vendors, held_out, toned = load(self.kind, *names)
        wanted = np.isin(vendors, [VENDORS.index(vendor) for vendor in self.vendors])
        wanted &= held_out == (split == "held_out")
        if not self.skin_tones:
            wanted &= ~toned
        rows = np.flatnonzero(wanted)
        captions = read_json(fetch(self.kind) / "captions.json")
        return ArraySource(
            self.kind,
            "image",
            images,
            shape=self.shape(),
            licence=self.info.licence,
            rows=rows,
            labels=labels[rows],
            class_names=CATEGORIES,
            tasks=vendors[rows],
            task_names=VENDORS,
            captions=[captions[row] for row in rows],
            transform=self.transform,
        )


def _entries(table: list[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], str, str]]:
    """(concept, picture's file name, caption) of every emoji and of its skin tones."""
    for concept in table:
        caption = concept["name"].lower()
        yield concept, concept["image"], caption
        for code, variant in concept.get("skin_variations", {}).items():
            tones = " and ".join(TONES[part] for part in code.split("-"))
            yield concept, variant["image"], f"{caption}, {tones} skin tone"


def _convert(files: Sequence[Files], folder: Path) -> None:
    table = parse_json(files[0]["package/emoji.json"], "emoji.json", DataError)
    columns: dict[str, list[Any]] = {
        name: [] for name in ("images", "labels", "vendors", "held_out", "toned")
    }
    captions: list[str] = []
    for vendor, style in enumerate(VENDORS):
        for concept, image, caption in _entries(table):
            content = files[vendor].get(f"package/img/{style}/64/{image}")
            if content is None:  # not every vendor draws every emoji
                continue
            columns["images"].append(read_picture(content, name=image))
            columns["labels"].append(CATEGORIES.index(concept["category"]))
            columns["vendors"].append(vendor)
            columns["held_out"].append(is_held_out(f"emoji/{concept['unified']}"))
            columns["toned"].append(image != concept["image"])
            captions.append(caption)
    for name, values in columns.items():
        save_array(folder, name, np.array(values))
    (folder / "captions.json").write_text(json.dumps(captions), encoding="utf-8")


register_download(
    Download(
        "emoji",
        (
            Package(
                "npm",
                "emoji-datasource-google",
                "16.0.0",
                members(
                    """
                    1d602e65be88772bf8cc368ce16b855d719eeddbafe128d471b80203f494d29f 1313457
                    package/emoji.json
                    9e93d594c48ed806efc5b19324b1f7f29ecc4ea8f1a738a844364665f9256d2b 13668204
                    package/img/google/64/*.png
                    """
                ),
                megabytes=74.3,
            ),
            Package(
                "npm",
                "emoji-datasource-twitter",
                "16.0.0",
                members(
                    """
                    4cfab24112260c5907489c0fb449129a73033addb238edecd1f54cd16f7e4720 10409368
                    package/img/twitter/64/*.png
                    """
                ),
                megabytes=61.7,
            ),
        ),
        _convert,
    )
)
