"""Every kind of file that the library reads: how a valid one is written, and what reads it.

A new kind is one line of ``KINDS``. ``hashed``: the format carries hashes, so whatever is read must
be what was written.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from coterie.adapters import LoraConfig, attach, read_adapter, save_adapter
from coterie.convert import UpcycleConfig
from coterie.core.config import Config
from coterie.core.errors import CheckpointError, DataError
from coterie.core.tensors import module_tensors, read_tensors, write_tensors
from coterie.data import Subset, build_source
from coterie.data.download.cache import open_array, problem, save_array, write_folder
from coterie.data.images.downloads import read_idx
from coterie.data.images.pictures import read_picture
from coterie.data.parts.shard import write_shard
from coterie.data.points.meshes import read_obj, sample_surface
from coterie.data.ratings.movielens import read_table
from coterie.data.source import SPLITS
from coterie.ensembles import NoiseRangesConfig
from coterie.hub import load_ensemble, load_pretrained, save_ensemble, save_pretrained
from coterie.inspect.page.placement_table import placement_outputs
from coterie.interop.diffusers import load_noise_ranges
from coterie.interop.diffusers.expert import DiffusersConfig
from coterie.interop.transformers.moe_folder import ModelFolder
from coterie.interop.transformers.text import read_tokens
from coterie.interop.upcycled import load_upcycled, save_upcycled, upcycle_transformers
from coterie.runs.config import RunConfig
from coterie.runs.islands.partition import PartitionConfig, copy_partition, read_partition
from coterie.runs.islands.plan import FILE, IslandEntry, IslandPlan, read_plan
from coterie.runs.sample.restoration import outputs_at as restored_at
from coterie.runs.sample.sample_files import outputs_at
from coterie.train import checkpoint, read_metrics
from small_models import small, woken


@dataclass(frozen=True)
class Kind:
    write: Callable[[Path], Any]  # into an empty folder
    read: Callable[[Path], Any]
    hashed: bool = False
    packaged: bool = False  # what is read are bytes out of a package, never a file on disk
    examples: int = 60  # in the ordinary suite


def content(value: Any) -> str:
    """A digest of what was read: tensors, arrays, configurations and whatever holds them."""
    return hashlib.sha256(_text(value).encode("utf-8", "backslashreplace")).hexdigest()


def _text(value: Any) -> str:
    if isinstance(value, Tensor):
        return _text(value.detach().float().numpy() if value.is_floating_point() else value.numpy())
    if isinstance(value, np.ndarray):
        data = np.ascontiguousarray(value)
        return f"{data.dtype}{data.shape}{hashlib.sha256(data.tobytes()).hexdigest()}"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_text(value[key])}" for key in sorted(value)) + "}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_text, value))}]"
    if isinstance(value, nn.Module):
        return _text(module_tensors(value, borrowed=True))
    return value.to_json() if isinstance(value, Config) else repr(value)


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def picture(suffix: str, dtype: Any = np.uint8, channels: int = 3, top: float = 255) -> Kind:
    def write(folder: Path) -> None:
        shape = (9, 7, channels) if channels > 1 else (9, 7)
        values = (rng().uniform(size=shape) * top).astype(dtype)
        Image.fromarray(values).save(folder / f"x.{suffix}")

    return Kind(write, lambda folder: read_picture(folder / f"x.{suffix}"))


def write_pictures(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng().integers(0, 255, (10, 10, 3), dtype=np.uint8)).save(folder / name)


def samples(config: dict[str, Any]) -> Any:
    source = build_source({"held_out_one_in": 1000, **config} if "size" in config else config)
    batch = source.get(np.arange(min(len(source), 8)))
    return list(source.class_names), batch.x, batch.cond.tensors()


def source_of(kind: str, **options: Any) -> Callable[[Path], Any]:
    return lambda folder: samples({"kind": kind, "path": str(folder), **options})


def write_latents(folder: Path) -> None:
    np.save(folder / "latents.npy", rng().normal(size=(12, 2, 4, 4)).astype(np.float16))
    np.save(folder / "labels.npy", np.arange(12))


def write_clouds(folder: Path) -> None:
    for name in ("ball", "cube"):
        (folder / name).mkdir()
        for index in range(2):
            np.save(folder / name / f"{index}.npy", rng().normal(size=(20, 3)).astype(np.float32))


def write_episodes(folder: Path) -> None:
    np.savez_compressed(
        folder / "x.npz",
        observations=rng().normal(size=(20, 3)).astype(np.float32),
        actions=rng().uniform(-1, 1, size=(20, 2)),
        lengths=np.full(5, 4),
        goals=np.arange(5) % 2,
    )


MESH = "v 0 0 0\nv 1 0 0\nv 0 1 0\nv 0 0 1\nf 1 2 3\nf 1//1 2/2 -1\n"


def read_mesh(folder: Path) -> Any:
    triangles = read_obj((folder / "x.obj").read_bytes(), "x.obj")
    return triangles, sample_surface(triangles, 5, rng())


def read_cached(folder: Path) -> Any:
    why = problem(folder / "set", deep=True)
    if why is not None:
        raise DataError(why)
    return open_array(folder / "set", "x")


def write_digits_shard(folder: Path) -> None:
    parts: Any = {split: Subset(build_source("digits", split), [0, 5, 9]) for split in SPLITS}
    write_shard(parts, folder / "shard")


CUT = PartitionConfig(islands=2, by="random")
DATA = RunConfig().data


def write_plan(folder: Path) -> None:
    entries = tuple(
        IslandEntry(index=index, folder=f"island-{index}", samples=5, sha256="0" * 64)
        for index in range(2)
    )
    made = IslandPlan(
        base=small("dit-moe"), partition=CUT, cut="0" * 64, budget="batch", islands=entries
    )
    (folder / FILE).write_text(made.to_json(), encoding="utf-8")


def read_cut(folder: Path) -> Any:
    found = read_partition(folder / "cut", DATA, CUT)
    return found.train, found.held_out


def write_checkpoint(folder: Path) -> None:
    state = {"model": {"a": torch.arange(6.0), "b": torch.zeros(2, 3)}, "ema": {"a": torch.ones(6)}}
    checkpoint.save(folder, state, {"samples_seen": 12}, step=7)


def read_checkpoint(folder: Path) -> Any:
    found = checkpoint.load(folder / "checkpoints" / "step-00000007")
    return found.step, found.state, found.scalars


def write_model(folder: Path) -> None:
    config = small("dit-moe")
    save_pretrained(woken(config), folder / "model", config.model.model_dump(mode="json"))


def write_ensemble(folder: Path) -> None:
    dense = small("dit-moe")
    pair = [woken(dense, seed) for seed in (0, 1)]
    save_ensemble(NoiseRangesConfig(boundaries=(0.5,)).build(pair).eval(), folder / "model")


def read_ensemble(folder: Path) -> Any:
    """Whole: a member that is not there is left out by those who allow it."""
    found = load_ensemble(folder / "model")
    if found.missing:
        raise CheckpointError("a member is not there")
    return found


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 6), nn.Linear(6, 4)


def write_adapter(folder: Path) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = Net()
        attach(net, "mine", LoraConfig(targets=("*",), rank=2))
        save_adapter(net, "mine", folder / "adapter")


def read_lora(folder: Path) -> Any:
    found = read_adapter(folder / "adapter")
    return found.config, found.factors, found.tables


def write_mixtral(folder: Path) -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=300, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, num_local_experts=2,
        max_position_embeddings=16, num_experts_per_tok=1,
    )  # fmt: skip
    MixtralForCausalLM(config).save_pretrained(folder)


def read_mixtral(folder: Path) -> Any:
    return ModelFolder.open(folder).load(device="cpu")


def write_upcycled(folder: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=16,
    )  # fmt: skip
    plan = UpcycleConfig(copies=2)
    made = upcycle_transformers(LlamaForCausalLM(config), plan)
    save_upcycled(made, folder / "model", upcycle=plan)


def write_book(folder: Path) -> None:
    write_mixtral(folder / "model")
    (folder / "x.txt").write_text("One expert reads this sentence. " * 5, encoding="utf-8")


def read_book(folder: Path) -> Any:
    return read_tokens(ModelFolder.open(folder / "model"), folder / "x.txt", 40).ids


SAMPLES = '[{"index": 0, "label": 1, "seed": 5, "file": "00000.png", "sheets": ["grid.png"]}]'


def read_samples(folder: Path) -> Any:
    return sorted(outputs_at(folder).earlier)


RESTORED = '{"run": "../run", "step": 2, "weights": "ema", "overlap": 4, "files": {"a.png": "0"}}'


def write_placed(folder: Path) -> None:
    write_pictures(folder, "placement.png")
    (folder / "placement.json").write_text('{"run": "a", "cost": {"per_row": 1.5}, "rows": []}')


UNET = {
    "sample_size": 8, "in_channels": 1, "out_channels": 1, "block_out_channels": (4, 4),
    "layers_per_block": 1, "norm_num_groups": 2, "attention_head_dim": 4,
    "down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2,
}  # fmt: skip


def network(seed: int) -> Any:
    import diffusers

    torch.manual_seed(seed)
    return diffusers.UNet2DModel(**UNET)


def write_pipeline(folder: Path) -> None:
    import diffusers

    diffusers.DDPMPipeline(network(0), diffusers.DDPMScheduler()).save_pretrained(folder)


def read_pipeline(folder: Path) -> Any:
    return load_noise_ranges(folder).members.get(0)


def read_network(folder: Path) -> Any:
    config = {"path": str(folder), "process": "ddpm", "view": "eps"}
    return DiffusersConfig.from_dict(config).build()


def text(name: str, value: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_text(value, encoding="utf-8")


TABLE = "user\titem\n" + "".join(f"{index}\t{index * 7}\n" for index in range(20))
IDX = bytes([0, 0, 8, 3]) + np.array([2, 3, 4], ">u4").tobytes() + bytes(range(24))
LOG = "".join(f'{{"step": {step}, "loss": {1 / (step + 1)}}}\n' for step in range(1, 9))

KINDS: dict[str, Kind] = {
    "png": picture("png"),
    "png-16": picture("png", np.uint16, 1, 65535),
    "png-alpha": picture("png", channels=4),
    "jpeg": picture("jpg"),
    "webp": picture("webp"),
    "tiff": picture("tif"),
    "tiff-float": picture("tif", np.float32, 1, 1),
    "bmp": picture("bmp"),
    "gif": picture("gif"),
    "ppm": picture("ppm"),
    "image-folder": Kind(
        lambda folder: write_pictures(folder, "a/0.png", "a/1.jpg", "b/0.gif"),
        source_of("image-folder", size=8),
    ),
    "pairs-folder": Kind(
        lambda folder: write_pictures(folder, "rain/input/0.png", "rain/gt/0.png"),
        source_of("pairs-folder", size=8),
    ),
    "latents": Kind(write_latents, source_of("latents")),
    "cloud-folder": Kind(write_clouds, source_of("cloud-folder", num_points=8)),
    "demonstrations": Kind(
        write_episodes, lambda folder: source_of("demonstrations")(folder / "x.npz")
    ),
    "mesh": Kind(text("x.obj", MESH), read_mesh, packaged=True),
    "idx": Kind(
        lambda folder: (folder / "x").write_bytes(IDX),
        lambda folder: read_idx((folder / "x").read_bytes()),
        packaged=True,
    ),
    "ratings": Kind(
        text("x.tsv", TABLE),
        lambda folder: read_table((folder / "x.tsv").read_bytes(), "x", 2),
        packaged=True,
    ),
    "configuration": Kind(
        lambda folder: text("config.json", small("dit-moe").to_json())(folder),
        lambda folder: RunConfig.load(folder / "config.json"),
    ),
    "metrics": Kind(
        text("metrics.jsonl", LOG), lambda folder: read_metrics(folder / "metrics.jsonl")
    ),
    "island-plan": Kind(write_plan, read_plan),
    "partition": Kind(
        lambda folder: copy_partition(DATA, CUT, folder / "cut"), read_cut, hashed=True
    ),
    "cached-set": Kind(
        lambda folder: write_folder(
            folder / "set", lambda work: save_array(work, "x", rng().normal(size=50))
        ),
        read_cached,
        hashed=True,
    ),
    "shard": Kind(
        write_digits_shard,
        lambda folder: source_of("shard")(folder / "shard"),
        hashed=True,
    ),
    "checkpoint": Kind(write_checkpoint, read_checkpoint, hashed=True),
    "safetensors": Kind(
        lambda folder: write_tensors(folder / "x.safetensors", {"a": torch.arange(6.0)}),
        lambda folder: read_tensors(folder / "x.safetensors"),
    ),
    "model": Kind(
        write_model, lambda folder: load_pretrained(folder / "model"), hashed=True, examples=20
    ),
    "ensemble": Kind(write_ensemble, read_ensemble, hashed=True, examples=20),
    "adapter": Kind(write_adapter, read_lora, hashed=True),
    "transformers": Kind(write_mixtral, read_mixtral, examples=20),
    "upcycled": Kind(
        write_upcycled, lambda folder: load_upcycled(folder / "model"), hashed=True, examples=20
    ),
    "text": Kind(write_book, read_book, examples=20),
    "samples": Kind(text("samples.json", SAMPLES), read_samples),
    "restored": Kind(
        text("restored.json", RESTORED), lambda folder: sorted(restored_at(folder).earlier)
    ),
    "placement": Kind(write_placed, lambda folder: sorted(placement_outputs(folder).earlier)),
    "diffusers": Kind(lambda folder: network(0).save_pretrained(folder), read_network, examples=20),
    "diffusers-pipeline": Kind(write_pipeline, read_pipeline, examples=20),
}
