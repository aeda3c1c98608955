"""Adapters on any network: put on by the names of its modules, weighed, merged, taken off.

    attach(model, "six", LoraConfig(targets=("*.attention.*",), rank=8))
    ...                                     # train: only the adapter's parameters are open
    weigh(model, {"six": 0.5})
    merge(model); unmerge(model)            # the same function, without the adapters' cost

The network's own modules keep their names, classes and weights, and compute the same function until
an adapter is trained. Its weights are marked as borrowed: a checkpoint or model directory of an
adapted network holds its adapters alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
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
    fits,
    refuse_two_copies,
)
from coterie.core.errors import ConfigError, describe, unknown
from coterie.core.tensors import borrow, tensors_of

Parts = dict[str, Part]


def attach(model: nn.Module, name: str, config: LoraConfig, weight: Gain = 1.0) -> Parts:
    """Put one adapter on ``model``, in place; its parts by the path of the module they add to.

    ConfigError, with ``model`` as it was: a pattern that fits nothing, a rank above a width, a slot
    beyond a basis, a basis or a slot that does not go with the adapters that are there.
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
    return made


def _made(modules: Mapping[str, nn.Module], config: LoraConfig) -> Parts:
    """What an adapter adds, by path; a module it has a copy of is not changed otherwise."""
    copies = named(modules, config.copies, "copies", _has_tensors)
    biases = set(named(modules, config.biases, "biases", _has_bias)) - set(copies)
    layers = set(named(modules, config.targets, "targets", fits)) - set(copies)
    tables = set(named(modules, config.embeddings, "embeddings", _is_table)) - set(copies)
    made: Parts = {}
    for path, module in modules.items():
        if path in copies:
            made[path] = Copy(module, config, path)
        elif path in layers:
            made[path] = LowRank(module, config, path, bias=path in biases)
        elif path in tables:
            assert isinstance(module, nn.Embedding)
            made[path] = Rows(module, config, path)
        elif path in biases:
            made[path] = Shift(module, config, path)
    return made


def own_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Path -> module, without what adapters put there."""
    added = {id(m) for a in model.modules() if isinstance(a, Additions) for m in a.modules()}
    return {path: m for path, m in model.named_modules() if id(m) not in added}


def named(
    modules: Mapping[str, nn.Module], patterns: Iterable[str], field: str, fit: object
) -> list[str]:
    """Paths of the modules that fit, in order; ConfigError for a pattern without any."""
    assert callable(fit)
    there = [path for path, module in modules.items() if fit(module)]
    patterns = tuple(patterns)
    for pattern in patterns:
        if not any(fnmatchcase(path, pattern) for path in there):
            some = ", ".join(there[:6]) or "none in this network"
            more = f" and {len(there) - 6} more" if len(there) > 6 else ""
            raise ConfigError(
                describe(field, pattern, f"{some}{more}", "no module has such a name")
            )
    return [path for path in there if any(fnmatchcase(path, pattern) for pattern in patterns)]


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
        layer.register_forward_hook(add)
    if not isinstance(found, Additions):
        hint = f"{path} has something else of that name"
        raise ConfigError(describe("adapters", type(found).__name__, "a free name", hint))
    if found.pristine is not None:
        raise ConfigError(describe("merged", True, "false", "unmerge before adding an adapter"))
    return found


def additions_of(model: nn.Module) -> dict[str, tuple[nn.Module, Additions]]:
    """Path of each adapted module -> it, and what is added to it."""
    return {
        path: (module, module.adapters)
        for path, module in model.named_modules()
        if isinstance(getattr(module, "adapters", None), Additions)
        and isinstance(module.adapters, Additions)
    }


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
    """Adapter -> how much of it is added."""
    out: dict[str, Gain] = {}
    for _, additions in additions_of(model).values():
        out |= additions.gains
    return out


def base_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The network's own parameters and persistent buffers, without what adapters added; each
    tensor once, not a copy."""
    own = {id(v) for module in own_modules(model).values() for v in tensors_of(module)}
    out: dict[str, Tensor] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        if id(value) in own:
            own.remove(id(value))
            out[name] = value
    return out


def base_digest(model: nn.Module) -> str:
    """SHA-256 of :func:`base_tensors`: names, types, shapes, values."""
    hasher = hashlib.sha256()
    for name, value in base_tensors(model).items():
        data = value.detach().cpu().contiguous()
        hasher.update(f"{name} {data.dtype} {tuple(data.shape)} ".encode())
        hasher.update(data.reshape(-1).view(torch.uint8).numpy().tobytes())
    return hasher.hexdigest()


def weigh(model: nn.Module, weights: Mapping[str, Gain]) -> None:
    """How much of each named adapter is added: a number, or one per sample, [B]. ``{}`` changes
    nothing; 0 turns an adapter off."""
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
    """W + sum_i weight_i dW_i into the network's own weights, in f32 and from the weights as they
    were; sorted by name, so the order in which adapters came does not matter. Twice is an error."""
    found = additions_of(model)
    for path, (_, additions) in found.items():
        if additions.pristine is not None:
            raise ConfigError(describe("merged", True, "false", f"{path} is merged already"))
        if any(isinstance(gain, Tensor) for gain in additions.gains.values()):
            hint = "weights of one sample each cannot be one weight"
            raise ConfigError(describe("weights", "per sample", "a number per adapter", hint))
    for layer, additions in found.values():
        own = own_state(layer)
        additions.pristine = {name: value.detach().clone() for name, value in own.items()}
        total = {
            name: value.detach().float() if value.is_floating_point() else value.detach()
            for name, value in own.items()
        }
        copied = False
        # Copies first: what is added is added to the module that answers.
        for name in sorted(additions.parts, key=lambda n: (not _is_copy(additions, n), n)):
            part, gain = additions.parts[name], additions.gains[name]
            assert isinstance(part, Part) and not isinstance(gain, Tensor)
            if copied and isinstance(part, Copy) and gain != 0:
                unmerge(model)
                refuse_two_copies(name, gain)
            copied = copied or (isinstance(part, Copy) and gain != 0)
            part.merge_into(total, gain)
        for name, value in own.items():
            value.copy_(total[name])


def _is_copy(additions: Additions, name: str) -> bool:
    return isinstance(additions.parts[name], Copy)


def own_state(layer: nn.Module) -> dict[str, Tensor]:
    """A module's own parameters and persistent buffers by name, not those of its children."""
    return {n: v for n, v in layer.state_dict(keep_vars=True).items() if "." not in n}


@torch.no_grad()
def unmerge(model: nn.Module) -> None:
    """The network's weights as they were before :func:`merge`, bit for bit."""
    for layer, additions in additions_of(model).values():
        if additions.pristine is not None:
            for name, value in own_state(layer).items():
                value.copy_(additions.pristine[name])
            additions.pristine = None


def detach(model: nn.Module) -> None:
    """Take every adapter off; what is merged stays merged. The weights are the network's own again
    (and stay closed to gradients)."""
    for layer, _ in additions_of(model).values():
        del layer.adapters
        for key, hook in list(layer._forward_hooks.items()):
            if hook is add:
                del layer._forward_hooks[key]
    for module in model.modules():
        borrow(module, False)


def fold(model: nn.Module) -> None:
    """Merge and take off: an ordinary network of the base's own shape and cost."""
    merge(model)
    detach(model)
