"""Adapters on any network: attached by module names, weighted, merged and removed.

    attach(model, "six", LoraConfig(targets=("*.attention.*",), rank=8))
    ...                                     # train: only the adapter's parameters are open
    weigh(model, {"six": 0.5})
    merge(model); unmerge(model)            # the same function, without the adapters' cost

The network's own modules keep their names, classes and weights, and compute the same function until
an adapter is trained. Its weights are marked as borrowed: a checkpoint or model directory of an
adapted network holds its adapters alone.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from coterie.adapters.checks import check_together
from coterie.adapters.config import LoraConfig
from coterie.adapters.layers import (
    Additions,
    Copy,
    Gain,
    LowRank,
    Part,
    Rows,
    Shift,
    add,
    additions_of,
    fits,
    own_state,
)
from coterie.adapters.reach import await_reach, check_reach, left_out
from coterie.adapters.stacks import Stacks, lend, stacked, take_back
from coterie.core.errors import ConfigError, describe, unknown
from coterie.core.tensors import borrow, tensors_digest, tensors_of

Parts = dict[str, Part]
_MAPS = "only nn.Linear and convolutions of one group are adapted, for their answer is the map's"
NEEDS = {
    "targets": _MAPS,
    "ranks": "only what targets name has a rank",
    "alphas": "only what targets name has an alpha",
    "embeddings": "only nn.Embedding has rows to train",
    "biases": "it has no bias",
    "copies": "it has no tensors of its own",
    "experts": "it is no stack of experts' maps",
}
"""Field -> why a module whose name fits is not taken."""


class AdapterWarning(UserWarning):
    """An adapter covers less than its targets say."""


def attach(
    model: nn.Module, name: str, config: LoraConfig, weight: Gain = 1.0, warn: bool = True
) -> Parts:
    """Attach a new adapter to ``model``, in place; returns its parts by the path of their module.

    ``warn``: warn if ``targets`` match stacked experts, which are no modules and are left out.
    ConfigError, with ``model`` unchanged, for a pattern that matches nothing, a rank above a width,
    a slot beyond the basis, or a basis or slot that conflicts with other adapters.
    """
    there = adapters_of(model)
    if name in there:
        raise ConfigError(describe("adapter", name, f"another name than {', '.join(there)}"))
    check_together({**configs_of(model), name: config})
    modules = own_modules(model)
    made = _made(modules, config)
    for module in modules.values():
        borrow(module)
    for path, part in made.items():
        additions = _additions(modules[path], path)
        additions.parts[name] = part
        additions.gains[name] = weight
        _listen(modules[path], additions)
    await_reach(model, name)
    said = left_out(name, config, modules, made) if warn else ""
    if said:
        warnings.warn(said, AdapterWarning, stacklevel=2)
    return made


def _listen(layer: nn.Module, additions: Additions) -> None:
    """Let what is added act when ``layer`` is called. One that reads its own stacks reads what is
    added while it is called; a pool of ours is never called."""
    if add not in layer._forward_hooks.values():
        layer.register_forward_hook(add, with_kwargs=True)
    stacks = any(isinstance(part, Stacks) for part in additions.parts.values())
    if (
        stacks
        and not hasattr(layer, "expert_state")
        and lend not in layer._forward_pre_hooks.values()
    ):
        layer.register_forward_pre_hook(lend)
        layer.register_forward_hook(take_back, prepend=True, always_call=True)


def _made(modules: Mapping[str, nn.Module], config: LoraConfig) -> Parts:
    """What an adapter adds, by path; a module it has a copy of is not changed otherwise."""
    copies = named(modules, config.copies, "copies", _has_tensors)
    biases = set(named(modules, config.biases, "biases", _has_bias)) - set(copies)
    layers = set(named(modules, config.targets, "targets", fits)) - set(copies)
    tables = set(named(modules, config.embeddings, "embeddings", _is_table)) - set(copies)
    stacks = named_stacks(modules, config.experts)
    among = {path: modules[path] for path in modules if path in layers}
    named(among, config.ranks, "ranks", fits)
    named(among, config.alphas, "alphas", fits)
    made: Parts = {}
    for path, module in modules.items():
        if path in copies:
            made[path] = Copy(module, config, path)
        elif path in stacks:
            made[path] = Stacks(module, config, path, stacks[path])
        elif path in layers:
            made[path] = LowRank(module, config, path, bias=path in biases)
        elif path in tables:
            assert isinstance(module, nn.Embedding)
            made[path] = Rows(module, config, path)
        elif path in biases:
            made[path] = Shift(module, config, path)
    return made


def own_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Path -> module, without those that adapters added."""
    added = {id(m) for a in model.modules() if isinstance(a, Additions) for m in a.modules()}
    return {path: m for path, m in model.named_modules() if id(m) not in added}


def named(
    modules: Mapping[str, nn.Module], patterns: Iterable[str], field: str, fit: object
) -> list[str]:
    """Paths of the modules that match, in order; ConfigError for a pattern that matches none."""
    assert callable(fit)
    there = [path for path, module in modules.items() if fit(module)]
    patterns = tuple(patterns)
    for pattern in patterns:
        if not any(fnmatchcase(path, pattern) for path in there):
            others = [path for path in modules if path and fnmatchcase(path, pattern)]
            some = ", ".join(there[:6]) or "none in this network"
            more = f" and {len(there) - 6} more" if len(there) > 6 else ""
            raise ConfigError(
                describe(field, pattern, f"{some}{more}", _why_none(field, others, modules))
            )
    return [path for path in there if any(fnmatchcase(path, pattern) for pattern in patterns)]


def _why_none(field: str, others: list[str], modules: Mapping[str, nn.Module]) -> str:
    """``others``: modules whose names fit a pattern, and that cannot be what ``field`` names."""
    if not others:
        return "no module has such a name"
    module = modules[others[0]]
    more = f" (and {len(others) - 1} more)" if len(others) > 1 else ""
    found = f"{others[0]}{more} is of class {type(module).__name__}"
    if _is_table(module) and field in ("targets", "ranks", "alphas"):
        return f"{found}, a table: name it in embeddings"
    return f"{found}, and {NEEDS.get(field, 'does not fit')}"


def named_stacks(
    modules: Mapping[str, nn.Module], patterns: Iterable[str]
) -> dict[str, tuple[str, ...]]:
    """Path of a module -> its matching stacks of expert matrices, as :func:`named`."""
    there = {
        f"{path}.{own}": (path, own) for path, module in modules.items() for own in stacked(module)
    }
    places = {path: modules[owner] for path, (owner, _) in there.items()}
    out: dict[str, tuple[str, ...]] = {}
    for path in named(places, patterns, "experts", stacked):
        owner, own = there[path]
        out[owner] = (*out.get(owner, ()), own)
    return out


def _is_table(module: nn.Module) -> bool:
    return isinstance(module, nn.Embedding)


def _has_bias(module: nn.Module) -> bool:
    return isinstance(getattr(module, "bias", None), Tensor)


def _has_tensors(module: nn.Module) -> bool:
    """Parameters or buffers of its own."""
    return next(tensors_of(module), None) is not None


def _additions(layer: nn.Module, path: str) -> Additions:
    found = getattr(layer, "adapters", None)
    if found is None:
        found = Additions()
        layer.add_module("adapters", found)
    if not isinstance(found, Additions):
        hint = f"{path} has something else of that name"
        raise ConfigError(describe("adapters", type(found).__name__, "a free name", hint))
    if found.pristine is not None:
        raise ConfigError(describe("merged", True, "false", "unmerge before adding an adapter"))
    return found


def adapters_of(model: nn.Module) -> dict[str, Parts]:
    """Adapter -> its parts by path."""
    out: dict[str, Parts] = {}
    for path, (_, additions) in additions_of(model).items():
        for name, part in additions.parts.items():
            assert isinstance(part, Part)
            out.setdefault(name, {})[path] = part
    return out


def configs_of(model: nn.Module) -> dict[str, LoraConfig]:
    """Adapter -> its configuration."""
    return {name: next(iter(parts.values())).config for name, parts in adapters_of(model).items()}


def weights_of(model: nn.Module) -> dict[str, Gain]:
    """Adapter -> its weight."""
    out: dict[str, Gain] = {}
    for _, additions in additions_of(model).values():
        out |= additions.gains
    return out


def base_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The network's own parameters and persistent buffers, without adapters; each tensor once, not
    copied."""
    own = {id(v) for module in own_modules(model).values() for v in tensors_of(module)}
    out: dict[str, Tensor] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        if id(value) in own:
            own.remove(id(value))
            out[name] = value
    return out


def base_digest(model: nn.Module) -> str:
    """SHA-256 of :func:`base_tensors`: names, types, shapes, values."""
    return tensors_digest(base_tensors(model))


def weigh(model: nn.Module, weights: Mapping[str, Gain]) -> None:
    """Set the weight of each named adapter: a number, or one per sample, [B].

    ``{}`` changes nothing; weight 0 turns an adapter off.
    """
    there = adapters_of(model)
    for name in weights:
        if name not in there:
            raise ConfigError(unknown("adapter", name, there))
    for _, additions in additions_of(model).values():
        if additions.pristine is not None:
            raise ConfigError(describe("merged", True, "false", "unmerge before weighing"))
        additions.gains |= {n: g for n, g in weights.items() if n in additions.parts}


@torch.no_grad()
def merge(model: nn.Module) -> None:
    """Add all adapters to the network's own weights: W + sum_i weight_i dW_i, in float32.

    Adapters are added in the order of their names, so the result does not depend on the order of
    attaching. ConfigError if they are already merged.
    """
    found = additions_of(model)
    for path, (_, additions) in found.items():
        if additions.pristine is not None:
            raise ConfigError(describe("merged", True, "false", f"{path} is merged already"))
        if any(isinstance(gain, Tensor) for gain in additions.gains.values()):
            hint = "weights of one sample each cannot be one weight"
            raise ConfigError(describe("weights", "per sample", "a number per adapter", hint))
    for layer, additions in found.values():
        own, additions.merged = own_state(layer), True
        additions.pristine = {name: value.detach().clone() for name, value in own.items()}
        try:
            total = additions.total(own)
        except ConfigError:
            unmerge(model)
            raise
        for name, value in own.items():
            value.copy_(total[name])


@torch.no_grad()
def unmerge(model: nn.Module) -> None:
    """Restore the weights from before :func:`merge`, bit for bit."""
    for layer, additions in additions_of(model).values():
        if additions.pristine is not None:
            for name, value in own_state(layer).items():
                value.copy_(additions.pristine[name])
            additions.pristine = None


def detach(model: nn.Module) -> None:
    """Remove every adapter; merged weights stay merged. The network's weights are its own again,
    but still without gradient."""
    adapted = [layer for layer, _ in additions_of(model).values()]
    for layer in adapted:
        del layer.adapters
    for layer in (model, *adapted):
        for hooks in (layer._forward_hooks, layer._forward_pre_hooks):
            for key, hook in list(hooks.items()):
                if hook in (add, lend, take_back, check_reach):
                    del hooks[key]
                    layer._forward_hooks_with_kwargs.pop(key, None)
                    layer._forward_hooks_always_called.pop(key, None)
    model.__dict__.pop("awaited_adapters", None)
    for module in model.modules():
        borrow(module, False)


@dataclass(frozen=True, eq=False)
class Taken:
    """Adapters taken off a network, by path, for :func:`put_back`."""

    additions: dict[str, Additions]
    merged: bool


def take_off(model: nn.Module) -> Taken:
    """Remove all adapters for :func:`put_back`; the network is as before they were attached."""
    found = {path: additions for path, (_, additions) in additions_of(model).items()}
    merged = any(additions.pristine is not None for additions in found.values())
    unmerge(model)
    detach(model)
    return Taken(found, merged)


def put_back(model: nn.Module, taken: Taken) -> None:
    """Attach the same adapter modules to another copy of the network."""
    modules = own_modules(model)
    for module in modules.values():
        borrow(module)
    for path, additions in taken.additions.items():
        layer = modules[path]
        layer.add_module("adapters", additions)
        _listen(layer, additions)
        for name in additions.parts:
            await_reach(model, name)
    if taken.merged:
        merge(model)


def fold(model: nn.Module) -> None:
    """Merge and detach: an ordinary network of the base's shape and cost."""
    merge(model)
    detach(model)
