"""``coterie data``: what data sets there are, and getting one."""

from __future__ import annotations

import click

from coterie.cli.output import say, say_json, table


@click.group("data")
def command() -> None:
    """List data sets, or get one into the cache ($COTERIE_CACHE, default ~/.cache/coterie)."""


@command.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def list_sources(as_json: bool) -> None:
    """Every data set: what it holds, its licence, and whether it is here."""
    from coterie.data import SOURCES

    rows = []
    for kind in SOURCES.kinds():
        info = getattr(SOURCES.get(kind), "info", None)
        rows.append(
            {
                "name": kind,
                "here": where(kind),
                "modality": getattr(info, "modality", None),
                "shape": getattr(info, "shape", None),
                "count": getattr(info, "count", None),
                "licence": getattr(info, "licence", None),
            }
        )
    say_json(rows) if as_json else say(table(rows))


@command.command("get")
@click.argument("kinds", nargs=-1, required=True, metavar="NAME...")
@click.option("--refresh", is_flag=True, help="Fetch again what is here already.")
def get(kinds: tuple[str, ...], refresh: bool) -> None:
    """Fetch data sets once; a second call finds them in the cache."""
    from coterie.core.errors import ConfigError, unknown
    from coterie.data import SOURCES
    from coterie.data.fetch import DOWNLOADS, fetch

    known = {*SOURCES.kinds(), *DOWNLOADS}
    for kind in kinds:
        if kind not in known:
            raise ConfigError(unknown("data set", kind, known))
    for kind in kinds:
        if kind not in DOWNLOADS:
            say(f"{kind}: nothing to fetch")
            continue
        folder = fetch(kind, progress=_tell, refresh=refresh)
        say(f"{kind}: {folder}")


def where(kind: str) -> str:
    """Whether a data set needs no fetching, is in the cache, or how much there is to fetch."""
    from coterie.data.cache import problem
    from coterie.data.fetch import DOWNLOADS

    if kind not in DOWNLOADS:
        return "built in"
    download = DOWNLOADS[kind]
    return "in the cache" if problem(download.folder) is None else f"{download.megabytes:.0f} MB"


def _tell(message: str, share: float) -> None:
    click.echo(f"{message} ({share:.0%})", err=True)
