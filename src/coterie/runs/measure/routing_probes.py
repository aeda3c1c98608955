"""Effects of changed routing on a trained model, without training.

``disabled_cost``: each token loses its best experts (DeepSeekMoE, section 4.5: how redundant are
they?). ``separation``: how far apart are the inputs of different experts (ProMoE)?
``expert_cosines``: do different experts answer the same thing (RMoE)?
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from coterie.core.rng import generator
from coterie.core.routing import Routing
from coterie.data import order
from coterie.experts import ExpertLayer, RouterConfig
from coterie.experts.dispatch.expert_weights import experts_of
from coterie.experts.rerouting import rerouted, token_routers
from coterie.inspect import Place, off_diagonal_mean
from coterie.runs.build import build_source
from coterie.runs.judges import judge_of
from coterie.runs.trained_run import LoadedRun

DISABLED_SHARE = 1 / 8  # of all routed experts, the best of each token
ALIKE_TOKENS = 256  # tokens on which the answers of experts are compared
ALIKE_EXPERTS = 64  # experts of a layer that are compared


@dataclass(frozen=True, eq=False)
class Seen:
    """One call of an expert layer: what it read, [B, N, D], and how it routed that."""

    layer: ExpertLayer
    h: Tensor
    mask: Tensor | None  # bool [B, N], False = padding
    routings: tuple[Routing, ...]


@contextmanager
def observed(model: nn.Module) -> Iterator[list[Seen]]:
    """Inside the block every call of an expert layer is noted, in order."""
    seen: list[Seen] = []

    def note(layer: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        assert isinstance(layer, ExpertLayer)
        seen.append(Seen(layer, inputs[0], inputs[1].token_mask, output.routings))

    layers = [module for module in model.modules() if isinstance(module, ExpertLayer)]
    handles = [layer.register_forward_hook(note) for layer in layers]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def without_best(config: RouterConfig, num_experts: int) -> RouterConfig:
    """The next k experts after the best ``DISABLED_SHARE`` of all."""
    k = config.select.k
    first = min(max(1, round(DISABLED_SHARE * num_experts)), num_experts - k)
    return config.replace(select={"kind": "rank", "ranks": tuple(range(first, first + k))})


@torch.no_grad()
def probe_loss(run: LoadedRun, limit: int = 256) -> tuple[float, tuple[Routing, ...]]:
    """Loss on some held-out samples in one look of the run's judge, with routings."""
    source = build_source(run.config, "held_out")
    batch = source.get(order(0, 0, min(limit, len(source)), len(source)))
    return judge_of(run).probe(batch)


def measure(run: LoadedRun) -> dict[str, float]:
    """The probes that make sense for this model's routers."""
    token = token_routers(run.model)
    if not token:
        return {}
    with observed(run.model) as seen:
        loss, routings = probe_loss(run)
    out = {"separation": float(np.mean([separation(r) for r in routings if r.unit == "token"]))}
    cosines = [off_diagonal_mean(table) for table in cosines_of(seen).values() if len(table) > 1]
    if cosines:
        out["expert_similarity"] = float(np.mean(cosines))
    if all(r.config.select.kind == "top_k" and r.num_experts > r.config.select.k for r in token):
        with rerouted(run.model, without_best):
            disabled, _ = probe_loss(run)
        out["first_choice_cost"] = disabled / loss - 1
    return out


def expert_cosines(run: LoadedRun) -> dict[Place, np.ndarray]:
    """Router -> cosine [E, E] between the answers of its experts to the same held-out tokens,
    mean over tokens. At most ``ALIKE_EXPERTS`` experts, drawn at random, in their own order."""
    with observed(run.model) as seen:
        probe_loss(run)
    return cosines_of(seen)


@torch.no_grad()
def cosines_of(seen: Sequence[Seen]) -> dict[Place, np.ndarray]:
    """:func:`expert_cosines` of the layers for tokens among ``seen``, on what they first read."""
    out = {}
    for item in seen:
        first = item.routings[0]
        if first.unit == "token" and not item.layer.pool.kind.input_free:
            place = Place(first.slot, first.layer, first.round)
            out[place] = _answer_cosines(item, item.layer.pool.num_experts - first.num_reserved)
    return out


def _answer_cosines(item: Seen, num_experts: int) -> np.ndarray:
    h_RD = item.h.flatten(0, 1)
    if item.mask is not None:
        h_RD = h_RD[item.mask.flatten()]
    rng = generator(0, "similarity")
    rows = torch.randperm(len(h_RD), generator=rng)[:ALIKE_TOKENS]
    some = torch.randperm(num_experts, generator=rng)[:ALIKE_EXPERTS].sort().values
    x_TD, experts = h_RD[rows.to(h_RD.device)], experts_of(item.layer.pool)
    x_TD = x_TD if item.layer.stem is None else item.layer.stem(x_TD)  # what the experts read
    answers = [item.layer.pool.kind.forward(x_TD, experts[e]).float() for e in some.tolist()]
    unit_ETD = F.normalize(torch.stack(answers), dim=-1)
    cosine: np.ndarray = torch.einsum("etd,ftd->ef", unit_ETD, unit_ETD).double().cpu().numpy()
    return cosine / max(1, len(rows))


def separation(routing: Routing) -> float:
    """Mean cosine of a token with the mean of its own experts' tokens, minus that with the means
    of the others. 0: experts see the same; up to 2."""
    assert routing.inputs is not None
    chosen_RE = routing.one_hot() > 0
    own_RE = chosen_RE[:, chosen_RE.any(0)].float()
    if own_RE.shape[1] < 2:
        return 0.0
    h_RD = routing.inputs.float()
    mean_ED = own_RE.T @ h_RD / own_RE.sum(0)[:, None]
    cosine_RE = F.normalize(h_RD, dim=-1) @ F.normalize(mean_ED, dim=-1).T
    routed_R = own_RE.any(1).float()[:, None]
    other_RE = (1 - own_RE) * routed_R
    within = (cosine_RE * own_RE).sum() / own_RE.sum()
    return float(within - (cosine_RE * other_RE).sum() / other_RE.sum().clamp_min(1))
