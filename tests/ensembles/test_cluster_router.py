"""A router network learns the posterior of the clusters from x_t; nothing tells it the answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from coterie.backbones import DiTConfig, TrunkConfig
from coterie.core.batch import Batch
from coterie.core.errors import ConfigError, DataError
from coterie.core.prediction import Condition
from coterie.denoiser import MODELS, DenoiserConfig
from coterie.ensembles import ClusterRouterConfig, ExactPosterior, MixtureConfig, split_mixture
from coterie.hub import load_pretrained
from coterie.process import PROCESSES, ExactDenoiser, Mixture
from coterie.runs.config import RunConfig
from coterie.runs.trained_run import load_run
from coterie.runs.training import start
from coterie.train import TrainConfig, Trainer
from coterie.train.objectives import OBJECTIVES, ClusterPosteriorConfig

SHAPE = (1, 4, 4)
MEANS = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(5))
DATA = Mixture(MEANS, torch.tensor([0.3, 0.3, 0.3]), torch.tensor([0.6, 0.3, 0.1]))
CLUSTERS = (0, 1, 2)
BACKBONE = DiTConfig(
    image_size=4, patch=2, num_classes=0, trunk=TrunkConfig(width=32, depth=2, heads=2)
)


class Blobs:
    """Samples of the mixture; each knows its component as its task."""

    name, modality, shape, licence = "blobs", "image", SHAPE, "none"
    num_classes, class_names, task_names = 0, (), ("a", "b", "c")

    def __init__(self, count: int = 2000) -> None:
        self.x, self.task = DATA.sample(count, torch.Generator().manual_seed(1))

    def __len__(self) -> int:
        return len(self.x)

    def get(self, indices: Any) -> Batch:
        ids = torch.as_tensor(indices)
        return Batch(self.x[ids], Condition(task=self.task[ids]), ids)


def router_config(**fields: Any) -> ClusterRouterConfig:
    return ClusterRouterConfig(num_clusters=3, backbone=BACKBONE, **fields)


def batch_of(count: int = 12) -> Batch:
    return Blobs(64).get(torch.arange(count))


@pytest.fixture(scope="module")
def trained() -> Any:
    torch.manual_seed(0)
    model = router_config().build()
    objective = ClusterPosteriorConfig().build(model)
    train = TrainConfig(steps=220, batch=64, lr=2e-3, ema=(0.98,), threads=1, device="cpu")
    trainer = Trainer(train, model, objective, Blobs(), seed=0)
    trainer.fit(progress=False)
    with trainer.averaged():
        state = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(state)
    return model.eval()


def test_a_trained_router_is_near_the_exact_posterior_and_joins_the_experts(trained: Any) -> None:
    process, rng = trained.process, torch.Generator().manual_seed(9)
    x0, _ = DATA.sample(400, rng)
    t = torch.linspace(0.02, 0.99, 400)
    x = process.diffuse(x0, torch.randn(x0.shape, generator=rng), t)
    exact = ExactPosterior(process, DATA, CLUSTERS)(x, t, Condition()).softmax(1)
    with torch.no_grad():
        found = trained(x, t, Condition()).value.softmax(1)
    assert float((found - exact).abs().sum(1).mean()) < 0.2  # 0.9 for the prior alone
    prior = DATA.weights.expand(400, 3)
    assert float((prior - exact).abs().sum(1).mean()) > 0.6
    experts = [ExactDenoiser(process, part) for part in split_mixture(DATA, CLUSTERS)[0]]
    ensemble = MixtureConfig().build(experts, trained)
    goal = ExactDenoiser(process, DATA)(x, t, Condition()).value
    with torch.no_grad():
        error = (ensemble(x, t, Condition()).value - goal).square().mean()
    alone = (experts[0](x, t, Condition()).value - goal).square().mean()
    assert float(error) < 0.15 * float(alone)
    assert trained in list(ensemble.modules())


def test_the_objective_is_cross_entropy_of_the_cluster_from_the_noisy_sample() -> None:
    torch.manual_seed(0)
    model, batch = router_config().build(), batch_of()
    seen: list[Condition] = []

    class Told(torch.nn.Module):
        config, process = model.config, model.process

        def forward(self, x: Tensor, t: Tensor, cond: Condition, **options: Any) -> Any:
            seen.append(cond)
            return model(x, t, cond, **options)

        aux_losses = staticmethod(model.aux_losses)

    objective = ClusterPosteriorConfig(label_dropout=0.0).build(model)
    losses = objective(Told(), batch, torch.Generator().manual_seed(4), 1.0)
    assert seen[0].task is None  # never shown
    rng = torch.Generator().manual_seed(4)
    t = objective.times.sample(12, rng)
    x_t = model.process.diffuse(batch.x, torch.randn(batch.x.shape, generator=rng), t)
    logits = model(x_t, t, Condition()).value
    assert batch.cond.task is not None and losses.per_sample is not None
    expected = -logits.log_softmax(1)[torch.arange(12), batch.cond.task]
    torch.testing.assert_close(losses.per_sample, expected.detach())
    torch.testing.assert_close(losses.total, expected.mean())
    assert losses.extras["accuracy"] == (logits.argmax(1) == batch.cond.task).float().mean()


@torch.no_grad()
def test_a_router_reads_the_noise_level_and_not_the_answer(trained: Any) -> None:
    torch.manual_seed(0)
    batch, t = batch_of(), torch.linspace(0.1, 0.9, 12)
    new = router_config().build()(batch.x, t, Condition()).value
    assert float(new.std()) < 0.5  # probabilities near 1 / K at the start
    told, plain = trained(batch.x, t, batch.cond).value, trained(batch.x, t, Condition()).value
    assert torch.equal(told, plain)
    assert told.shape == (12, 3) and told.dtype == torch.float32
    assert float((told - trained(batch.x, t.flip(0), Condition()).value).abs().max()) > 0.1


def test_preconditioning_scales_the_input() -> None:
    torch.manual_seed(0)
    model = router_config(process="ve", precondition={"kind": "edm", "sigma_data": 1.0}).build()
    x, t = 80.0 * torch.randn(4, *SHAPE), torch.full((4,), 80.0)
    inputs: list[Tensor] = []
    model.backbone.patch_in.register_forward_pre_hook(lambda m, args: inputs.append(args[0]))
    model(x, t, Condition())
    assert 0.5 < float(inputs[0].std()) < 2.0


@pytest.mark.parametrize(
    ("cond", "words"),
    [
        (Condition(), r"cond\.task: None.*clusters 0\.\.2"),
        (Condition(task=torch.full((12,), 3)), r"cond\.task: \[3\].*0\.\.2"),
    ],
)
def test_samples_without_a_cluster_are_refused(cond: Condition, words: str) -> None:
    model, batch = router_config().build(), batch_of()
    objective = ClusterPosteriorConfig().build(model)
    with pytest.raises(DataError, match=words):
        objective(model, Batch(batch.x, cond, batch.ids), torch.Generator(), 1.0)


def test_the_class_may_be_the_cluster() -> None:
    model, batch = router_config().build(), batch_of()
    labelled = Batch(batch.x, Condition(label=batch.cond.task), batch.ids)
    by_label = ClusterPosteriorConfig(cluster="label").build(model)
    by_task = ClusterPosteriorConfig().build(model)
    first = by_label(model, labelled, torch.Generator().manual_seed(0), 1.0)
    second = by_task(model, batch, torch.Generator().manual_seed(0), 1.0)
    assert torch.equal(first.total, second.total)


def test_a_router_of_another_number_of_clusters_is_refused() -> None:
    experts = [ExactDenoiser(PROCESSES.parse("rectified_flow").build(), DATA)] * 2
    with pytest.raises(ConfigError, match=r"router\.num_clusters: 3.*2"):
        MixtureConfig().build(experts, router_config().build())


def test_a_run_trains_a_router(tmp_path: Path) -> None:
    config = RunConfig(
        data="digits",
        model=ClusterRouterConfig(
            num_clusters=10, backbone=BACKBONE.replace(image_size=8, patch=4)
        ),
        objective=ClusterPosteriorConfig(cluster="label"),
        train=TrainConfig(steps=2, batch=8, threads=1, device="cpu"),
    )
    folder = start(config, tmp_path / "router", progress=False)
    loaded, again = load_run(folder).model, load_pretrained(folder / "model")
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([0.2, 0.8])
    assert torch.equal(loaded(x, t, Condition()).value, again(x, t, Condition()).value)


def test_what_is_no_router_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"model: .denoiser.*cluster_router"):
        ClusterPosteriorConfig().build(DenoiserConfig().build())
    with pytest.raises(ConfigError, match=r"backbone: .points.*dit"):
        ClusterRouterConfig.from_dict({"backbone": {"kind": "points"}})


def test_router_and_objective_are_registered() -> None:
    config = router_config(process="vp_linear")
    assert MODELS.parse(config.model_dump(mode="json")) == config
    assert OBJECTIVES.parse("cluster_posterior") == ClusterPosteriorConfig()
