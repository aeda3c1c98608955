"""``coterie adapter``: adapters that were trained apart are checked, added up and exported."""

from __future__ import annotations

from pathlib import Path

import click

from coterie.cli import candidates
from coterie.cli.output import OUT, facts, say, say_json, table

RUN = click.Path(file_okay=False, exists=True, path_type=Path)


@click.group("adapter")
def command() -> None:
    """Small additions to a frozen model, each trained in a run of its own.

    \b
    coterie train orthogonal-adaptation --init.path=runs/base --out runs/six
    coterie adapter check runs/six runs/seven
    coterie adapter merge runs/six runs/seven --out runs/both
    coterie sample runs/both --labels 6,7
    """


@command.command("merge")
@click.argument(
    "runs", nargs=-1, required=True, type=RUN, metavar="RUN...", shell_complete=candidates.runs
)
@click.option("--out", required=True, type=OUT, help="The new run.")
@click.option(
    "--weight", multiple=True, type=float, help="Weight of each RUN's adapters, in order. [1]"
)
@click.option("--dry-run", "-n", is_flag=True, help="Print the configuration, write nothing.")
def merge(runs: tuple[Path, ...], out: Path, weight: tuple[float, ...], dry_run: bool) -> None:
    """Join the adapters of RUNs, which add up, in one run. Nothing is trained or copied."""
    from coterie.runs.origins.adapter_sum import merged_run
    from coterie.runs.training import start

    config = merged_run(runs, weight)
    say(config.to_json() if dry_run else str(start(config, out, progress=False)))


@command.command("check")
@click.argument(
    "runs", nargs=-1, required=True, type=RUN, metavar="RUN...", shell_complete=candidates.runs
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def check(runs: tuple[Path, ...], as_json: bool) -> None:
    """Check whether adapters of RUNs go together: bases, free slots, overlap, crosstalk."""
    from coterie.runs.origins.adapter_sum import check_together

    found = check_together(runs)
    if as_json:
        say_json(found)
        return
    say(table(found["adapters"]))
    if found["pairs"]:
        say("\n" + table(found["pairs"]))
    if found["measures"]:
        say("\n" + facts(found["measures"]))


@command.command("export")
@click.argument("run", type=RUN, shell_complete=candidates.runs)
@click.option("--out", required=True, type=OUT, help="A new folder.")
@click.option("--name", help="Which adapter, where RUN has several.")
def export(run: Path, out: Path, name: str | None) -> None:
    """Write an adapter of RUN as a folder that the PEFT library reads."""
    from coterie.runs.origins.adapter_sum import export_adapter

    say(str(export_adapter(run, out, name)))
