"""A foreign model with our expert layers in the place of its dense networks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from coterie.backbones import SlotConfig
from coterie.backbones.slots import refuse_foreign, require_graph
from coterie.convert import UpcycleConfig, convert_block, feed_forward_inputs
from coterie.core.context import Context
from coterie.core.errors import ConfigError, describe
from coterie.core.rng import generator
from coterie.core.routing import Aux, Routing
from coterie.core.tensors import backward_runs
from coterie.experts import ExpertLayer, ExpertLayerConfig, ExpertOutput, routers_of
from coterie.interop.transformers.eager import around, run_eagerly
from coterie.interop.transformers.masks import MaskReader
from coterie.interop.upcycled.networks import DenseNetwork, find_networks


class UpcycledNetwork(nn.Module):
    """``forward(h [B, N, D]) -> [B, N, D]``, as the network it stands for; ``index`` its block.

    Routings are read with :func:`tapped`; nothing is kept here.
    """

    def __init__(self, layer: ExpertLayer, index: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.layer = layer
        self.index = index
        self.dropout = dropout

    def forward(self, hidden_states: Tensor) -> Tensor:
        h = hidden_states if hidden_states.dim() == 3 else hidden_states[None]
        ctx = Context(batch=h.shape[0], tokens=h.shape[1], layer=self.index, training=self.training)
        y: Tensor = self.layer(h, ctx).y
        return F.dropout(y.view(hidden_states.shape), self.dropout, self.training)


def upcycle_transformers(
    model: nn.Module,
    config: UpcycleConfig,
    run: Callable[[nn.Module], object] | None = None,
    rng: Generator | None = None,
    progress: Callable[[int], object] | None = None,
) -> nn.Module:
    """Replace the dense networks of ``model`` by experts, in place, and return it.

    ``config.layers`` counts the networks in the model's order. ``run(model)`` passes real inputs
    through it and so balances the routers (None: random rows). ConfigError for a structure that
    is not known, before anything is changed.
    """
    rng = rng or generator(config.seed, "upcycle")
    chosen = chosen_networks(model, config)
    layers = {
        # Slices of a network are summed; below float32 each sum would round.
        index: config.layer(network.kind, network.hidden).replace(accumulate_float32=True)
        for index, network in chosen.items()
    }
    inputs: Mapping[int, Tensor] = {}
    if run is not None and config.calibration:
        inputs = _inputs(model, chosen, run)
    for index, network in chosen.items():
        new = place_network(model, network, index, layers[index])
        if not next(new.parameters()).is_meta:
            convert_block(new.layer, network.tensors(), config, rng, inputs.get(index))
        if progress is not None:
            progress(1)
    return model


def _inputs(
    model: nn.Module, chosen: Mapping[int, DenseNetwork], run: Callable[[nn.Module], object]
) -> Mapping[int, Tensor]:
    """What the networks are given while ``run`` runs, of padding nothing."""
    readers = {index: MaskReader(model, network.path) for index, network in chosen.items()}
    watched = {index: network.module for index, network in chosen.items()}
    with ExitStack() as stack:
        for index, network in chosen.items():
            stack.callback(run_eagerly([*around(model, network.path), network.module]))
            for handle in readers[index].attach():
                stack.callback(handle.remove)
        return feed_forward_inputs(
            watched, lambda: run(model), lambda index, shape: readers[index].rows(shape)
        )


def chosen_networks(model: nn.Module, config: UpcycleConfig) -> dict[int, DenseNetwork]:
    """The networks that ``config.layers`` names, by their place in the model."""
    found = find_networks(model)
    expert = config.layer(found[0].kind, found[0].hidden)
    sites = SlotConfig(layers=config.layers, expert=expert).sites(len(found))
    if not sites or not set(sites) <= set(range(len(found))):
        raise ConfigError(describe("layers", config.layers, f"networks 0..{len(found) - 1}"))
    return {index: found[index] for index in sites}


def place_network(
    model: nn.Module, network: DenseNetwork, index: int, config: ExpertLayerConfig
) -> UpcycledNetwork:
    """Put an expert layer with weights of no use where ``network`` is. Experts are in the type of
    the network, routers in float32."""
    like = next(network.module.parameters())
    with torch.device(like.device):
        layer = config.build(network.width)
    layer.pool.to(like.dtype)
    new = UpcycledNetwork(layer, index, network.dropout).train(network.module.training)
    parent, _, name = network.path.rpartition(".")
    setattr(model.get_submodule(parent), name, new)
    return new


def upcycled_networks(model: nn.Module) -> dict[str, UpcycledNetwork]:
    """Path -> what took a network's place."""
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, UpcycledNetwork)
    }


@contextmanager
def tapped(model: nn.Module) -> Iterator[list[Routing]]:
    """Inside the block, every routing of the model's upcycled networks goes to the list; padding
    that the model's attention mask names is not counted. A compiled model runs uncompiled."""
    routings: list[Routing] = []
    model = getattr(model, "_orig_mod", model)
    with ExitStack() as stack:
        for path, network in upcycled_networks(model).items():
            reader = MaskReader(model, path)
            stack.callback(run_eagerly([*around(model, path), network, network.layer]))
            for handle in (
                *reader.attach(),
                network.layer.register_forward_hook(_keep(reader, routings)),
            ):
                stack.callback(handle.remove)
        yield routings


def _keep(reader: MaskReader, routings: list[Routing]) -> Callable[..., None]:
    def keep(layer: nn.Module, given: tuple[Tensor, Context], answer: ExpertOutput) -> None:
        if backward_runs():  # gradient checkpointing runs it again
            return
        mask = reader.rows((given[1].batch, given[1].tokens))
        routings.extend(routing.replace(mask=mask) for routing in answer.routings)

    return keep


def aux_losses(model: nn.Module, routings: Sequence[Routing]) -> tuple[Aux, ...]:
    """The configured balance losses of the routings of one forward pass: add ``weight * value`` of
    each to the model's own loss. DataError for routings of another model."""
    out: list[Aux] = []
    networks = upcycled_networks(model).values()
    refuse_foreign(routings, [network.layer.owner for network in networks])
    for network in networks:
        own = [routing for routing in routings if routing.layer == network.index]
        made = [a for part in network.layer.config.balance for a in part.build().losses(own)]
        if made and network.training:
            require_graph(own, routers_of([network.layer]), "ffn")
        out.extend(made)
    return tuple(out)
