"""``coterie upcycle``: make experts of a dense model and keep what it computes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from coterie.cli.model_folder import config_of
from coterie.cli.output import OUT, facts, say, say_json
from coterie.cli.overrides import PathsCommand, apply, one_word, split, takes_paths

if TYPE_CHECKING:
    from coterie.convert import Preserved, UpcycleConfig

MODES = {"copy": {"slices": 1}, "slice": {"copies": 1}, "slice+copy": {}}
SAMPLES = 64  # on which the function is compared before and after


@click.command("upcycle", cls=PathsCommand)
@takes_paths("SOURCE [--PATH=VALUE]...")
@click.option("--out", type=OUT, help="Folder to write.  [required]")
@click.option("--mode", type=click.Choice(list(MODES)), help="[slice+copy]")
@click.option("--copies", type=int, help="Copies of each feed-forward network. [4]")
@click.option("--slices", type=int, help="Experts that each copy is cut into. [2]")
@click.option("--copies-used", type=int, help="Copies that answer each token. [1]")
@click.option("--layers", help="Blocks to change: all, odd, even, except_first, or 0,2,5. [all]")
@click.option("--gates", help="How gates start: auto, renorm, straight_through or raw. [auto]")
@click.option("--balance", type=float, help="Weight of the balance loss. [0.01]")
@click.option(
    "--router-scale", type=float, help="Standard deviation of the router's logits at the start. [1]"
)
@click.option(
    "--calibration", type=int, help="Samples by which the router starts balanced; 0 = none. [256]"
)
@click.option(
    "--noise", type=float, help="Noise added to the experts' weights, relative to each tensor. [0]"
)
@click.option("--seed", type=int, help="Seed of the router's start and of the noise. [0]")
@click.option("-n", "--dry-run", is_flag=True, help="Sizes and cost only.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("-q", "--quiet", is_flag=True, help="No progress bar.")
@click.pass_context
def command(
    ctx: click.Context,
    arguments: tuple[str, ...],
    out: Path | None,
    mode: str | None,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
    **fields: Any,
) -> None:
    """Turn the feed-forward networks of SOURCE into experts: copies, slices, or slices of copies.

    The result computes what SOURCE does (to rounding; it is measured) until it is trained on.
    SOURCE is a run directory (the result is one too, at step 0), a model directory of coterie, or
    of Hugging Face. A flag with a dot is a path into the new run's configuration:

    \b
      coterie upcycle runs/dit --copies 4 --slices 2 --out runs/experts --train.steps=300
      coterie train runs/experts
    """
    words, paths = split(arguments)
    source = Path(one_word(words, "SOURCE"))
    if out is None and not dry_run:
        raise click.UsageError("missing --out, the folder to write")
    config = _config(mode, fields)
    kind = kind_of(source)
    if paths and kind != "run":
        raise click.UsageError(f"--{next(iter(paths))}: {source} is no run; only a run takes paths")
    target = None if dry_run else out
    if kind == "run":
        found = _run(ctx, source, config, paths, target)
    elif kind == "model":
        found = _model(source, config, target)
    else:
        found = _hugging_face(source, config, target, quiet)
    shown = {"mode": config.mode, "experts": config.num_experts, "top_k": config.top_k, **found}
    if as_json:
        say_json(shown)
        return
    say(facts(shown))
    if kind == "run" and target is not None:
        say(f"next  coterie train {target}")
        say(f"      coterie sample {target}")


def kind_of(source: Path) -> str:
    """``run``, ``model`` or ``hugging_face``, by what lies in the folder."""
    from coterie.core.errors import ConfigError, describe
    from coterie.core.folder import MANIFEST

    data = config_of(source)
    if "train" in data:
        return "run"
    if "model_type" in data:
        return "hugging_face"
    if (source / MANIFEST).is_file():
        return "model"
    allowed = "a run directory, a model directory, or a Hugging Face model directory"
    raise ConfigError(describe("SOURCE", str(source), allowed))


def _config(mode: str | None, fields: dict[str, Any]) -> UpcycleConfig:
    from coterie.convert import UpcycleConfig
    from coterie.core.errors import ConfigError, describe

    given = {name: value for name, value in fields.items() if value is not None}
    layers = given.get("layers", "")
    if layers[:1].isdecimal():
        given["layers"] = [int(part) if part.isdecimal() else part for part in layers.split(",")]
    fixed = MODES[mode] if mode else {}
    for name, value in fixed.items():
        if given.setdefault(name, value) != value:
            raise ConfigError(describe(name, given[name], f"{value}, for mode {mode}"))
    config = UpcycleConfig.from_dict(given)
    if mode is not None and config.mode != mode:
        raise ConfigError(describe("mode", mode, f"{config.mode}, with these copies and slices"))
    return config


def _run(
    ctx: click.Context,
    source: Path,
    config: UpcycleConfig,
    paths: dict[str, str],
    out: Path | None,
) -> dict[str, Any]:
    from coterie.cli.size import projection, size_of
    from coterie.convert import check_preserved
    from coterie.data import order
    from coterie.runs.build import upcycled_run
    from coterie.runs.config import RunConfig
    from coterie.runs.trained_run import load_run
    from coterie.runs.training import prepare

    before = RunConfig.load(source / "config.json")
    after = apply(ctx, upcycled_run(before, source, config), paths)
    cost = projection if out is None else size_of
    sizes = {"before": _cost(size_of(before)), "after": _cost(cost(after))}
    if out is None:
        return sizes
    new = load_run(prepare(after, out))
    found: dict[str, Any] = {**sizes, "run": str(out)}
    if new.step == 0:
        batch = new.source.get(order(1, 0, SAMPLES, len(new.source)))
        kept = check_preserved(load_run(source).model, new.model, batch, config)
        found |= _kept(kept, config, out)
    return found


def _cost(size: dict[str, Any]) -> dict[str, Any]:
    told = ("parameters", "flops", "training", "steps", "projected", "note")
    return {name: value for name, value in size.items() if name.startswith(told)}


def _model(source: Path, config: UpcycleConfig, out: Path | None) -> dict[str, Any]:
    from coterie.convert import check_preserved, upcycle, upcycled_config
    from coterie.hub import load_manifest, load_pretrained, save_pretrained
    from coterie.runs.origins.first_weights import source_config

    manifest = load_manifest(source)
    dense = source_config(source)
    changed = upcycled_config(dense, config)
    sizes = {"before": _count(dense), "after": _count(changed)}
    if out is None:
        return sizes
    before = load_pretrained(source)
    _, model = upcycle(before, config)
    kept = check_preserved(before, model, _noise(dense.backbone), config)
    origin = {"upcycled_from": str(source), "upcycle": config.model_dump(mode="json")}
    save_pretrained(model, out, changed.model_dump(mode="json"), extra={**manifest.extra, **origin})
    return {**sizes, "model": str(out), **_kept(kept, config, out)}


def _noise(backbone: Any) -> Any:
    """Random inputs for a model that comes without data: noise with labels in turn, or tokens."""
    import torch

    from coterie.core.batch import Batch
    from coterie.core.prediction import Condition
    from coterie.core.rng import generator

    shape, rng, ids = (
        (SAMPLES, *backbone.sample_shape),
        generator(0, "noise"),
        torch.arange(SAMPLES),
    )
    words = getattr(backbone, "vocabulary", None)
    if words is not None:
        return Batch(torch.randint(0, words, shape, generator=rng), Condition(), ids)
    classes = getattr(backbone, "num_classes", 0)
    label = ids % classes if classes else None
    return Batch(torch.randn(shape, generator=rng), Condition(label=label), ids)


def _hugging_face(
    source: Path, config: UpcycleConfig, out: Path | None, quiet: bool
) -> dict[str, Any]:
    from coterie.cli.output import progress_bar
    from coterie.interop.upcycled import plan_directory, upcycle_directory

    sizes = plan_directory(source, config)
    if out is None:
        return sizes
    with progress_bar(sizes["blocks"], "upcycling", quiet) as advance:
        kept = upcycle_directory(source, out, config, progress=advance)
    return {**sizes, "model": str(out), **_kept(kept, config, out)}


def _count(config: Any) -> dict[str, int]:
    import torch

    from coterie.core.cost import count_parameters

    with torch.device("meta"):
        counted = count_parameters(config.build())
    return {"parameters_total": counted.total, "parameters_active": counted.active}


def _kept(kept: Preserved, config: UpcycleConfig, out: Path) -> dict[str, Any]:
    """What the comparison found; CheckpointError if the function should have been kept."""
    from coterie.core.errors import CheckpointError

    if config.exact and not kept.holds:
        raise CheckpointError(
            f"{out}: does not compute what its source does, by {kept.relative_error:.2g}"
        )
    return {
        "max_error": kept.max_error,
        "relative_error": kept.relative_error,
        "function_kept": kept.holds,
        "whole_copies": kept.whole_copies,
        "load_cv": [round(value, 4) for value in kept.load_cv],
    }
