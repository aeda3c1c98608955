"""``coterie sweep``: a trained run under other routing settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from coterie.cli.model_folder import given_of, is_model, load, prepare, reads_text
from coterie.cli.output import OUT, progress_bar, say, say_json, table, threads_option
from coterie.cli.overrides import PathsCommand, one_word, split, takes_paths
from coterie.core.errors import ConfigError

if TYPE_CHECKING:
    from coterie.interop.transformers.report import Reading

SAMPLES = 512


@click.command("sweep", cls=PathsCommand)
@takes_paths("RUN --PATH=VALUES...")
@click.option("--limit", type=click.IntRange(1), help="Held-out samples to measure. [512]")
@reads_text()
@click.option("--out", type=OUT, help="Folder. [RUN/sweep]")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@threads_option("torch's own")
@click.option("-q", "--quiet", is_flag=True, help="No progress bar.")
def command(
    arguments: tuple[str, ...],
    limit: int | None,
    out: Path | None,
    as_json: bool,
    quiet: bool,
    **reading: Any,
) -> None:
    """Measure held-out loss and cost of RUN with other settings of its routers. No training.

    RUN is a run directory, or the folder of a Hugging Face MoE model, which reads --text.

    A flag is a path into the configuration of a router, with values between commas; several flags
    give all combinations. `trained` marks what the model was trained with.

    \b
      coterie sweep runs/dynamic-routing --select.p 0.1,0.2,0.4,0.8
      coterie sweep runs/deepseekmoe --select.k 1,2,4
      coterie sweep runs/deepseekmoe --select top_p --select.p 0.2,0.4
      coterie sweep models/olmoe --text book.txt --select.k 2,4,8
    """
    words, paths = split(arguments)
    run = Path(one_word(words, "RUN"))
    if not paths:
        raise click.UsageError("missing a path with values, for example --select.k 1,2,4")
    from coterie.inspect.statistics.sweep import values_of

    values = {path: values_of(text) for path, text in paths.items()}
    given = given_of(reading, run, {"tokens_read": "tokens"})
    if not is_model(run):
        picture, rows = _run(run, values, limit or SAMPLES, out or run / "sweep", quiet)
    elif limit is not None:
        raise ConfigError(f"--limit: only for a run; {run} is a model, which reads --tokens")
    else:
        picture, rows = _model(prepare(run, given), values, out or run / "sweep", quiet)
    if as_json:
        say_json({"picture": picture, "rows": rows})
        return
    say(table([_line(row) for row in rows]))
    say(f"picture  {picture}")
    say(f"numbers  {picture.with_suffix('.json')}")


def _run(
    run: Path, values: Mapping[str, Any], limit: int, out: Path, quiet: bool
) -> tuple[Path, Sequence[Any]]:
    from coterie.runs.measure.sweep import check, sweep, sweep_outputs, write_sweep
    from coterie.runs.trained_run import load_run

    loaded = load_run(run)
    points = check(loaded, values)
    sweep_outputs(out, values)
    with progress_bar(len(points), "sweep", quiet) as advance:
        rows = sweep(loaded, values, limit, advance)
    return write_sweep(loaded, rows, limit, out), rows


def _model(
    reading: Reading, values: Mapping[str, Any], out: Path, quiet: bool
) -> tuple[Path, Sequence[Any]]:
    from coterie.inspect.page.sweep_table import sweep_outputs, write_rows
    from coterie.interop.transformers.sweep import UNIT, check_model, sweep_model

    points = check_model(reading, values)
    sweep_outputs(out, values)
    load(reading, quiet)
    with progress_bar(len(points), "sweep", quiet) as advance:
        rows = sweep_model(reading, values, advance)
    about = {"run": str(reading.folder.path), **reading.sizes()}
    return write_rows(rows, about, UNIT, out), rows


def _line(row: Any) -> dict[str, Any]:
    losses = {f"loss {name}": loss for name, loss in row.by_class.items()}
    return {
        **row.settings,
        "held-out loss": row.held_out_loss,
        **(losses if len(losses) <= 4 else {}),
        "experts per row": row.experts_per_row,
        "most": row.experts_per_row_max,
        "active parameters": row.active_parameters,
        "multiply-adds": row.relative_multiply_adds,
        "": "trained" if row.trained else "",
    }
