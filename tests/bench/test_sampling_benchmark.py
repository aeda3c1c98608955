"""What the benchmarks of sampling and caches compare; their times are checked by nobody."""

from __future__ import annotations

import pytest
import torch

from coterie.bench import cache
from coterie.bench.live_memory import LiveBytes
from coterie.bench.sampling import activation_bytes, memory
from coterie.bench.sampling_cases import CASES, Setup, products
from coterie.bench.timing import Place


@pytest.fixture(scope="module")
def setup() -> Setup:
    return Setup(CASES["tiny"])


@torch.no_grad()
def test_diffusers_runs_the_same_network_to_the_same_sample(setup: Setup) -> None:
    pytest.importorskip("diffusers")
    from coterie.bench.sampling_peers import DDIM, diffusers_network, diffusers_runs

    network = diffusers_network(setup)
    x, t, cond = setup.call()
    index = setup.model.process.time_input(t).round().long()
    labels = torch.where(cond.tensors()["label"] < 0, 10, cond.tensors()["label"])
    theirs = network(x, timestep=index, class_labels=labels).sample
    torch.testing.assert_close(setup.model(x, t, cond).value, theirs, atol=1e-5, rtol=1e-5)
    ours = setup.run(setup.model, steps=5)
    torch.testing.assert_close(diffusers_runs(setup)[DDIM](5), ours, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_memory_of_a_run_is_what_its_shapes_say(setup: Setup) -> None:
    below, above = memory(setup)
    assert below["met"] and above["met"]
    assert above["counted"] == activation_bytes(setup.case)
    with LiveBytes() as live:
        x = torch.zeros(1000)
        y = x + 1
        del x
        y.add_(1)
        z = y * 2
        del y
    assert live.peak == 8000 and live.now == 4000
    del z


@torch.no_grad()
def test_products_are_those_of_the_network(setup: Setup) -> None:
    from coterie.cache import count_flops

    linear, _ = products(setup)
    assert count_flops(linear) == count_flops(setup.model, *setup.call())


@torch.no_grad()
def test_folded_layers_answer_what_the_routed_one_does() -> None:
    routed, kept, ctx = cache._layers(4)
    x = torch.randn(1, 4, cache.WIDTH)
    y = routed(x, ctx).y
    assert float(y.abs().max()) > 1e-3
    with cache.at(cache.Steps((0,))):
        torch.testing.assert_close(kept(x, ctx).y, y, atol=1e-5, rtol=1e-5)
    made = cache.folding(1, Place(), rounds=1)
    exact = [row for row in made["goals"] if row["goal"] == "exact"]
    assert [row["met"] for row in exact] == [True]
    candidates = [row["candidate"] for row in made["rows"]]
    assert candidates == ["routed", "every expert", "folded", "dense", "dense, served"]
