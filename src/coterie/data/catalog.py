"""The list of data sources, with sizes and licences."""

from __future__ import annotations

from dataclasses import dataclass

from coterie.data.download.cache import problem
from coterie.data.download.fetch import DOWNLOADS
from coterie.data.source import SOURCES, SourceConfig, SourceInfo


@dataclass(frozen=True)
class SourceStatus:
    """``cached``: ready to use now. ``megabytes``: to download; 0 where nothing is fetched."""

    kind: str
    modality: str
    shape: str
    count: str
    licence: str
    summary: str
    cached: bool
    megabytes: float


def status() -> list[SourceStatus]:
    """Every registered source, by name. Downloads nothing."""
    return [_status(kind) for kind in SOURCES.kinds()]


def describe_source(kind: str) -> str:
    """A few lines of text: what the source is, its size, its licence, where it comes from."""
    row = _status(kind)
    lines = [
        f"{kind}: {row.summary}",
        f"  samples: {row.count}, each {row.shape} ({row.modality})",
        f"  licence: {row.licence}",
    ]
    if kind in DOWNLOADS:
        origin = ", ".join(package.label for package in DOWNLOADS[kind].packages)
        state = "in the cache" if row.cached else f"{row.megabytes:g} MB to download"
        lines.append(f"  from: {origin}; {state}")
    return "\n".join(lines)


def _status(kind: str) -> SourceStatus:
    config = SOURCES.get(kind)
    empty = SourceInfo("", "", "", "", "not stated")
    info = config.info if issubclass(config, SourceConfig) else empty
    download = DOWNLOADS.get(kind)
    return SourceStatus(
        kind=kind,
        modality=info.modality,
        shape=info.shape,
        count=info.count,
        licence=info.licence,
        summary=info.summary,
        cached=download is None or problem(download.folder) is None,
        megabytes=0.0 if download is None else download.megabytes,
    )
