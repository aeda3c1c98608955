"""A pipeline directory of diffusers whose denoisers share the noise levels, as one ensemble.

    ranges = load_noise_ranges("Wan2.2-T2V-A14B", guidance_scale=4.0, guidance_scale_2=3.0)

``model_index.json`` names the networks (``transformer``, ``transformer_2``, or ``unet``) and where
the second takes over (``boundary_ratio``); the scheduler's configuration names the process and what
the networks predict. Encoders of text and pictures are not loaded: conditions come as embeddings.
Of two networks, one is in memory at a time and the other is read meanwhile.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor, nn

from coterie.backbones import unet_layers
from coterie.backbones.taps import Layers, Topology
from coterie.core.errors import CheckpointError, ConfigError, describe, unknown
from coterie.core.folder import read_object
from coterie.core.prediction import Condition, Prediction, View, check_times
from coterie.core.registry import Part
from coterie.core.tensors import copy_tensors
from coterie.ensembles import LoadedMembers, Loader, MemberFacts, NoiseRanges, NoiseRangesConfig
from coterie.ensembles.blueprint import Blueprint
from coterie.interop.diffusers.facts import takes
from coterie.interop.diffusers.unet import told_of, topology
from coterie.process import PROCESSES, Process, discrete

INDEX = "model_index.json"
NETWORKS = ("transformer", "unet")
"""Names of the network of the noisiest range; the next one's ends in ``_2``."""
VIEWS_THERE: dict[str, View] = {
    "epsilon": "eps",
    "sample": "x0",
    "v_prediction": "v",
    "flow_prediction": "flow",
}
WEIGHTS = "diffusion_pytorch_model.safetensors"
FLOW = "FlowMatch"  # begins the names of schedulers that know flows only


class DiffusersDenoiser(nn.Module):
    """A network of diffusers with its process and view is a denoiser.

    ``cond.tokens`` go to ``encoder_hidden_states``, ``cond.label`` to ``class_labels``,
    ``cond.channels`` are concatenated to x. Learnt variances come as further channels.
    """

    def __init__(self, network: nn.Module, process: Process, view: View) -> None:
        super().__init__()
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
        check_times(t, len(x))
        cond = self._told(x, cond)
        given: dict[str, Any] = {"timestep": self.process.time_input(t)}
        for name, value in {
            "encoder_hidden_states": cond.tokens,
            "encoder_attention_mask": cond.tokens_mask,
            "class_labels": cond.label,
        }.items():
            if value is not None and takes(self.network, name):
                given[name] = value
        (value,) = self.network(self._stacked(x, cond), **given, return_dict=False)
        return self._answer(x, value)

    def topology(self) -> Topology:
        """Of a U-Net; ConfigError for others (see :mod:`coterie.backbones.unet_layers`)."""
        return topology(self.network)

    def layers(
        self, x: Tensor, t: Tensor, cond: Condition, sample_ids: Tensor | None = None
    ) -> Layers[Prediction]:
        """:meth:`forward` of a U-Net layer by layer; see :mod:`coterie.backbones.taps`."""
        check_times(t, len(x))
        cond = self._told(x, cond)
        stacked = self._stacked(x, cond)
        told = told_of(self.network, stacked, self.process.time_input(t), cond)
        value = yield from unet_layers.layers(self.network, stacked, told)
        return self._answer(x, value)

    def _told(self, x: Tensor, cond: Condition) -> Condition:
        """The condition as the network reads it."""
        return cond

    def _stacked(self, x: Tensor, cond: Condition) -> Tensor:
        dtype: torch.dtype = self.network.dtype  # type: ignore[assignment]
        both = x if cond.channels is None else torch.cat([x, cond.channels.to(x)], dim=1)
        return both.to(dtype)

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
    part, view = scheduler_process(folder)
    process = part.build()
    ratio = index.get("boundary_ratio")
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
    given = {name for name, value in index.items() if isinstance(value, list) and value[0]}
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
    return {**read_json(folder / name / "config.json"), "_class_name": str(kind)}


def read_network(folder: Path, config: Mapping[str, Any]) -> nn.Module:
    """A network of diffusers with the weights in ``folder``, as stored, in eval mode."""
    blueprint, files = _blueprint(config), network_files(folder)
    values = {key: value for file in files for key, value in copy_tensors(file).items()}
    return blueprint.make(values, str(files[0]))


def scheduler_process(folder: Path) -> tuple[Part, View]:
    """Configuration of the process, and the view, from the scheduler's."""
    path = folder / "scheduler" / "scheduler_config.json"
    facts = read_json(path)
    kind = str(facts.get("_class_name", ""))
    told = "flow_prediction" if kind.startswith(FLOW) else facts.get("prediction_type", "epsilon")
    if told not in VIEWS_THERE:
        raise ConfigError(unknown(f"{path}: prediction_type", str(told), VIEWS_THERE))
    view = VIEWS_THERE[told]
    steps = int(facts.get("num_train_timesteps", 1000))
    if view == "flow":
        # The scheduler's shift moves its steps; what the network sees is 1000 sigma either way.
        return PROCESSES.parse({"kind": "rectified_flow", "num_steps": steps}), view
    schedule = str(facts.get("beta_schedule", "linear"))
    known = {"linear": "linear", "scaled_linear": "scaled_linear", "squaredcos_cap_v2": "cosine"}
    if schedule not in known:
        raise ConfigError(unknown(f"{path}: beta_schedule", schedule, known))
    fields: dict[str, Any] = {"schedule": known[schedule], "num_steps": steps}
    if known[schedule] != "cosine":
        fields |= {"beta_start": facts.get("beta_start"), "beta_end": facts.get("beta_end")}
    return discrete.DDPMConfig.from_dict(fields), view


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
    read = partial(_load, _blueprint(config), files, process, view, dtype)
    size = sum(file.stat().st_size for file in files)
    return Loader(MemberFacts(name, process, view, traits), read, size)


def _blueprint(config: Mapping[str, Any]) -> Blueprint:
    with torch.random.fork_rng(devices=[]):
        return Blueprint.of(new_network(config))


def new_network(config: Mapping[str, Any]) -> nn.Module:
    """The network that its ``config.json`` describes, with fresh weights; ConfigError unless that
    is a model of diffusers."""
    try:
        import diffusers
    except ImportError:
        raise ConfigError("diffusers: not installed; pip install 'coterie[diffusers]'") from None
    kind = config.get("_class_name")
    found = getattr(diffusers, str(kind), None)
    if not (isinstance(found, type) and issubclass(found, diffusers.ModelMixin)):
        raise ConfigError(describe("_class_name", kind, "a model of diffusers"))
    made: nn.Module = found.from_config(dict(config))
    return made


def network_files(folder: Path) -> list[Path]:
    """The files of one network; CheckpointError names the first that is not there."""
    shards = folder / f"{WEIGHTS}.index.json"
    names = {WEIGHTS}
    if shards.is_file():
        names = {str(name) for name in dict(read_json(shards).get("weight_map", {})).values()}
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

    values = {name: value for file in files for name, value in copy_tensors(file).items()}
    return DiffusersDenoiser(blueprint.make(values, str(files[0]), cast), process, view)
