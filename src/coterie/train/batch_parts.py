"""Checks for models that cannot be trained on parts of a batch, as they read the whole batch."""

from __future__ import annotations

from torch import nn

from coterie.core.errors import ConfigError
from coterie.core.tensors import is_borrowed
from coterie.experts import ExpertPool


def check_apart(model: nn.Module, field: str, who: str) -> None:
    """ConfigError for ``field`` if a sample's result, or running statistics, depend on other
    samples of the batch; ``who`` holds only a part of them."""
    for path, module in model.named_modules():
        # What is borrowed stays in eval mode.
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and not is_borrowed(module):
            raise ConfigError(_not_apart(path, field, who))
    for path, pool in routed_pools(model).items():
        if pool.kind.batch_statistics:
            raise ConfigError(_not_apart(path, field, who))
        for name in pool.moving:
            raise ConfigError(
                f"{field}: {path}.{name} is moved by the rows of the batch, which {who} has whole; "
                f"{_INSTEAD}"
            )


_INSTEAD = "train it in one process, with train.accumulate 1"


def _not_apart(path: str, field: str, who: str) -> str:
    return f"{field}: {path} normalises over its batch, which {who} has whole; {_INSTEAD}"


def routed_pools(model: nn.Module) -> dict[str, ExpertPool]:
    """Pools that routers choose from, by path; shared experts are left out."""
    from coterie.experts.shared import SharedExperts

    always = {id(m.pool) for m in model.modules() if isinstance(m, SharedExperts)}
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, ExpertPool) and id(module) not in always
    }
