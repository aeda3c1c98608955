"""Tensors of a module by name, to and from safetensors files; mismatches are errors with names."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from coterie.core.errors import CheckpointError
from coterie.core.files import regular_file


def borrow(module: nn.Module, borrowed: bool = True) -> None:
    """Mark a module's own tensors as part of another model (``borrowed`` False: undo it).

    They get no gradient, stay in eval mode and are not saved with this model. Child modules are not
    changed.
    """
    module.is_borrowed = borrowed  # type: ignore[assignment]
    if borrowed:
        for parameter in module.parameters(recurse=False):
            parameter.requires_grad_(False)


def is_borrowed(module: nn.Module) -> bool:
    """Whether :func:`borrow` marked the module."""
    return bool(getattr(module, "is_borrowed", False))


def stands_still(part: nn.Module, whole: nn.Module) -> bool:
    """Whether ``part`` of ``whole`` is not trained: frozen (``is_frozen``), or in eval mode while
    ``whole`` is in training mode. Its buffers may not change either."""
    return bool(getattr(part, "is_frozen", False)) or (whole.training and not part.training)


def module_tensors(module: nn.Module, borrowed: bool = False) -> dict[str, Tensor]:
    """Parameters and persistent buffers, each tensor once (tied weights under the first name).

    Borrowed modules are left out unless ``borrowed``. The values are the module's own tensors, not
    copies.
    """
    out: dict[str, Tensor] = {}
    lent = [] if borrowed else [part for part in module.modules() if is_borrowed(part)]
    seen = {id(value) for part in lent for value in tensors_of(part)}
    for name, value in module.state_dict(keep_vars=True).items():
        if isinstance(value, Tensor) and id(value) not in seen:
            seen.add(id(value))
            out[name] = value
    return out


def tensors_of(module: nn.Module) -> Iterator[Tensor]:
    """A module's own parameters and buffers, without those of its children."""
    yield from module.parameters(recurse=False)
    yield from module.buffers(recurse=False)


def backward_runs() -> bool:
    """Whether a backward pass runs in this thread. A forward pass at that moment is a recomputation
    by gradient checkpointing."""
    return torch._C._current_graph_task_id() != -1


def effective(module: nn.Module) -> dict[str, Tensor]:
    """A module's own parameters by name, with what adapters add to them.

    Code that reads a parameter without calling the module reads it here, so that adapters act there
    too.
    """
    own: dict[str, Tensor] = {n: v for n, v in module._parameters.items() if v is not None}
    added = module._modules.get("adapters")
    read = getattr(added, "read", None)
    if read is None:
        return own
    adapted: dict[str, Tensor] = read(module, own)
    return adapted


def local(value: Tensor) -> Tensor:
    """This process's part of a tensor that is split over processes; any other tensor unchanged."""
    held: Tensor = value.to_local() if hasattr(value, "to_local") else value
    return held


@torch.no_grad()
def assign(own: Mapping[str, Tensor], values: Mapping[str, Tensor], origin: str) -> None:
    """Copy ``values`` into the tensors ``own``; names, shapes and dtypes must agree exactly."""
    missing = sorted(own.keys() - values.keys())
    unknown = sorted(values.keys() - own.keys())
    for title, names in (("missing", missing), ("unknown", unknown)):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise CheckpointError(f"{origin}: {title} tensors {', '.join(names[:3])}{more}")
    for name, value in values.items():
        if own[name].shape != value.shape or own[name].dtype != value.dtype:
            raise CheckpointError(
                f"{origin}: {name} is {value.dtype} {list(value.shape)}, "
                f"expected {own[name].dtype} {list(own[name].shape)}"
            )
    for name, value in values.items():
        own[name].copy_(value)


def require_finite(values: Mapping[str, Tensor], where: str) -> None:
    """CheckpointError that names the first tensor with NaN or infinity."""
    for name, value in values.items():
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise CheckpointError(f"{where}: {name} holds NaN or infinity")


def tensors_digest(values: Mapping[str, Tensor]) -> str:
    """SHA-256 (hex) of names, types, shapes and values, in their order."""
    hasher = hashlib.sha256()
    for name, value in values.items():
        data = value.detach().cpu().contiguous()
        hasher.update(f"{name} {data.dtype} {tuple(data.shape)} ".encode())
        hasher.update(data.reshape(-1).view(torch.uint8).numpy().tobytes())
    return hasher.hexdigest()


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file, ``metadata`` in its header; a failing disk raises OSError."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(_separate(tensors), path, None if metadata is None else dict(metadata))
    except SafetensorError as error:
        raise OSError(f"{path.name}: {error}") from error


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, on the CPU. CheckpointError if the file is damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    regular_file(path, CheckpointError)
    try:
        return load_file(path)
    except (SafetensorError, OSError, KeyError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path}: not a valid safetensors file ({error})") from None


def copy_tensors(path: Path) -> dict[str, Tensor]:
    """As :func:`read_tensors`, but copied to memory that torch allocates, which is aligned, so that
    kernels compute the same bits as before saving. Tensors are read one at a time."""
    from safetensors import SafetensorError, safe_open

    regular_file(path, CheckpointError)
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
        out = {}
        for name in names:
            with safe_open(path, framework="pt") as file:
                out[name] = file.get_tensor(name).clone()
        return out
    except (SafetensorError, OSError, KeyError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path}: not a valid safetensors file ({error})") from None


def _separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors that share no storage, as the file format wants them."""
    out: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, value in tensors.items():
        value = value.detach().contiguous()
        pointer = value.untyped_storage().data_ptr()
        if pointer in storages:
            value = value.clone()
        storages.add(pointer)
        out[name] = value
    return out
