"""An ensemble on disk: a file per member, read whole, one at a time, or one alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from exact_mixtures import whole
from torch import Tensor, nn

from coterie.backbones import DiTConfig, TrunkConfig
from coterie.core.errors import CheckpointError, ConfigError
from coterie.core.folder import MANIFEST
from coterie.core.prediction import Condition
from coterie.core.rng import SampleNoise
from coterie.core.tensors import read_tensors
from coterie.denoiser import DenoiserConfig
from coterie.ensembles import (
    ClusterRouterConfig,
    Ensemble,
    EnsembleModelConfig,
    LoadedMembers,
    MemberConfig,
    Members,
    MixtureConfig,
    NoiseRangesConfig,
    model_of,
)
from coterie.hub import (
    load_ensemble,
    load_expert,
    load_into,
    load_manifest,
    load_member,
    load_pretrained,
    load_tensors,
    save_ensemble,
    verify,
)
from coterie.solvers import GRIDS, SOLVERS, initial_noise, sample
from small_models import images, small, times, woken

TRUNK = TrunkConfig(width=16, depth=1, heads=2)
DENSE = DenoiserConfig(
    backbone=DiTConfig(image_size=8, patch=4, num_classes=0, trunk=TRUNK), view="flow"
)
OTHER = DENSE.replace(process="vp_linear", view="eps")


def net(config: Any, seed: int) -> Any:
    """A network with every parameter moved, as after some training."""
    torch.manual_seed(seed)
    model = config.build().eval()
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=rng))
    return model


def router(count: int) -> Any:
    backbone = DENSE.backbone.replace(num_classes=0)
    return net(ClusterRouterConfig(num_clusters=count, backbone=backbone), 50)


def mixed() -> Ensemble:
    """Two processes, three networks, a router."""
    members = {"a": net(DENSE, 1), "b": net(OTHER, 2), "c d": net(DENSE, 3)}
    return MixtureConfig(choice={"kind": "top_p", "p": 0.8}).build(members, router(3)).eval()


def staged(count: int = 4) -> Ensemble:
    edges = tuple(1 - index / count for index in range(1, count))
    return NoiseRangesConfig(boundaries=edges).build([net(DENSE, i) for i in range(count)]).eval()


def drawn(made: Any, num: int = 3) -> Tensor:
    x = initial_noise(made.process, (1, 8, 8), SampleNoise(range(num)))
    settings: dict[str, Any] = {
        "solver": SOLVERS.parse("dpmpp_2m"),
        "grid": GRIDS.parse("uniform"),
        "steps": 12,
    }
    return sample(made, x, Condition(), **settings)


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_round_trip_whole_and_one_by_one_is_exact(tmp_path: Path) -> None:
    made = mixed()
    folder = save_ensemble(made, tmp_path / "mix", data_licence="free")
    files = {f"members/0{i}.safetensors" for i in range(3)}
    assert names(folder) == {MANIFEST, "README.md", "router.safetensors", *files}
    assert verify(folder).members == sorted(files)
    assert "| c d | `members/02.safetensors` |" in (folder / "README.md").read_text("utf-8")
    expected = drawn(made)
    for loaded in (
        load_pretrained(folder),
        load_ensemble(folder),
        load_ensemble(folder, resident=1),
    ):
        assert isinstance(loaded, Ensemble) and loaded.config == made.config
        assert loaded.members.names == ("a", "b", "c d") and not loaded.training
        assert torch.equal(drawn(loaded), expected)


def test_one_member_is_loadable_alone_and_is_an_ordinary_file(tmp_path: Path) -> None:
    made = mixed()
    folder = save_ensemble(made, tmp_path / "mix")
    (folder / "members/00.safetensors").unlink()  # nobody else's files are looked at
    alone = load_member(folder, "b")
    original = made.members.get(1)
    assert isinstance(original, nn.Module)
    for name, value in original.state_dict().items():
        assert torch.equal(alone.state_dict()[name], value)
    assert set(read_tensors(folder / "members/01.safetensors")) == set(original.state_dict())
    with pytest.raises(ConfigError, match=r"member: 'B' is not allowed; allowed: a, b, c d"):
        load_member(folder, "B")


def test_members_with_experts_keep_a_file_per_expert(tmp_path: Path) -> None:
    first, second = woken(small("dit-moe"), 0), woken(small("dit-moe"), 1)
    made = NoiseRangesConfig(boundaries=(0.5,)).build([first, second]).eval()
    folder = save_ensemble(made, tmp_path / "ranges")
    manifest = load_manifest(folder)
    assert {path.split(".")[1] for path in manifest.pools} == {"0", "1"}
    pool = next(path for path in manifest.pools if path.startswith("networks.1."))
    stack = second.get_submodule(pool.removeprefix("networks.1."))
    for name, value in load_expert(folder, pool, 2).items():
        assert torch.equal(value, stack.expert_state(2)[name])
    tensors = load_tensors(folder)
    own = second.state_dict()
    key = next(name for name in own if name.startswith("backbone.patch_in"))
    assert torch.equal(tensors[f"networks.1.{key}"], own[key])
    batch, t = images(4, labels=[1, 2, 3, 4]), times(4)
    for loaded in (load_pretrained(folder), load_ensemble(folder, resident=1)):
        with torch.no_grad():
            answer, again = (one(batch.x, t, batch.cond) for one in (made, loaded))
        assert torch.equal(answer.value, again.value)
        assert {r.slot for r in answer.routings} == {r.slot for r in again.routings}


def test_a_ranged_ensemble_keeps_one_member_in_memory_and_gives_the_same_samples(
    tmp_path: Path,
) -> None:
    made = staged()
    folder = save_ensemble(made, tmp_path / "ranges")
    size = max((folder / file).stat().st_size for file in load_manifest(folder).members)
    expected = drawn(made)
    for prefetch, most in ((False, 1), (True, 2)):
        lazy = load_ensemble(folder, resident=1, prefetch=prefetch)
        members = lazy.members
        assert isinstance(members, LoadedMembers) and members.num_bytes == 0
        assert torch.equal(drawn(lazy), expected)
        assert members.peak_bytes <= most * size and members.loads == 4
        assert torch.equal(drawn(lazy), expected)  # again, from the files
    assert list(lazy.parameters()) == []


def test_reading_later_leaves_the_global_generator_alone(tmp_path: Path) -> None:
    folder = save_ensemble(staged(), tmp_path / "ranges")
    torch.manual_seed(7)
    before = torch.get_rng_state()
    drawn(load_ensemble(folder, resident=1))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_missing_member_is_left_out_by_name_and_damage_is_refused(tmp_path: Path) -> None:
    made = staged(3)
    folder = save_ensemble(made, tmp_path / "ranges")
    gone, hurt = shutil.copytree(folder, tmp_path / "gone"), tmp_path / "hurt"
    shutil.copytree(folder, hurt)
    (gone / "members/01.safetensors").unlink()
    for resident in (None, 1):
        with pytest.warns(UserWarning, match=r"without expert 1: .*01.safetensors is missing"):
            loaded = load_ensemble(gone, resident=resident)
        assert loaded.missing == ("expert 1",)
        assert bool(torch.isfinite(drawn(loaded)).all())
    target = hurt / "members/02.safetensors"
    data = bytearray(target.read_bytes())
    data[-5] ^= 1
    target.write_bytes(bytes(data))
    with pytest.raises(CheckpointError, match=r"02.safetensors: damaged.*SHA-256"):
        load_ensemble(hurt)
    lazy = load_ensemble(hurt, resident=1)  # it is found out when it is needed
    with pytest.raises(CheckpointError, match=r"02.safetensors: damaged"):
        drawn(lazy)
    with pytest.warns(UserWarning, match=r"without expert 2: .*damaged"):
        assert load_ensemble(hurt, degraded=True).missing == ("expert 2",)
    target.write_bytes(bytes(data[:-10]))
    with pytest.raises(CheckpointError, match="bytes instead of"):
        load_ensemble(hurt, resident=1)


def test_an_ensemble_saved_without_a_member_stays_without(tmp_path: Path) -> None:
    networks = {"a": net(DENSE, 1), "island-1": None, "c": net(DENSE, 3)}
    with pytest.warns(UserWarning, match="island-1"):
        made = MixtureConfig().build(Members(networks, {"island-1": "not trained"}), router(3))
    folder = save_ensemble(made.eval(), tmp_path / "partial")
    assert len(load_manifest(folder).members) == 2
    for resident in (None, 1):
        with pytest.warns(UserWarning, match="without island-1: not trained"):
            loaded = load_ensemble(folder, resident=resident)
        assert loaded.members.names == ("a", "island-1", "c")
        assert torch.equal(drawn(loaded), drawn(made))


def test_weights_load_into_an_ensemble_of_the_same_shape(tmp_path: Path) -> None:
    made = mixed()
    folder = save_ensemble(made, tmp_path / "mix")
    torch.manual_seed(9)
    other = model_of(made).build()
    assert not torch.equal(drawn(other), drawn(made))
    assert load_into(other, folder) == []
    assert torch.equal(drawn(other), drawn(made))


def test_one_network_twice_is_stored_twice(tmp_path: Path) -> None:
    model = net(DENSE, 1)
    made = NoiseRangesConfig(boundaries=(0.5,)).build({"x": model, "y": model}).eval()
    folder = save_ensemble(made, tmp_path / "twice")
    assert torch.equal(drawn(load_ensemble(folder)), drawn(made))


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (
            DENSE.replace(backbone=DENSE.backbone.replace(image_size=12)),
            r"members\.b\.sample_shape: \(1, 12, 12\).*\(1, 8, 8\).*'a' has",
        ),
        (
            DENSE.replace(backbone=DENSE.backbone.replace(num_classes=3)),
            r"members\.b\.num_classes: 3.*'a' has 0",
        ),
    ],
)
def test_members_of_other_data_are_refused_by_name(other: Any, words: str) -> None:
    config = EnsembleModelConfig(
        ensemble=NoiseRangesConfig(boundaries=(0.5,)),
        members=(MemberConfig(name="a", model=DENSE), MemberConfig(name="b", model=other)),
    )
    with pytest.raises(ConfigError, match=words):
        config.build()


def test_members_of_another_latent_space_are_refused_by_name(tmp_path: Path) -> None:
    def config(space: str) -> EnsembleModelConfig:
        first = MemberConfig(name="a", model=DENSE, space="vae-1")
        members = (first, MemberConfig(name="b", model=DENSE, space=space))
        return EnsembleModelConfig(ensemble=NoiseRangesConfig(boundaries=(0.5,)), members=members)

    with pytest.raises(ConfigError, match=r"members\.b\.space: 'vae-2'.*'vae-1'"):
        config("vae-2").build()
    folder = save_ensemble(config("vae-1").build(), tmp_path / "same")
    assert load_ensemble(folder, resident=1).members.facts[1].traits["space"] == "vae-1"


def test_what_cannot_be_saved_or_loaded_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"members\.expert 0: 'ExactDenoiser'"):
        save_ensemble(NoiseRangesConfig().build([whole()]), tmp_path / "exact")
    folder = save_ensemble(staged(2), tmp_path / "ranges")
    with pytest.raises(ConfigError, match=r"members in memory.*copy"):
        save_ensemble(load_ensemble(folder, resident=1), tmp_path / "again")
    manifest = folder / MANIFEST
    data = json.loads(manifest.read_text("utf-8"))
    data["members"].pop()
    manifest.write_text(json.dumps(data, indent=1, sort_keys=True) + "\n", "utf-8")
    with pytest.raises(CheckpointError, match="digest"):
        load_ensemble(folder)
