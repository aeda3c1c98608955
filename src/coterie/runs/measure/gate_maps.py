"""Maps of the members' weights over a few held-out pictures, for an ensemble's report."""

from __future__ import annotations

import numpy as np
import torch

from coterie.core.rng import generator
from coterie.core.routing import ENSEMBLE
from coterie.ensembles import Ensemble
from coterie.inspect import GateMaps
from coterie.runs.build import build_source
from coterie.runs.judges.base import batches
from coterie.runs.sample.sampling import to_pixels
from coterie.runs.trained_run import LoadedRun

SHOWN = 3  # pictures, each at every one of
NOISES = (0.25, 0.75)


@torch.no_grad()
def gate_maps(run: LoadedRun) -> GateMaps | None:
    """The maps; None if the model does not weight experts per pixel."""
    model = run.model
    if not isinstance(model, Ensemble) or len(run.source.shape) != 3:
        return None
    batch = batches(build_source(run.config, "held_out"), SHOWN, SHOWN)[0]
    inputs: list[np.ndarray] = []
    notes: list[str] = []
    found: dict[str, list[np.ndarray]] = {}
    for noise in NOISES:
        t = model.process.time_of_unit(torch.full((len(batch.ids),), noise))
        eps = torch.randn(batch.x.shape, generator=generator(0, "gate_maps"))
        x_t = model.process.diffuse(batch.x, eps, t)
        places = [
            routing
            for routing in model(x_t, t, batch.cond).routings
            if routing.slot == ENSEMBLE and routing.unit == "token" and routing.grid
        ]
        for routing in places:
            weights = routing.gates.unflatten(0, (routing.batch[0], *routing.grid))
            maps = weights.movedim(-1, 1).double().cpu().numpy()
            found.setdefault(routing.name, []).append(maps)
        inputs.append(to_pixels(x_t))
        notes += [f"t = {noise:g}"] * len(batch.ids)
    if not found:
        return None
    weights_of = {name: np.concatenate(maps) for name, maps in found.items()}
    return GateMaps(np.concatenate(inputs), notes, weights_of, model.members.names)
