"""``coterie restore``: restore the pictures of a folder with a trained run."""

from __future__ import annotations

import time
from pathlib import Path

import click

from coterie.cli import candidates
from coterie.cli.output import OUT, facts, progress_bar, say, say_json, threads_option


@click.command("restore")
@click.argument("run", type=click.Path(path_type=Path), shell_complete=candidates.runs)
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--out", type=OUT, required=True, help="Folder to write.")
@click.option(
    "--overlap", type=int, help="Pixels that neighbouring tiles share. [a quarter of a tile]"
)
@click.option(
    "--weights",
    type=click.Choice(["ema", "model"]),
    default="ema",
    show_default=True,
    help="Averaged weights, or those of the last step.",
)
@click.option("-n", "--dry-run", is_flag=True, help="Look at the pictures, restore none.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@threads_option("torch's own")
@click.option("-q", "--quiet", is_flag=True, help="No progress bar.")
def command(
    run: Path,
    folder: Path,
    out: Path,
    overlap: int | None,
    weights: str,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Restore the pictures of FOLDER, of any size, with a RUN that was trained to restore.

    The same command again goes on where it stopped.

    \b
      coterie restore runs/mofme holiday --out holiday-restored
    """
    from coterie.runs.sample.restoration import plan_folder, restore_folder
    from coterie.runs.trained_run import load_run

    loaded = load_run(run, which=weights)
    plan = plan_folder(loaded, folder, out, overlap)
    planned = {
        "pictures": len(plan.pictures),
        "squares": plan.squares,
        "side": plan.side,
        "overlap": plan.overlap,
    }
    if dry_run:
        say_json(planned) if as_json else say(facts(planned))
        return
    began = time.perf_counter()
    with progress_bar(plan.squares, "restoring", quiet) as advance:
        written = restore_folder(loaded, plan, out, weights, advance)
    seconds = round(time.perf_counter() - began, 2)
    if as_json:
        say_json({**planned, "seconds": seconds, "out": out, "files": written})
    else:
        say(f"restored  {len(written)} pictures in {seconds:g} s, into {out}")
