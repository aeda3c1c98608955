"""``coterie sweep``: a trained run under other routing settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from coterie.cli.output import OUT, progress_bar, say, say_json, table
from coterie.cli.overrides import ANY_FLAG, one_word, split, takes_paths


@click.command("sweep", context_settings=ANY_FLAG)
@takes_paths("RUN --PATH=VALUES...")
@click.option("--limit", type=click.IntRange(1), default=512, show_default=True, help="Samples.")
@click.option("--out", type=OUT, help="Folder. [RUN/sweep]")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("-q", "--quiet", is_flag=True, help="No progress bar.")
def command(
    arguments: tuple[str, ...], limit: int, out: Path | None, as_json: bool, quiet: bool
) -> None:
    """Quality against cost: held-out loss of RUN when its routers choose otherwise, no retraining.

    A flag is a path into the configuration of a router, with values between commas; several flags
    give all combinations. `trained` marks what the model was trained with.

    \b
      coterie sweep runs/dynamic-routing --select.p 0.1,0.2,0.4,0.8
      coterie sweep runs/deepseekmoe --select.k 1,2,4
      coterie sweep runs/deepseekmoe --select top_p --select.p 0.2,0.4
    """
    words, paths = split(arguments)
    run = Path(one_word(words, "RUN"))
    if not paths:
        raise click.UsageError("missing a path with values, for example --select.k 1,2,4")
    from coterie.train.run import load_run
    from coterie.train.sweep import check, sweep, sweep_outputs, values_of, write_sweep

    values = {path: values_of(text) for path, text in paths.items()}
    loaded = load_run(run)
    points = check(loaded, values)
    sweep_outputs(out or run / "sweep", values)
    with progress_bar(len(points), "sweep", quiet) as advance:
        rows = sweep(loaded, values, limit, advance)
    picture = write_sweep(loaded, rows, limit, out or run / "sweep")
    if as_json:
        say_json({"picture": picture, "rows": rows})
        return
    say(table([_line(row) for row in rows]))
    say(f"picture  {picture}")
    say(f"numbers  {picture.with_suffix('.json')}")


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
