"""A pipeline directory of diffusers whose denoisers share the noise levels, as one ensemble.

    ranges = load_noise_ranges("Wan2.2-T2V-A14B", guidance_scale=4.0, guidance_scale_2=3.0)

``model_index.json`` names the networks (``transformer``, ``transformer_2``, or ``unet``) and where
the second takes over (``boundary_ratio``); the scheduler's configuration names the process and what
the networks predict. Encoders of text and pictures are not loaded: conditions come as embeddings.
Of two networks, one is in memory at a time and the other is read meanwhile.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor, nn

from coterie.backbones import unet_layers
from coterie.backbones.taps import Layers, Topology
from coterie.core import memory
from coterie.core.errors import CheckpointError, ConfigError, describe
from coterie.core.json_reader import read_object
from coterie.core.prediction import Condition, Prediction, View, as_times
from coterie.core.tensors import copy_tensors, require_finite
from coterie.ensembles import LoadedMembers, Loader, MemberFacts, NoiseRanges, NoiseRangesConfig
from coterie.ensembles.blueprint import Blueprint
from coterie.interop.diffusers.conventions import (
    CHANNELS_FIRST,
    ask,
    convention_for,
    convention_of,
    grid_time,
    stack,
)
from coterie.interop.diffusers.schedulers import scheduler_process
from coterie.interop.diffusers.unet import told_of, topology
from coterie.process import Process

INDEX = "model_index.json"
NETWORKS = ("transformer", "unet")
"""Names of the network of the noisiest range; the next one's ends in ``_2``."""
WEIGHTS = "diffusion_pytorch_model.safetensors"
FROM_FILE = 4
"""A network takes no more than so many times its files: numbers of half the bytes there, and layers
that share their weights counted twice."""
SMALL = 64 * 2**20
"""Bytes that any network may take: where a file is cut off, its reader says so."""
READ = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class DiffusersDenoiser(nn.Module):
    """A network of diffusers with its process and view is a denoiser.

    ``cond.tokens`` go to ``encoder_hidden_states``, ``cond.label`` to ``class_labels``,
    ``cond.channels`` are concatenated to x; ``cond.vector`` and the time as
    :mod:`~coterie.interop.diffusers.conventions` says. Learnt variances come as further channels.
    ConfigError for a network of a class that is not there.
    """

    def __init__(self, network: nn.Module, process: Process, view: View) -> None:
        super().__init__()
        convention_of(network)
        self.network, self.process, self.view = network, process, view

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        cond: Condition,
        sample_ids: Tensor | None = None,
        rng: Generator | None = None,
        progress: float = 1.0,
    ) -> Prediction:
        """x [B, C, ...] at t [B]; ``sample_ids``, ``rng`` and ``progress`` have no use here."""
        t = as_times(t, x)
        cond = self._told(x, cond)
        value = ask(self.network, x, grid_time(self.process, t), self.process.num_steps, cond)
        return self._answer(x, value)

    def topology(self) -> Topology:
        """Of a U-Net; ConfigError for others (see :mod:`coterie.backbones.unet_layers`)."""
        return topology(self.network)

    def layers(
        self, x: Tensor, t: Tensor, cond: Condition, sample_ids: Tensor | None = None
    ) -> Layers[Prediction]:
        """:meth:`forward` of a U-Net layer by layer; see :mod:`coterie.backbones.taps`."""
        t = as_times(t, x)
        cond = self._told(x, cond)
        stacked = stack(self.network, x, cond)
        told = told_of(self.network, stacked, grid_time(self.process, t), cond)
        value = yield from unet_layers.layers(self.network, stacked, told)
        return self._answer(x, value)

    def _told(self, x: Tensor, cond: Condition) -> Condition:
        """The condition as the network reads it."""
        return cond

    def _answer(self, x: Tensor, value: Tensor) -> Prediction:
        variance = None
        if value.shape[1] == 2 * x.shape[1]:
            value, variance = value.chunk(2, dim=1)
        return Prediction(value.to(x), self.view, variance=variance)


def load_noise_ranges(
    path: str | Path,
    *,
    guidance_scale: float | None = None,
    guidance_scale_2: float | None = None,
    resident: int = 1,
    prefetch: bool = True,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> NoiseRanges:
    """The denoisers of a local pipeline directory as one ensemble, the noisiest first.

    ``guidance_scale`` None leaves guidance to whoever asks; ``guidance_scale_2`` None means the
    same scale. Time t in [0, 1] is the position that ``boundary_ratio`` counts. ``dtype`` None: as
    stored. Raises ConfigError for pipelines of another make, CheckpointError for missing files.
    """
    folder = Path(path)
    index = read_json(folder / INDEX)
    names = _networks(folder, index)
    part, view = scheduler_process(folder, index)
    process = part.build()
    ratio = index.get("boundary_ratio")
    if ratio is not None and not (type(ratio) in (int, float) and 0.0 < ratio < 1.0):
        allowed = "null, or a number between 0 and 1"
        raise ConfigError(describe(f"{folder / INDEX}: boundary_ratio", ratio, allowed))
    if (ratio is None) != (len(names) == 1):
        allowed = "a number where there are two networks, null where there is one"
        raise ConfigError(describe(f"{folder / INDEX}: boundary_ratio", ratio, allowed))
    if len(names) == 1 and guidance_scale_2 is not None:
        hint = "this pipeline has one network"
        raise ConfigError(describe("guidance_scale_2", guidance_scale_2, "none", hint))
    # Timesteps there are counted 0..T, here the last of T steps is at t = 1.
    last = process.num_steps / (process.num_steps - 1) if process.discrete else 1.0
    weights = [guidance_scale, guidance_scale if guidance_scale_2 is None else guidance_scale_2]
    config = NoiseRangesConfig.from_dict(
        {
            "boundaries": [] if ratio is None else [ratio * last],
            "guidance": None if weights == [None, None] else weights[: len(names)],
        }
    )
    loaders = [_loader(folder, name, index[name], process, view, dtype) for name in names]
    return config.build(LoadedMembers(loaders, resident, prefetch, device))


def read_json(path: Path) -> dict[str, Any]:
    return read_object(path, f"{path.parent} is not a pipeline of diffusers")


def _networks(folder: Path, index: Mapping[str, Any]) -> list[str]:
    """Names of the components that denoise, the noisiest first."""
    if index.get("expand_timesteps"):
        hint = "a time per token is no noise level of the sample"
        raise ConfigError(describe(f"{folder / INDEX}: expand_timesteps", True, "false", hint))
    if str(index.get("_class_name")) in CHANNELS_FIRST:
        hint = "its network reads the condition before x"
        allowed = "pipelines that put channels of a condition behind x"
        raise ConfigError(
            describe(f"{folder / INDEX}: _class_name", index["_class_name"], allowed, hint)
        )
    given = {
        name
        for name, value in index.items()
        if isinstance(value, list)
        and len(value) == 2
        and all(isinstance(one, str) for one in value)
    }
    for first in NETWORKS:
        if first in given:
            return [name for name in (first, f"{first}_2") if name in given]
    raise ConfigError(
        describe(f"{folder / INDEX}: components", sorted(given), f"one of {', '.join(NETWORKS)}")
    )


def component(path: str | Path) -> tuple[Path, dict[str, Any]]:
    """The folder of the one network at ``path``, a pipeline with one or itself, and its
    configuration. ConfigError where there are several, or the network is of other code."""
    folder = Path(path)
    if not (folder / INDEX).is_file():
        return folder, read_json(folder / "config.json")
    index = read_json(folder / INDEX)
    names = _networks(folder, index)
    if len(names) > 1:
        hint = "load_noise_ranges reads two as one ensemble"
        raise ConfigError(describe(f"{folder / INDEX}: components", names, "one network", hint))
    return folder / names[0], _config(folder, names[0], index[names[0]])


def _config(folder: Path, name: str, stored: Any) -> dict[str, Any]:
    """Of a component that the pipeline's index says is of class ``stored``; ConfigError unless
    that is one of diffusers itself."""
    library, kind = stored
    if library != "diffusers":
        hint = "networks of other code are not run"
        raise ConfigError(describe(f"{folder / INDEX}: {name}", library, "diffusers", hint))
    path = folder / name / "config.json"
    config = read_json(path)
    own = config.get("_class_name")
    if own is not None and own != kind:
        _class_of(kind, f"{folder / INDEX}: {name}: ")
        hint = f"{INDEX} says {kind!r}"
        raise ConfigError(describe(f"{path}: _class_name", own, "one class in both files", hint))
    return {**config, "_class_name": kind}


def read_network(folder: Path, config: Mapping[str, Any]) -> nn.Module:
    """A network of diffusers with the weights in ``folder``, as stored, in eval mode; without them
    where models are made without memory."""
    if torch.get_default_device().type == "meta":
        return new_network(config, folder).eval()
    files = network_files(folder)
    blueprint = _blueprint(config, folder, files)
    return blueprint.make(_weights(files, blueprint), str(files[0]))


def _weights(files: Sequence[Path], blueprint: Blueprint) -> dict[str, Tensor]:
    """The tensors of ``files``; CheckpointError names one that nothing can be computed with."""
    out: dict[str, Tensor] = {}
    for file in files:
        values = copy_tensors(file)
        for name, value in values.items():
            known = blueprint.shapes.get(name)
            if value.dtype not in READ and (known is None or known[1].is_floating_point):
                types = ", ".join(str(one).removeprefix("torch.") for one in READ)
                raise CheckpointError(
                    f"{file}: {name} is {value.dtype}; weights are read in {types}"
                )
        require_finite(values, str(file))
        out |= values
    return out


def _loader(
    folder: Path,
    name: str,
    stored: Any,
    process: Process,
    view: View,
    dtype: torch.dtype | None,
) -> Loader:
    config = _config(folder, name, stored)
    shared = ("in_channels", "out_channels", "sample_size", "text_dim", "num_embeds_ada_norm")
    traits = {key: config[key] for key in shared if config.get(key) is not None}
    files = network_files(folder / name)
    read = partial(_load, _blueprint(config, folder / name, files), files, process, view, dtype)
    size = sum(file.stat().st_size for file in files)
    return Loader(MemberFacts(name, process, view, traits), read, size)


def _blueprint(config: Mapping[str, Any], folder: Path, files: Sequence[Path]) -> Blueprint:
    with torch.random.fork_rng(devices=[]):
        return Blueprint.of(new_network(config, folder, files))


def _class_of(kind: object, where: str) -> Any:
    """The class of networks of this name; ConfigError unless diffusers has it."""
    try:
        import diffusers
    except ImportError:
        raise ConfigError("diffusers: not installed; pip install 'coterie[interop]'") from None
    found = getattr(diffusers, str(kind), None)
    if not (isinstance(found, type) and issubclass(found, diffusers.ModelMixin)):
        raise ConfigError(describe(f"{where}_class_name", kind, "a model of diffusers"))
    return found


def new_network(
    config: Mapping[str, Any], folder: Path | None = None, files: Sequence[Path] = ()
) -> nn.Module:
    """The network that the ``config.json`` of ``folder`` describes, with fresh weights; ConfigError
    unless that is a model of diffusers, and no larger than this machine's memory and what its
    ``files`` of weights can hold: counted from shapes, before anything is allocated."""
    where = "" if folder is None else f"{folder / 'config.json'}: "
    kind = config.get("_class_name")
    found = _class_of(kind, where)
    known = inspect.signature(found.__init__).parameters
    for name, value in config.items():
        if not name.startswith("_") and name not in known and value is not None:
            hint = "what it does to the network is not known"
            raise ConfigError(describe(f"{where}{kind}.{name}", value, f"fields of {kind}", hint))
    convention_for(found, config)
    limit, whose = memory.memory_bytes(), memory.MACHINE
    stored = max(SMALL, FROM_FILE * sum(file.stat().st_size for file in files))
    if files and stored < limit:
        limit, whose = stored, f"{memory.size(SMALL)} or {FROM_FILE} times {files[0].name}"

    def build() -> nn.Module:
        made: nn.Module = found.from_config(dict(config))
        return made

    try:
        shapes = memory.on_meta(config, build, limit, whose)
        return shapes if torch.get_default_device().type == "meta" else build()
    except ConfigError as error:
        raise ConfigError(f"{where}{kind}: {error}") from None
    except Exception as error:
        reason = str(error).strip().splitlines()
        why = reason[0] if reason else repr(error)
        raise ConfigError(f"{where}{kind}: cannot be made: {why}") from None


def network_files(folder: Path) -> list[Path]:
    """The files of one network; CheckpointError names the first that is not there."""
    shards = folder / f"{WEIGHTS}.index.json"
    names = {WEIGHTS}
    if shards.is_file():
        places = read_json(shards).get("weight_map")
        if not isinstance(places, dict) or not places:
            raise CheckpointError(
                f"{shards}: weight_map: {places!r:.40}: not names with their files"
            )
        names = {str(name) for name in places.values()}
    for name in sorted(names):
        if Path(name).name != name or not (folder / name).is_file():
            raise CheckpointError(f"{folder / name}: missing; other formats are not read")
    return [folder / name for name in sorted(names)]


def _load(
    blueprint: Blueprint,
    files: list[Path],
    process: Process,
    view: View,
    dtype: torch.dtype | None,
) -> DiffusersDenoiser:
    kept = tuple(getattr(blueprint.model, "_keep_in_fp32_modules", None) or ())

    def cast(name: str, value: Tensor) -> Tensor:
        if dtype is None or not value.is_floating_point():
            return value
        return value.to(torch.float32 if any(part in name for part in kept) else dtype)

    network = blueprint.make(_weights(files, blueprint), str(files[0]), cast)
    return DiffusersDenoiser(network, process, view)
