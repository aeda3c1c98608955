"""Goals say what they were held against; growth is fitted, not guessed."""

from __future__ import annotations

import pytest
import torch

from coterie.bench import expert_growth, timing
from coterie.bench.expert_cases import Case, Setup
from coterie.bench.expert_goals import expert_goals
from coterie.bench.expert_peers import (
    DENSE_LAYER,
    EAGER,
    FLOOR,
    ONE_THREAD,
    Sorted,
    transformers_calls,
)
from coterie.bench.goals import exponent, goal, timed
from coterie.bench.timing import Place, interleaved, ratio, ratios, spread

TINY = Case("fine64", 12, 16, 8, 4, 2)


def test_a_goal_is_met_on_its_side_of_the_bound() -> None:
    assert goal("P", "less", 1.0, 1.0, True)["met"] and not goal("P", "less", 1.1, 1.0, True)["met"]
    assert goal("P", "more", 1.0, 1.0, False)["met"] and not goal("P", "", 0.9, 1.0, False)["met"]
    assert goal("P", "", None, 1.0, False)["met"] is None
    assert goal("P", "", 2.0, 3.0, True, spread=0.1)["spread"] == 0.1


@pytest.mark.parametrize(("value", "shown"), [(2.38419e-7, 2.384e-7), (1.23456, 1.235), (0.0, 0.0)])
def test_a_goal_keeps_significant_digits(value: float, shown: float) -> None:
    assert goal("exact", "", value, 1e-5, True)["figure"] == shown


def test_exponents_of_known_laws() -> None:
    sizes = [1, 2, 4, 8]
    assert exponent(sizes, [3 * s**2 for s in sizes]) == pytest.approx(2.0)
    assert exponent(sizes, [5.0] * 4) == pytest.approx(0.0, abs=1e-12)


def test_every_candidate_runs_in_every_round_both_ways(monkeypatch) -> None:
    monkeypatch.setattr(timing, "CHUNK", 1e-9)
    order: list[str] = []
    calls = {name: lambda name=name: order.append(name) for name in ("a", "b")}
    times = interleaved(calls, Place(), 2)
    assert order[4:] == ["a", "b", "b", "a"] * 3  # two warm-up calls each, short: three times
    assert {len(values) for values in times.values()} == {6}


def test_ratio_and_spread_come_from_rounds() -> None:
    times = {"a": [2.0, 4.0, 6.0, 8.0], "b": [1.0, 1.0, 2.0, 2.0]}
    assert ratios(times, "a", ["b"]) == [2.0, 4.0, 3.0, 4.0]
    assert ratio(times, "a", ["b"]) == 3.5
    assert spread([1.0]) is None and spread([1.0, 2.0, 3.0]) == 1.0
    assert spread([1.0, 1.0, 1.0, 1.0]) == 0.0


def test_the_floor_computes_what_the_experts_compute(monkeypatch) -> None:
    """The bare experts, with gates and scatter put back, are the layer."""
    setup = Setup(TINY, Place())
    bare = Sorted(setup)
    answers = []
    for x, _, gate_up, down in bare.parts:
        gate, up = (x @ gate_up.T).chunk(2, dim=1)
        answers.append((torch.nn.functional.silu(gate) * up) @ down.T)
    weighed = torch.cat(answers) * setup.plan.sorted_gates[:, None]
    y = torch.zeros_like(setup.x).index_add(0, setup.plan.rows, weighed)
    torch.testing.assert_close(y, setup.backends()["loop"].run())
    products: list[tuple[int, ...]] = []
    plain = torch.Tensor.__matmul__

    def counted(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        products.append((*a.shape, b.shape[1]))
        return plain(a, b)

    monkeypatch.setattr(torch.Tensor, "__matmul__", counted)
    used = len(bare.parts)
    for run, each in (
        (bare.forward, 2),
        (bare.products, 2),
        (bare.train, 6),
        (bare.products_train, 6),
    ):
        products.clear()
        run()
        assert len(products) == each * used


def test_peers_have_our_weights_and_gradients() -> None:
    pytest.importorskip("transformers")
    setup = Setup(TINY, Place())
    ours = setup.backends()["loop"]
    exact = torch.autograd.grad(ours.run(), ours.leaves, setup.grad)
    peers = transformers_calls(setup)
    assert set(peers) == {"transformers-eager", "transformers-grouped_mm"}
    for call in peers.values():
        made = torch.autograd.grad(call.run(), call.leaves, setup.grad)
        for left, right in zip(made, exact):
            torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-5)


def _times(**seconds: float) -> timing.Times:
    """Of a few candidates; one second for the others."""
    names = ("auto", FLOOR, DENSE_LAYER, "loop", "grouped", EAGER, ONE_THREAD)
    return {name: [seconds.get(name, 1.0)] * 2 for name in names}


def test_expert_goals_hold_times_against_those_of_others() -> None:
    made = expert_goals("fine64", _times(auto=1.2), _times(auto=0.2, grouped=0.25))
    rows = {(row["goal"], row["what"]): row for row in made}
    floor = rows["P1", "fine64: forward, over the bare experts"]
    assert floor["figure"] == 1.2 and floor["met"] is False and floor["peer"] == FLOOR
    best = rows["P3", "fine64: forward and backward, over the fastest peer"]
    assert (best["figure"], best["peer"], best["peer_ms"]) == (0.8, "grouped", 250.0)
    loop = rows["P5", "fine64: times as fast as the usual loop, forward and backward"]
    assert loop["figure"] == 5.0 and loop["met"] and loop["spread"] == 0.0
    assert {goal for goal, _ in rows} == {"P1", "P2", "P3", "P4", "P5", "P12", "threads"}


def test_decoding_is_held_against_reading_and_against_the_loop() -> None:
    times = _times(auto=1.25, loop=1.0)
    del times[ONE_THREAD]
    times |= {"read: sum": [1.5, 1.5], "read: dot": [1.0, 1.0]}
    made = [row for row in expert_goals("decode8", times, {}) if row["goal"] == "P6"]
    assert [(row["figure"], row["met"]) for row in made] == [(0.8, True), (1.25, False)]


def test_a_goal_without_its_peer_is_not_measured() -> None:
    row = timed("P", "what", {"ours": [1.0]}, "ours", ["missing"], 1.0)
    assert row["figure"] is row["met"] is row["peer"] is row["peer_ms"] is None


def test_growth_has_a_row_for_every_size_and_says_its_laws(monkeypatch) -> None:
    monkeypatch.setattr(expert_growth, "BASE", Case("growth", 64, 16, 16, 8, 2))
    monkeypatch.setattr(timing, "CHUNK", 1e-4)
    made = expert_growth.growth(1, 1, experts=(2, 4, 8, 64), tokens=(512, 1024, 2048, 4096))
    assert [row["experts"] for row in made["rows"]] == [2, 4, 8, 64, 8, 8, 8, 8]
    laws = {law["what"]: law["figure"] for law in made["laws"]}
    assert laws["tokens 512 to 4096: exponent of saved rows"] == pytest.approx(1.0, abs=0.05)
    assert len(laws) == 10 and all(figure is not None for figure in laws.values())


def test_saved_bytes_are_those_of_one_product() -> None:
    setup = Setup(TINY, Place())
    kept = expert_growth.saved_bytes(setup)
    assert kept >= setup.plan.num_rows * TINY.top_k * TINY.hidden * 4
