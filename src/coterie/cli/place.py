"""``coterie place``: experts of a run on many devices, from its routing loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from coterie.cli import candidates
from coterie.cli.model_folder import given_of, is_model, load, prepare, reads_text
from coterie.cli.output import OUT, progress_bar, say, say_json, table, threads_option
from coterie.core.json_reader import read_object

SHOWN = ("devices", "strategy", "step_ms", "ideal_ms", "efficiency", "experts_per_device")


class Counts(click.ParamType[tuple[int, ...]]):
    """Numbers of devices between commas, such as ``8,64,1024``."""

    name = "counts"

    def convert(self, value: Any, param: Any, ctx: click.Context | None) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        pieces = str(value).split(",")
        if not all(piece.isdecimal() and int(piece) > 0 for piece in pieces):
            self.fail(f"{value!r} is no list of numbers above 0; for example 8,64,1024")
        return tuple(int(piece) for piece in pieces)


@click.command("place")
@click.argument("run", type=click.Path(path_type=Path), shell_complete=candidates.runs)
@click.option(
    "--devices",
    type=Counts(),
    default="8,64,256,1024",
    show_default=True,
    help="Numbers of devices to plan for.",
)
@click.option(
    "--tokens",
    type=click.IntRange(1),
    default=4096,
    show_default=True,
    help="Tokens per device in a step.",
)
@click.option(
    "--spare",
    type=click.IntRange(0),
    default=1,
    show_default=True,
    help="Copies of busy experts that a device may hold in addition.",
)
@reads_text("--read")
@click.option("--out", type=OUT, help="Folder. [RUN/placement]")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@threads_option("torch's own")
@click.option("-q", "--quiet", is_flag=True, help="No progress bar.")
def command(
    run: Path,
    devices: tuple[int, ...],
    tokens: int,
    spare: int,
    out: Path | None,
    as_json: bool,
    quiet: bool,
    **reading: Any,
) -> None:
    """Plan which device holds which experts of RUN, from their loads on held-out data.

    Then simulate a step: it lasts as long as the busiest device.

    RUN is a run directory, or the folder of a Hugging Face MoE model, which reads --text.

    The cost of a row is measured here, on one device; no communication is counted.

    \b
      coterie place runs/dit-moe --devices 8,64,1024
      coterie place models/olmoe --text book.txt --read 20000
    """
    given = given_of(reading, run, {"tokens_read": "read"})
    if is_model(run):
        from coterie.interop.transformers.device_placement import place_model

        asked = prepare(run, given)
        load(asked, quiet)
        with progress_bar(len(asked.windows), "windows", quiet) as advance:
            written = place_model(asked, devices, tokens, spare, out, advance)
    else:
        from coterie.runs.measure.device_placement import place_run

        written = place_run(run, devices, tokens, spare, out)
    found = read_object(written)
    if as_json:
        say_json(found)
        return
    say(table(found["rows"], SHOWN))
    say(f"numbers  {written}")
    say(f"picture  {written.with_suffix('.png')}")
