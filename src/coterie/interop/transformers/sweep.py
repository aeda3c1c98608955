"""A Hugging Face MoE model under other routing settings while it reads a text.

    reading = Reading.prepare("models/olmoe", "book.txt", tokens=20_000)
    rows = sweep_model(reading, {"select.k": [2, 4, 8]})

Its layers decide by another rule on the same logits; no weight is changed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from coterie.core.cost import count_parameters
from coterie.core.errors import ConfigError
from coterie.experts.rerouting import changed
from coterie.inspect import Place, Trace, analyse
from coterie.inspect.statistics.sweep import Rule, SweepRow, amounts_of, rows_of, settings_of
from coterie.interop.transformers.losses import LEVELS
from coterie.interop.transformers.report import Reading, Totals
from coterie.interop.transformers.sites import MoESite, find_moe_layers

UNIT = "bits per token"


def rules_of(sites: Sequence[MoESite]) -> list[Rule]:
    return [(site.router_config(), site.num_experts) for site in sites]


def check_model(reading: Reading, paths: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """The settings to evaluate, {} standing for the model's own; ConfigError unless all fit. No
    weight is read."""
    return settings_of(rules_of(reading.folder.sites), paths, causal=reading.blocks is None)


def sweep_model(
    reading: Reading,
    paths: Mapping[str, Sequence[Any]],
    progress: Callable[[int], Any] | None = None,
) -> list[SweepRow]:
    """One row per combination of the values, and one for the model's own setting if it is not among
    them. The loss is in bits per token of the text: the next one, or, where a model restores noised
    text, that of its decoder."""
    points = check_model(reading, paths)
    sites = find_moe_layers(reading.model)
    found = []
    for settings in points:
        found.append((settings, *_evaluate(reading, sites, settings)))
        if progress is not None:
            progress(1)
    return rows_of(rules_of(sites), paths, found)


def _evaluate(
    reading: Reading, sites: Sequence[MoESite], settings: Mapping[str, Any]
) -> tuple[dict[str, Any], float]:
    """The numbers of a row, and the multiply-adds of the expert layers per token."""
    trace, totals = Trace(noise_bins=LEVELS), Totals()
    with ExitStack() as stack:
        for site in sites:
            config = changed(site.router_config(), settings)
            if config != site.router_config():
                stack.enter_context(site.reroute(config))
        for _, answer in reading.answers(trace):
            totals.add(answer)
    loss = totals.bits()
    if loss != loss:
        raise ConfigError(f"{reading.text}: no token is predicted under {dict(settings)}")
    choices = {item.place: item.choices_per_row for item in analyse(trace)}
    used = {site: choices.get(Place(site.slot, site.layer, 0), 0.0) for site in sites}
    shares = {
        site.experts: {
            name: min(1.0, chosen / site.num_experts) for name, _ in site.experts.named_parameters()
        }
        for site, chosen in used.items()
    }
    numbers = {
        "held_out_loss": loss,
        **amounts_of(trace),
        "active_parameters": count_parameters(reading.model, shares).active,
        "by_class": {},
    }
    return numbers, sum(_multiply_adds(site, chosen) for site, chosen in used.items())


def _multiply_adds(site: MoESite, chosen: float) -> float:
    """Of one layer for one token: its router, ``chosen`` experts, and the MLP that is always on."""
    always = [part for part in (site.shared, site.shared_gate) if part is not None]
    total = float(site.router_weight.numel()) + chosen * 3 * site.width * site.hidden
    return total + sum(p.numel() for part in always for p in part.parameters() if p.dim() > 1)
