"""``coterie data``: what data sets there are, and getting one."""

from __future__ import annotations

import click

from coterie.cli import candidates
from coterie.cli.output import note, say, say_json, table


@click.group("data")
def command() -> None:
    """List data sets, or get one into the cache ($COTERIE_CACHE, default ~/.cache/coterie)."""


@command.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def list_sources(as_json: bool) -> None:
    """Every data set: what it holds, its licence, and whether it is here."""
    from coterie.data import status

    found = status()
    if as_json:
        say_json(found)
        return
    rows = [
        {
            "name": row.kind,
            "here": "yes" if row.cached else f"{row.megabytes:g} MB",
            "modality": row.modality,
            "shape": row.shape,
            "count": row.count,
            "licence": row.licence,
        }
        for row in found
    ]
    say(table(rows))


@command.command("get")
@click.argument(
    "kinds", nargs=-1, required=True, metavar="NAME...", shell_complete=candidates.sources
)
@click.option("--refresh", is_flag=True, help="Fetch again what is here already.")
def get(kinds: tuple[str, ...], refresh: bool) -> None:
    """Fetch data sets once, and say their licence; a second call finds them in the cache.

    Also `efficientnet-lite0`, the weights behind distances between colour images.
    """
    import coterie.encoders.lite0  # noqa: F401 (registers its download)
    from coterie.core.errors import ConfigError, unknown
    from coterie.data import SOURCES, describe_source
    from coterie.data.download.fetch import DOWNLOADS, fetch

    known = {*SOURCES.kinds(), *DOWNLOADS}
    for kind in kinds:
        if kind not in known:
            raise ConfigError(unknown("data set", kind, known))
    for kind in kinds:
        folder = fetch(kind, progress=_tell, refresh=refresh) if kind in DOWNLOADS else None
        say(describe_source(kind) if kind in SOURCES.kinds() else kind)
        say(f"  {folder}" if folder else "  nothing to fetch")


def _tell(message: str, share: float) -> None:
    note(f"{message} ({share:.0%})")
