"""``coterie island``: experts trained apart, on their own part of the data, and made one system."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from coterie.cli import candidates
from coterie.cli.output import OUT, facts, progress_bar, say, say_json, table
from coterie.cli.overrides import PathsCommand, one_word, recipe_and_config, split, takes_paths

PLAN = click.argument("plan", type=click.Path(path_type=Path), metavar="PLAN")
JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
QUIET = click.option("-q", "--quiet", is_flag=True, help="No progress bar.")
ENGINES = ("slurm", "skypilot")


@click.group("island", context_settings={"help_option_names": ["-h", "--help"]})
def command() -> None:
    """Train denoisers apart, each on its part of the data (an island), and join them.

    \b
      coterie island plan ddm --islands 4 --out runs/islands
      coterie island run runs/islands            (or each on its own machine: --index 0 ...)
      coterie island router runs/islands
      coterie island assemble runs/islands --out runs/together
      coterie sample runs/together
    """


@command.command("plan", cls=PathsCommand)
@takes_paths("RECIPE [--PATH=VALUE]...")
@click.option(
    "--preset",
    default="tiny",
    show_default=True,
    shell_complete=candidates.presets,
    help="Sizes: tiny, paper, gpu, ...",
)
@click.option(
    "--islands", type=int, default=4, show_default=True, help="Number of parts of the data."
)
@click.option(
    "--by",
    type=click.Choice(["features", "labels", "random"]),
    default="features",
    show_default=True,
    help="How data are cut: clusters of features, whole classes, at random.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the cut.")
@click.option(
    "--budget",
    type=click.Choice(["batch", "steps", "each"]),
    default="batch",
    show_default=True,
    help="What the islands share, so that together they see one model's samples.",
)
@click.option(
    "--for",
    "unequal",
    multiple=True,
    metavar="I:PATH=VALUE",
    help="A path into the configuration of island I alone; may be repeated.",
)
@click.option("--export", is_flag=True, help="Write each island's samples into its own folder.")
@click.option(
    "--emit", type=click.Choice(ENGINES), multiple=True, help="Write job files for a cluster."
)
@click.option("--out", type=OUT, help="Folder. [runs/RECIPE-islands]")
@click.option("-n", "--dry-run", is_flag=True, help="Sizes and projected minutes only.")
@JSON
@click.pass_context
def plan_command(
    ctx: click.Context,
    arguments: tuple[str, ...],
    preset: str,
    islands: int,
    by: str,
    seed: int,
    budget: Any,
    unequal: Sequence[str],
    export: bool,
    emit: Sequence[str],
    out: Path | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Cut the data of RECIPE into parts (islands); write a run directory for each."""
    recipe, base = recipe_and_config(ctx, arguments, preset)
    from coterie.runs.islands import PartitionConfig
    from coterie.runs.islands.plan import make_plan, preview
    from coterie.runs.islands.workers import job_files

    wanted = {"islands": islands, "by": by, "seed": seed}
    partition = PartitionConfig.from_dict(wanted)
    if dry_run:
        planned = preview(base, partition, budget)
        say_json(planned) if as_json else say(facts(planned))
        return
    folder = out or Path("runs") / f"{recipe.name}-islands"
    made = make_plan(base, partition, folder, budget, _unequal(unequal), export)
    files = job_files(folder, emit)
    if as_json:
        say_json({"plan": folder, "cut": made.cut, "islands": _plain(made), "jobs": files})
        return
    say(table(_plain(made)))
    for path in files:
        say(f"wrote {path}")
    say(f"next  coterie island run {folder}")


@command.command("run")
@PLAN
@click.option("--index", type=int, help="One island. [all]")
@click.option(
    "--jobs", type=int, default=1, show_default=True, help="Islands to train at the same time."
)
@JSON
@QUIET
def run_command(plan: Path, index: int | None, jobs: int, as_json: bool, quiet: bool) -> None:
    """Train one island, or all that are left. The same command again resumes."""
    from coterie.runs.islands.plan import read_plan
    from coterie.runs.islands.workers import run_all, run_island, status

    if index is not None:
        run_island(plan, index, progress=not quiet)
    else:
        with progress_bar(len(read_plan(plan).islands), "islands", quiet) as advance:
            run_all(plan, jobs, lambda _name, _done, _all: advance(1))
    say_json(status(plan)) if as_json else say(table(status(plan)))


@command.command("status")
@PLAN
@JSON
def status_command(plan: Path, as_json: bool) -> None:
    """Print how far the training of each island is."""
    from coterie.runs.islands.workers import status

    rows = status(plan)
    say_json(rows) if as_json else say(table(rows))


@command.command("router", cls=PathsCommand)
@takes_paths("PLAN [--PATH=VALUE]...")
@QUIET
@click.pass_context
def router_command(ctx: click.Context, arguments: tuple[str, ...], quiet: bool) -> None:
    """Train the router, which tells the island of a noisy sample. The same command resumes.

    A flag with a dot is a path into its configuration, for example --train.steps=500.
    """
    plan, paths = _plan_and_paths(arguments)
    from coterie.runs.islands.assembly import train_router

    run = train_router(plan, paths, progress=not quiet)
    say(f"router  {run}")
    say(f"next    coterie island assemble {plan} --out {plan}/together")


@command.command("assemble", cls=PathsCommand)
@takes_paths("PLAN [--PATH=VALUE]...")
@click.option("--out", type=OUT, required=True, help="Run to write.")
@click.option(
    "--choice",
    type=click.Choice(["full", "top-1", "top-k", "nucleus", "sampled"]),
    default="top-1",
    show_default=True,
    help="Islands asked for each sample: all, the most probable one, ...",
)
@click.option("-k", type=int, default=2, show_default=True, help="Islands asked, for top-k.")
@click.option(
    "-p",
    type=float,
    default=0.9,
    show_default=True,
    help="Probability that the asked islands cover, for nucleus.",
)
@click.option("--partial", is_flag=True, help="Go without islands that are missing.")
@click.pass_context
def assemble_command(
    ctx: click.Context,
    arguments: tuple[str, ...],
    out: Path,
    choice: str,
    k: int,
    p: float,
    partial: bool,
) -> None:
    """Join the islands: a run that can be sampled and reported like any other."""
    plan, paths = _plan_and_paths(arguments)
    from coterie.runs.islands.assembly import assemble

    parts: dict[str, dict[str, Any]] = {
        "full": {"kind": "dense"},
        "top-1": {"kind": "top_k", "k": 1},
        "top-k": {"kind": "top_k", "k": k},
        "nucleus": {"kind": "top_p", "p": p},
        "sampled": {"kind": "sampled"},
    }
    run = assemble(plan, out, parts[choice], paths, partial)
    say(f"run     {run}")
    say(f"next    coterie sample {run}")
    say(f"        coterie report {run}")


@command.command("distil", cls=PathsCommand)
@takes_paths("PLAN [--PATH=VALUE]...")
@click.option("--out", type=OUT, required=True, help="Run to write.")
@QUIET
@click.pass_context
def distil_command(ctx: click.Context, arguments: tuple[str, ...], out: Path, quiet: bool) -> None:
    """Train one dense model to predict what the islands do. The same command resumes."""
    plan, paths = _plan_and_paths(arguments)
    from coterie.runs.islands.assembly import distil

    run = distil(plan, out, paths, progress=not quiet)
    say(f"run     {run}")
    say(f"next    coterie sample {run}")


def _plan_and_paths(arguments: Sequence[str]) -> tuple[Path, dict[str, str]]:
    words, paths = split(arguments)
    return Path(one_word(words, "PLAN")), paths


def _unequal(given: Sequence[str]) -> dict[int, dict[str, str]]:
    """``2:train.steps=800`` -> {2: {"train.steps": "800"}}."""
    out: dict[int, dict[str, str]] = {}
    for text in given:
        index, colon, assignment = text.partition(":")
        path, equals, value = assignment.partition("=")
        if not (colon and equals and index.isdecimal()):
            raise click.UsageError(f"--for {text}: expected ISLAND:PATH=VALUE")
        out.setdefault(int(index), {})[path] = value
    return out


def _plain(made: Any) -> list[dict[str, Any]]:
    total = sum(entry.samples for entry in made.islands)
    return [
        {
            "island": entry.index,
            "samples": entry.samples,
            "share": entry.samples / total,
            "folder": entry.folder,
        }
        for entry in made.islands
    ]
