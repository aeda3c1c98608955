"""Running a trained model with other router settings; weights are not copied."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from coterie.core.config import override
from coterie.core.errors import ConfigError, unknown
from coterie.experts.routers import Router, RouterConfig

READ_EACH_TIME = ("select", "weight", "when", "probability", "scale", "renorm_eps")
"""Fields of a router's configuration that need no new parameters or parts."""


def token_routers(model: nn.Module) -> list[Router]:
    """The routers that choose per token; routers by noise level are left out."""
    routers = [module for module in model.modules() if isinstance(module, Router)]
    return [router for router in routers if router.config.routed_unit == "token"]


@contextmanager
def rerouted(
    model: nn.Module, change: Callable[[RouterConfig, int], RouterConfig]
) -> Iterator[None]:
    """Inside the block every token router runs with ``change(config, num_experts)``."""
    routers = token_routers(model)
    before = [router.config for router in routers]
    try:
        for router in routers:
            router.config = change(router.config, router.num_experts)
            router.config.check(router.num_experts)
        yield
    finally:
        for router, config in zip(routers, before, strict=True):
            router.config = config


def check_paths(settings: Mapping[str, Any]) -> None:
    """ConfigError for a router setting that would need other weights."""
    for path in settings:
        if path.split(".")[0] not in READ_EACH_TIME:
            raise ConfigError(unknown(path, path.split(".")[0], READ_EACH_TIME))


def changed(config: RouterConfig, settings: Mapping[str, Any]) -> RouterConfig:
    """``config`` with ``settings`` applied: whole parts first, then fields inside them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # what they warn of concerns training
        for depth in sorted({path.count(".") for path in settings}):
            level = {path: value for path, value in settings.items() if path.count(".") == depth}
            config = override(config, level)
    return config
